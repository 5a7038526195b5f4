"""The plan of a sweep: the configs of its runs, all resolved and checked before the first one starts."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.config.run_config import RunConfig
from pipeline.config.strict_config import canonical, flatten, keys, load, nearest, read_yaml, validate
from pipeline.errors import UserError
from pipeline.sweeps.sweep_config import GridConfig, Overrides, SearchConfig, SweepConfig
from pipeline.tasks.registry import ROOT, task_entry

NAME = "name"  # key that names an arm in a list
DEFAULT_NAMES = ("baseline", "run")  # names that tasks give to runs with default settings
# Defaults of every run of a sweep; the sweep's own settings override them.
DEFAULTS: Overrides = {"tracking.log_model": False, "tracking.log_report": False, "training.threads": 1}


@dataclass(frozen=True)
class Arm:
    """One arm of a sweep: a config that is run with every seed."""

    name: str
    role: Literal["baseline", "arm", "control"]
    config: RunConfig
    overridden: frozenset[str] = frozenset()  # dotted keys that the arm overrides
    control_of: tuple[str, ...] = ()

    def at(self, seed: int) -> RunConfig:
        """The config of the run with this seed."""
        return self.config.with_values(seed=seed)

    def run_name(self, seed: int) -> str:
        return f"{self.name} s{seed}"


@dataclass(frozen=True)
class Plan:
    """A sweep with resolved and validated settings."""

    title: str
    sweep: SweepConfig
    arms: tuple[Arm, ...]  # the baseline first
    metric: str
    notes: tuple[str, ...]

    @property
    def baseline(self) -> Arm:
        return self.arms[0]

    @property
    def experiment(self) -> str | None:
        """The experiment of the runs; None for MLflow's default experiment."""
        return self.baseline.config.experiment or _environment_experiment()

    def question(self, data_digest: str = "") -> str:
        """Hash of what the sweep asks: the baseline, data, experiment, metric and mode; not of its arms and seeds."""
        baseline = self.baseline.config.with_values(seed=0).fingerprint(data_digest)
        asked = [baseline, self.experiment, self.metric, self.sweep.mode, self.sweep.share_prefix]
        return hashlib.sha256(json.dumps(["question", self.sweep.task, *asked]).encode()).hexdigest()[:16]

    def identity(self, data_digest: str = "") -> str:
        """The sweep's id.

        With a list of seeds, a hash of settings, seeds, data and experiment; independent of their order, of `jobs` and
        of `metric`. With sequential seeds the question's: more arms or seeds continue the same sweep.
        """
        if self.sweep.is_sequential:
            return self.question(data_digest)
        runs = sorted((arm.name, arm.role, arm.at(seed).fingerprint(data_digest))
                      for seed in self.sweep.all_seeds for arm in self.arms)  # fmt: skip
        search = [self.sweep.search.model_dump(), self.sweep.controls] if self.sweep.search else None
        text = json.dumps([self.sweep.task, runs, search, self.sweep.share_prefix, self.experiment])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _environment_experiment() -> str | None:
    """Experiment that the environment selects for runs without `experiment`; None for MLflow's default experiment."""
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or os.environ.get("MLFLOW_EXPERIMENT_ID")
    return None if experiment in ("0", "Default") else experiment


def resolve(
    sweep: SweepConfig,
    file: Path,
    model: type[RunConfig],
    places: Sequence[Path],
    typed: Mapping[str, str] | None = None,
) -> Plan:
    """Resolve and check every arm's config.

    places: folders to search for the task's YAML. typed: settings from the command line, which apply to every run.

    Raises:
        UserError: a setting is invalid. The message names the sweep file and the arm.
    """
    base = ROOT / task_entry(sweep.task).file
    if sweep.file:
        base = next((path for place in places if (path := place / sweep.file).is_file()), Path(sweep.file))
    read_yaml(base)
    typed_settings = _dotted(typed or {}, model, "")
    common = DEFAULTS | _dotted(sweep.settings, model, f"{file}: settings") | typed_settings
    if "seed" in common:
        raise UserError(f"{file}: seed is not a setting of every run; allowed: seeds, a list")
    listed = sweep.arms.combinations() if isinstance(sweep.arms, GridConfig) else sweep.arms or []
    for key in typed_settings:
        arm_settings = [_dotted(_without_name(entry), model, str(file)) for entry in (sweep.baseline, *listed)]
        values = sorted({canonical(settings[key]) for settings in arm_settings if key in settings})
        if len(values) > 1:
            raise UserError(f"{key}: the arms of {file} differ in it ({', '.join(values)}), allowed: another key")

    builder = _ArmBuilder(model, base, common, typed_settings)
    baseline = builder.build(sweep.baseline, f"{file}: baseline", "baseline", "baseline")
    arms, notes = _build_arms(builder, listed, baseline, file, is_grid=isinstance(sweep.arms, GridConfig))
    if not arms and not sweep.search:
        raise UserError(f"{file}: arms.grid has nothing beside the baseline, allowed: at least one other setting")
    arms = _with_distinct_names(arms, baseline)
    if sweep.controls == "reweight":
        controls = controls_of(arms)
        if not controls and not sweep.search:
            raise UserError(f"{file}: controls is reweight, but no arm has a control; allowed: off")
        fingerprints = {arm.config.fingerprint() for arm in arms}
        arms += [control for control in controls if control.config.fingerprint() not in fingerprints]
    _refuse_equal_names([arm.name for arm in (baseline, *arms)], file)
    if sweep.search:
        _check_space(sweep.search, baseline, file)
    metric = sweep.metric or baseline.config.evaluation.metric.replace("valid/", "test/", 1)
    return Plan(sweep.title or file.stem, sweep, (baseline, *arms), metric, tuple(notes))


def with_overrides(arm: Arm, values: Overrides, where: str = "search.space") -> Arm:
    """Copy an arm with additional overrides, under the same name.

    Raises:
        UserError: a value is not allowed for its key.
    """
    model = type(arm.config)
    settings = _dotted(values, model, where)
    tree = arm.config.model_dump(by_alias=True)
    for path, value in settings.items():
        *blocks, leaf = path.split(".")
        block = tree
        for name in blocks:
            block = block[name]
        block[leaf] = value
    try:
        config = validate(model, tree, None)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('config: ')}") from None
    return Arm(arm.name, "arm", config, arm.overridden | frozenset(settings))


def controls_of(arms: Sequence[Arm]) -> list[Arm]:
    """Control arms of the arms that have one. Arms whose controls are equal share one control."""
    controls: dict[str, Arm] = {}
    for arm in arms:
        config = arm.config.control()
        if config is None:
            continue
        key = config.fingerprint()
        control_of = (*controls[key].control_of, arm.name) if key in controls else (arm.name,)
        controls[key] = Arm(config.arm_name(), "control", config, _shared_overrides(arm, config), control_of)
    return list(controls.values())


def _shared_overrides(arm: Arm, control: RunConfig) -> frozenset[str]:
    """The keys overridden by the arm that its control keeps: those of blocks in which the two have equal values."""
    own, others = flatten(arm.config), flatten(control)
    changed = {key for key in own if own[key] != others[key]}
    blocks = {key.rpartition(".")[0] for key in changed} - {""}
    return frozenset(key for key in arm.overridden if key not in changed and key.rpartition(".")[0] not in blocks)


def to_yaml(plan: Plan) -> str:
    """The resolved sweep as YAML: settings common to all arms, and for each arm the settings that differ."""
    settings = {arm.name: arm.config.decisive() for arm in plan.arms}
    baseline = settings["baseline"]
    differing = [key for key in baseline if len({own[key] for own in settings.values()}) > 1 and key != "seed"]
    arms = {name: {key: own[key] for key in differing} for name, own in settings.items()}
    common = {key: value for key, value in baseline.items() if key not in (*differing, "seed")}
    seeds = plan.sweep.model_dump(mode="json")["seeds"]
    tree = {"task": plan.sweep.task, "metric": plan.metric, "seeds": seeds, "margin": plan.sweep.margin, "arms": arms}
    return yaml.safe_dump(tree | {"common": common}, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class _ArmBuilder:
    """Builds arms from overrides."""

    model: type[RunConfig]
    base: Path  # the task's YAML
    common: Overrides
    typed: Overrides  # from the command line; replace an arm's own values

    def build(self, overrides: Overrides, where: str, name: str | None = None, role: Any = "arm") -> Arm:
        settings = _dotted(overrides, self.model, where)
        settings |= {path: value for path, value in self.typed.items() if path in settings}
        for key in ("seed", "run_name"):
            if key in settings:
                raise UserError(f"{where}: found {key}, allowed: seeds of the sweep, and `name` of an arm")
        texts = {path: canonical(value) for path, value in (self.common | settings).items()}
        shown_as = {path: alias for alias, path in self.model.short.items() if alias in overrides}
        try:
            config = load(self.model, self.base, texts, shown_as)
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('--')}") from None
        return Arm(name or config.arm_name(), role, config, frozenset(settings))

    def build_listed(self, entry: Overrides, where: str) -> Arm:
        name = entry.get(NAME)
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise UserError(f"{where}: name: found {name!r}, allowed: text")
        if name in DEFAULT_NAMES:
            raise UserError(f"{where}: name: found {name}, allowed: another name")
        return self.build(_without_name(entry), where, name)


def _without_name(entry: Overrides) -> Overrides:
    return {key: value for key, value in entry.items() if key != NAME}


def _dotted(overrides: Mapping[str, Any], model: type[RunConfig], where: str) -> Overrides:
    """Convert short names and nested blocks in overrides to dotted keys."""
    known = {key.path for key in keys(model)}
    dotted: Overrides = {}

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
            elif path in dotted:
                raise UserError(f"{where or 'command line'}: {path} appears twice")
            else:
                dotted[path] = value

    walk(overrides, "")
    return dotted


def _build_arms(
    builder: _ArmBuilder, entries: Sequence[Overrides], baseline: Arm, file: Path, is_grid: bool
) -> tuple[list[Arm], list[str]]:
    """Build all arms except the baseline, and a note for each grid combination that is left out as a duplicate.

    Raises:
        UserError: an arm is invalid, or two listed arms have the same settings or name.
    """
    labels = {baseline.config.fingerprint(): "baseline"}
    arms, notes = [], []
    for number, entry in enumerate(entries, 1):
        if is_grid:
            arm = builder.build(entry, f"{file}: arms.grid {json.dumps(entry, default=str)}")
            label = ", ".join(f"{key} {canonical(value)}" for key, value in entry.items())
        else:
            arm = builder.build_listed(entry, f"{file}: arm {number}")
            label = f"arm {number} ({arm.name})"
        key = arm.config.fingerprint()
        if key not in labels:
            labels[key] = label
            arms.append(arm)
        elif is_grid:
            notes.append(f"arms.grid: {label} is the same run as {labels[key]} and is left out")
        else:
            raise UserError(f"{file}: arm {number} has the same settings as {labels[key]}, allowed: arms that differ")
    if not is_grid:
        _refuse_equal_names([entry[NAME] for entry in entries if NAME in entry], file)
    return arms, notes


def _refuse_equal_names(names: Sequence[str], file: Path) -> None:
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise UserError(f"{file}: two arms are called {repeated}, allowed: each its own name")


def _with_distinct_names(arms: Sequence[Arm], baseline: Arm) -> list[Arm]:
    """Rename arms with ambiguous names after the overrides in which they differ."""
    renamed = []
    for arm in arms:
        usual = arm.name in DEFAULT_NAMES
        others = [baseline] if usual else [other for other in arms if other.name == arm.name and other is not arm]
        settings, other_settings = arm.config.decisive(), [other.config.decisive() for other in others]
        differing = [key for key in sorted(settings) if any(other[key] != settings[key] for other in other_settings)]
        own = [key for key in differing if key in arm.overridden]
        keys_shown = own or [key for key in differing if key in baseline.overridden]
        parts = [f"{key.rsplit('.', 1)[-1]} {settings[key]}" for key in keys_shown]
        renamed.append(replace(arm, name=" ".join(parts if usual else [arm.name, *parts])))
    return renamed


def _check_space(search: SearchConfig, baseline: Arm, file: Path) -> None:
    """Check that both ends of every range, and every choice, are valid values of their key."""
    baseline = with_overrides(baseline, search.settings, f"{file}: search.settings")
    for key in _dotted(dict.fromkeys(search.space), type(baseline.config), f"{file}: search.space"):
        if key in ("seed", "run_name") or key.startswith(baseline.config.data_keys):
            raise UserError(f"{file}: search.space: found {key}, allowed: keys that leave seed and data alone")
    for key, space in search.space.items():
        for value in space.choices if space.choices is not None else [space.low, space.high]:
            number = int(value) if space.integer and isinstance(value, float) and math.isfinite(value) else value
            with_overrides(baseline, {key: number}, f"{file}: search.space")
