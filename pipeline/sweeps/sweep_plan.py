"""From a sweep's file to the configs of its runs, all checked before the first one starts."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.config.run_config import RunConfig
from pipeline.config.strict_config import canonical, keys, load, nearest, read_yaml, validate
from pipeline.errors import UserError
from pipeline.sweeps.sweep_config import GridConfig, Overrides, SearchConfig, SweepConfig

NAME = "name"  # what an arm in a list may call itself
UNSAID = ("baseline", "run")  # what tasks call a run in which nothing is special
# What every run of a sweep starts from, before the sweep's own settings.
DEFAULTS: Overrides = {"tracking.log_model": False, "tracking.log_report": False, "training.threads": 1}


@dataclass(frozen=True)
class Arm:
    """One setting of a sweep, whatever the seed."""

    name: str
    role: Literal["baseline", "arm", "control"]
    config: RunConfig
    overridden: frozenset[str] = frozenset()  # dotted keys
    control_of: tuple[str, ...] = ()

    def at(self, seed: int) -> RunConfig:
        """The config of its run with the seed."""
        return self.config.with_values(seed=seed)

    def run_name(self, seed: int) -> str:
        """Short enough for a chart's legend."""
        return f"{self.name} s{seed}"


@dataclass(frozen=True)
class Plan:
    """A sweep whose settings are resolved and valid."""

    title: str
    sweep: SweepConfig
    arms: tuple[Arm, ...]  # the baseline first
    metric: str
    notes: tuple[str, ...]

    @property
    def baseline(self) -> Arm:
        return self.arms[0]

    def units(self) -> Iterator[tuple[Arm, int]]:
        """Every run: all arms of a seed, then the next seed."""
        for seed in self.sweep.seeds:
            for arm in self.arms:
                yield arm, seed

    def identity(self, data_digest: str = "") -> str:
        """Names the sweep: the same settings, seeds, data and experiment, whatever the order, processes and metric."""
        found = sorted((arm.name, arm.role, arm.at(seed).fingerprint(data_digest)) for arm, seed in self.units())
        search = [self.sweep.search.model_dump(), self.sweep.controls] if self.sweep.search else None
        where = self.baseline.config.experiment or _chosen_experiment()
        text = json.dumps([self.sweep.task, found, search, self.sweep.share_prefix, where])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _chosen_experiment() -> str | None:
    """Where runs go that name no experiment, as MLflow and `mlflow run` pass it on; None = the default one."""
    found = os.environ.get("MLFLOW_EXPERIMENT_NAME") or os.environ.get("MLFLOW_EXPERIMENT_ID")
    return None if found in ("0", "Default") else found


def resolve(
    sweep: SweepConfig,
    file: Path,
    model: type[RunConfig],
    places: Sequence[Path],
    typed: Mapping[str, str] | None = None,
) -> Plan:
    """Every arm's config, checked before anything runs.

    places: folders where the task's YAML may lie. typed: settings of every run from the command line.

    Raises:
        UserError: names the sweep file and the arm.
    """
    base = next((path for place in places if (path := place / sweep.file).is_file()), Path(sweep.file))
    read_yaml(base)
    common = DEFAULTS | _plain(sweep.settings, model, f"{file}: settings") | _plain(typed or {}, model, "")
    if "seed" in common:
        raise UserError(f"{file}: seed is not a setting of every run; allowed: seeds, a list")

    fixed = _plain(typed or {}, model, "")
    for key in fixed:
        found = [entry[key] for entry in (_plain(one, model, str(file)) for one in _entries(sweep)) if key in entry]
        told = sorted({canonical(value) for value in found})
        if len(told) > 1:
            raise UserError(f"{key}: the arms of {file} differ in it ({', '.join(told)}), allowed: another key")

    def made(overrides: Overrides, where: str, name: str | None = None, role: Any = "arm") -> Arm:
        plain = _plain(overrides, model, where)
        plain |= {path: value for path, value in fixed.items() if path in plain}
        for key in ("seed", "run_name"):
            if key in plain:
                raise UserError(f"{where}: found {key}, allowed: seeds of the sweep, and `name` of an arm")
        texts = {path: canonical(value) for path, value in (common | plain).items()}
        typed = {path: alias for alias, path in model.short.items() if alias in overrides}
        try:
            config = load(model, base, texts, shown_as=typed)
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('--')}") from None
        return Arm(name or config.arm_name(), role, config, frozenset(plain))

    baseline = made(sweep.baseline, f"{file}: baseline", "baseline", "baseline")
    notes: list[str] = []
    if isinstance(sweep.arms, GridConfig):
        arms = _distinct(sweep.arms.combinations(), baseline, lambda overrides: made(
            overrides, f"{file}: arms.grid {json.dumps(overrides, default=str)}"), notes)  # fmt: skip
    else:
        arms = [_listed(entry, f"{file}: arm {number}", made) for number, entry in enumerate(sweep.arms or [], 1)]
        _refuse_twins([baseline, *arms], file)
        given = [entry[NAME] for entry in sweep.arms or [] if NAME in entry]
        again = next((name for name in given if given.count(name) > 1), None)
        if again:
            raise UserError(f"{file}: two arms are called {again}, allowed: each its own name")
    if not arms and not sweep.search:
        raise UserError(f"{file}: arms.grid has nothing beside the baseline, allowed: at least one other setting")
    arms = _with_names(arms, baseline)
    if sweep.controls == "reweight":
        listed = {arm.config.fingerprint() for arm in arms}
        controls = [control for control in controls_of(arms) if control.config.fingerprint() not in listed]
        if not controls_of(arms) and not sweep.search:
            raise UserError(f"{file}: controls is reweight, but no arm has a focal loss with lambda > 0; allowed: off")
        arms += controls
    names = [arm.name for arm in (baseline, *arms)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{file}: two arms are called {twice}, allowed: each its own name")
    if sweep.search:
        _check_space(sweep.search, baseline, file)
    metric = sweep.metric or baseline.config.evaluation.metric.replace("valid/", "test/", 1)
    return Plan(sweep.title or file.stem, sweep, (baseline, *arms), metric, tuple(notes))


def overridden(arm: Arm, values: Overrides, name: str, where: str = "search.space") -> Arm:
    """The arm with more overrides.

    Raises:
        UserError: a value outside of what its key allows.
    """
    model = type(arm.config)
    plain = _plain(values, model, where)
    tree = arm.config.model_dump(by_alias=True)
    for path, value in plain.items():
        *blocks, leaf = path.split(".")
        block = tree
        for part in blocks:
            block = block[part]
        block[leaf] = value
    try:
        return Arm(name, "arm", validate(model, tree, None), arm.overridden | frozenset(plain))
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('config: ')}") from None


def _entries(sweep: SweepConfig) -> list[Overrides]:
    """What baseline and arms override, without their names."""
    listed = sweep.arms.combinations() if isinstance(sweep.arms, GridConfig) else sweep.arms or []
    return [{key: value for key, value in entry.items() if key != NAME} for entry in (sweep.baseline, *listed)]


def _listed(entry: Overrides, where: str, made: Any) -> Arm:
    overrides = {key: value for key, value in entry.items() if key != NAME}
    name = entry.get(NAME)
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise UserError(f"{where}: name: found {name!r}, allowed: text")
    return made(overrides, where, name)  # type: ignore[no-any-return]


def _plain(overrides: Mapping[str, Any], model: type[RunConfig], where: str) -> Overrides:
    """Short names and nested blocks as dotted keys."""
    known = {key.path for key in keys(model)}
    found: Overrides = {}

    def walk(block: Mapping[str, Any], prefix: str) -> None:
        for key, value in block.items():
            path = prefix + str(key)
            path = model.short.get(path, path)
            if path not in known and isinstance(value, Mapping) and any(name.startswith(path + ".") for name in known):
                walk(value, path + ".")
            elif path not in known:
                candidates = [*model.short, *(key.path for key in keys(SweepConfig)), *sorted(known)]
                place = f"{where}: " if where else ""
                raise UserError(f"{place}unknown key {prefix}{key}{nearest(path, candidates)}")
            elif path in found:
                raise UserError(f"{where or 'command line'}: {path} is there twice")
            else:
                found[path] = value

    walk(overrides, "")
    return found


def _distinct(
    grid: Sequence[Overrides], baseline: Arm, made: Callable[[Overrides], Arm], notes: list[str]
) -> list[Arm]:
    """Of a grid, each setting once and without the baseline's own."""
    seen = {baseline.config.fingerprint(): "baseline"}
    kept = []
    for overrides in grid:
        arm, written = made(overrides), ", ".join(f"{key} {canonical(value)}" for key, value in overrides.items())
        key = arm.config.fingerprint()
        if key in seen:
            notes.append(f"arms.grid: {written} is the same run as {seen[key]} and is left out")
        else:
            seen[key] = written
            kept.append(arm)
    return kept


def _refuse_twins(arms: list[Arm], file: Path) -> None:
    """`arms`: the baseline first."""
    seen: dict[str, int] = {}
    for number, arm in enumerate(arms):
        other = seen.setdefault(arm.config.fingerprint(), number)
        if other != number:
            named = f"arm {other} ({arms[other].name})" if other else "baseline"
            raise UserError(f"{file}: arm {number} has the same settings as {named}, allowed: arms that differ")


def _with_names(arms: list[Arm], baseline: Arm) -> list[Arm]:
    """Where the task's names do not tell arms apart, the overrides in which they differ do."""
    found = []
    for arm in arms:
        unsaid = arm.name in UNSAID
        rivals = [baseline] if unsaid else [other for other in arms if other.name == arm.name and other is not arm]
        told = [] if unsaid else [arm.name]
        flat, others = arm.config.decisive(), [rival.config.decisive() for rival in rivals]
        for key in sorted(arm.overridden & flat.keys()):
            if any(other[key] != flat[key] for other in others):
                told.append(f"{key.rsplit('.', 1)[-1]} {flat[key]}")
        found.append(replace(arm, name=" ".join(told)))
    return found


def controls_of(arms: Sequence[Arm]) -> list[Arm]:
    """The control of every arm that has one; arms that differ only in what it lacks share it."""
    found: dict[str, Arm] = {}
    for arm in arms:
        config = arm.config.control()
        if config is None:
            continue
        other = found.get(config.fingerprint())
        of = (*other.control_of, arm.name) if other else (arm.name,)
        typed = frozenset(key for key in arm.overridden if not key.startswith("loss.aux_focal."))
        found[config.fingerprint()] = Arm(config.arm_name(), "control", config, typed, of)
    return list(found.values())


def _check_space(search: SearchConfig, baseline: Arm, file: Path) -> None:
    """Both ends of every range and every choice are values that the key allows."""
    try:
        baseline = overridden(baseline, search.settings, "trial", "search.settings")
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    together = list(_plain(dict.fromkeys(search.space), type(baseline.config), f"{file}: search.space"))
    for key in together:
        if key in ("seed", "run_name") or key.startswith("data."):
            raise UserError(f"{file}: search.space: found {key}, allowed: keys that leave seed and data alone")
    for key, space in search.space.items():
        ends = space.choices if space.choices is not None else [space.low, space.high]
        for value in ends:
            number = int(value) if space.integer and isinstance(value, float) and math.isfinite(value) else value
            try:
                overridden(baseline, {key: number}, "trial")
            except UserError as error:
                raise UserError(f"{file}: {error}") from None


def to_yaml(plan: Plan) -> str:
    """What a sweep runs, with everything resolved: arms by name with their decisive settings that differ."""
    flats = {arm.name: arm.config.decisive() for arm in plan.arms}
    differing = [key for key in flats["baseline"] if len({flat[key] for flat in flats.values()}) > 1 and key != "seed"]
    arms = {name: {key: flat[key] for key in differing} for name, flat in flats.items()}
    common = {key: value for key, value in flats["baseline"].items() if key not in (*differing, "seed")}
    tree = {"task": plan.sweep.task, "metric": plan.metric, "seeds": list(plan.sweep.seeds), "arms": arms}
    return yaml.safe_dump(tree | {"common": common}, sort_keys=False, allow_unicode=True)
