"""Config of the entry point `sweep`: a baseline, arms and seeds."""

import itertools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.strict_config import Config, Positive, nearest
from pipeline.tasks.registry import task_names

Overrides = dict[str, Any]  # dotted key or short name -> value
if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(task_names())]  # the entry points that train
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class GridConfig(Config):
    """One arm for each combination of the keys' values."""

    grid: dict[str, list[Any]]
    """key: list of values; every combination is an arm"""
    where: dict[str, dict[str, Any]] = Field({})
    """key: {other key: value}; the key varies only where the other key has this value and is left out elsewhere"""

    @model_validator(mode="after")
    def _nothing_empty(self) -> Self:
        if not self.grid:
            raise ValueError("arms.grid is empty, allowed: at least one key with a list of values")
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"arms.grid.{key} is empty, allowed: at least one value")
        for key, conditions in self.where.items():
            for name in (key, *conditions):
                if name not in self.grid:
                    raise ValueError(f"arms.where: {name} is not a key of arms.grid{nearest(name, list(self.grid))}")
        return self

    def combinations(self) -> list[Overrides]:
        """The distinct combinations, in the order of the file."""
        arms: dict[str, Overrides] = {}
        for values in itertools.product(*self.grid.values()):
            arm = dict(zip(self.grid, values, strict=True))
            dropped = [key for key, conditions in self.where.items()
                       if any(arm[other] != value for other, value in conditions.items())]  # fmt: skip
            arm = {key: value for key, value in arm.items() if key not in dropped}
            arms.setdefault(json.dumps(arm, sort_keys=True, default=str), arm)
        return list(arms.values())


class SpaceConfig(Config):
    """Search space of one key: a range, or a list of choices."""

    low: float | None = None
    """smallest value"""
    high: float | None = None
    """largest value"""
    log: bool = False
    """draw evenly on a logarithmic scale"""
    integer: bool = False
    """whole numbers only"""
    choices: list[Any] | None = Field(None, min_length=1)
    """the values to choose from"""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None:
                raise ValueError("found choices beside low or high, allowed: one of the two")
        elif self.low is None or self.high is None or self.low > self.high:
            raise ValueError("allowed: choices, or low and high with low <= high")
        elif self.log and (int(self.low) if self.integer else self.low) <= 0:
            raise ValueError("log needs low > 0" + (", as a whole number" if self.integer else ""))
        return self


class SearchConfig(Config):
    """Search with Optuna: TPE proposes settings, a median pruner stops weak trials, the best is run on all seeds."""

    trials: Positive = 20
    """settings to try"""
    space: dict[str, SpaceConfig] = Field(min_length=1)
    """key: {low, high[, log, integer]} or {choices}"""
    settings: Overrides = Field({})
    """overrides of every trial, on top of the baseline's"""
    seed: Seed = 1000
    """seed of the proposals and of the trials' runs; must not be one of `seeds`, whose runs confirm the best trial"""
    metric: str | None = Field(None, pattern=r"^valid/.+")
    """validation metric to optimise; null = evaluation.metric of the task"""
    mode: Literal["max", "min"] | None = None
    """whether a higher or a lower search.metric is better; null = evaluation.mode of the task"""
    startup_trials: int = Field(5, ge=0)
    """number of random trials before TPE proposes settings and the median pruner stops trials"""


class SeedsConfig(Config):
    """Seeds 0, 1, 2, ..., as many as the arms need to be decided."""

    first: int = 3
    """number of seeds before the first look at the arms"""
    most: int = 20
    """number of seeds after which an arm that is not decided is left alone"""

    @model_validator(mode="before")
    @classmethod
    def _looks(cls, tree: Any) -> Any:
        from pipeline.maths.sequential import LOOKS

        if isinstance(tree, Mapping):
            seeds = {"first": 3, "most": 20} | dict(tree)
            if seeds.keys() != {"first", "most"} or any(number not in LOOKS for number in seeds.values()):
                raise ValueError(f"first and most: each one of {', '.join(map(str, LOOKS))}")
            if seeds["first"] > seeds["most"]:
                raise ValueError("first <= most")
        return tree


class SweepConfig(Config):
    short: ClassVar[dict[str, str]] = {}

    task: TaskName
    """entry point of every run"""
    file: str | None = Field(None, alias="config", min_length=1)
    """YAML of every run, relative to the working folder, the sweep file or the project; null = the task's default"""
    settings: Overrides = Field({})
    """overrides of every run; task keys on the command line (data=FOLDER, max_steps=100) are added to them"""
    baseline: Overrides
    """overrides of the baseline, with which every arm is compared"""
    arms: list[Overrides] | GridConfig | None = None
    """a list of overrides (with an optional `name`), or a grid with conditions"""
    search: SearchConfig | None = None
    """instead of arms: search for the best arm with Optuna"""
    controls: Literal["off", "reweight"] = "off"
    """reweight: also train the control of each arm that has one, which only changes the weights of examples"""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | SeedsConfig = (0, 1, 2)
    """every arm runs once with each; {first, most}: after 3, 5, 8, 12, 20, ... seeds, arms that are decided stop"""
    margin: float | None = Field(None, gt=0)
    """differences below it do not matter, in the metric's unit; only with seeds {first, most}"""
    metric: str | None = Field(None, pattern=r"^(valid|test)/.+")
    """primary metric of the verdict; null = evaluation.metric of the task, on the test split"""
    mode: Literal["max", "min"] | None = None
    """whether a higher or a lower metric is better; null = inferred from its name"""
    jobs: Positive = 2
    """processes that train at the same time, with one thread each unless settings has training.threads"""
    engine: Literal["local", "ray"] = "local"
    """local: processes on this machine; ray: tasks on a Ray cluster, with the same results"""
    ray_address: str | None = Field(None, pattern=r"^(auto|local|[^\s/]+:\d+)$")
    """host:port of the cluster of this machine, auto or local; null = RAY_ADDRESS, else a cluster for this sweep"""
    share_prefix: bool = True
    """train the steps before the gate once for all arms of a seed; false = train each arm alone, with equal results"""
    title: str | None = Field(None, min_length=1)
    """title of the report; null = the file's name"""
    plan: bool = False
    """true: train nothing; print the runs, steps, hours, disk space and minimum detectable difference of the sweep"""

    @property
    def is_sequential(self) -> bool:
        """Whether the arms get more seeds until they are decided."""
        return isinstance(self.seeds, SeedsConfig)

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of seeds after which the arms are compared; of a list of seeds, their number."""
        from pipeline.maths.sequential import scheduled_looks

        seeds = self.seeds
        return scheduled_looks(seeds.first, seeds.most) if isinstance(seeds, SeedsConfig) else (len(seeds),)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Every seed that an arm may be run with."""
        return tuple(range(self.seeds.most)) if isinstance(self.seeds, SeedsConfig) else self.seeds

    @model_validator(mode="after")
    def _one_kind_of_arms(self) -> Self:
        if (self.arms is None) == (self.search is None):
            raise ValueError("found " + ("neither" if self.arms is None else "both") + ", allowed: arms or search")
        if isinstance(self.arms, list) and not self.arms:
            raise ValueError("arms is empty, allowed: at least one")
        seeds = self.all_seeds
        repeated = [seed for seed in seeds if seeds.count(seed) > 1]
        if repeated:
            raise ValueError(f"seeds: {repeated[0]} appears twice, allowed: each once")
        if self.ray_address and self.engine != "ray":
            raise ValueError(f"ray_address: found {self.ray_address} with engine {self.engine}, allowed: engine ray")
        if self.margin is not None and not self.is_sequential:
            raise ValueError(f"margin: found {self.margin} with a list of seeds, allowed: seeds {{first, most}}")
        if self.search and self.search.seed in seeds:
            raise ValueError(f"search.seed {self.search.seed} is one of seeds, allowed: another")
        return self
