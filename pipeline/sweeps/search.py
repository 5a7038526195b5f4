"""Arms found rather than listed: Optuna proposes settings, the best one is then compared to the baseline.

Trials are runs of one seed, judged on validation. The winner of many trials looks better than it is, so its trial is
no evidence: the sweep runs it again on seeds that had no say in the choice.

The study lies in the sweep's folder. A trial that is RUNNING there when a search starts was cut off: it goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.errors import TrainingError
from pipeline.runtime.console import say
from pipeline.sweeps.jobs import Job, SweepContext, train_request
from pipeline.sweeps.requests import Evaluated, RunTrained
from pipeline.sweeps.sweep_config import SearchConfig, SpaceConfig
from pipeline.sweeps.sweep_plan import Arm, Plan, controls_of, overridden
from pipeline.tracking.messages import StoredRun
from pipeline.tracking.stored_runs import tag_run

TRIAL = "trial"  # the role of these runs: no comparison takes them for arms
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


Failures = dict[tuple[str, int], str]  # (name of the trial, seed) -> why


def search(sweep: SweepContext, known: Mapping[str, StoredRun]) -> tuple[Plan, Failures]:
    """Run what is missing of the trials; the plan that compares the best of them to the baseline, and what failed.

    known: the runs that are in the store, by run key.

    Raises:
        TrainingError: no trial finished.
    """
    config = sweep.plan.sweep.search
    assert config
    trials = _Trials(sweep, config, known)
    trials.run()
    best = trials.best()
    say(f"best of {len(trials.of(*DONE))} trials on {trials.metric} (seed {config.seed}): {best.name}")
    found = (best, *(controls_of([best]) if sweep.plan.sweep.controls == "reweight" else ()))
    return replace(sweep.plan, arms=(sweep.plan.baseline, *found)), trials.failed


@dataclass(frozen=True)
class _Asked:
    """A trial that is to be brought to its end."""

    trial: Trial
    arm: Arm
    key: str  # of its run
    values: dict[int, float]  # step of an evaluation -> metric

    @property
    def name(self) -> str:
        return f"trial {self.trial.number}: {self.arm.name}"


class _End(NamedTuple):
    """How the trial of a setting ended."""

    state: TrialState
    value: float | None = None


class _Trials:
    """The study and its runs."""

    def __init__(self, sweep: SweepContext, config: SearchConfig, known: Mapping[str, StoredRun]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.config, self.known = sweep, config, known
        evaluation = sweep.plan.baseline.config.evaluation
        self.metric = config.metric or evaluation.metric
        less = (config.mode or evaluation.mode) == "min"
        self.better = min if less else max
        file = str(sweep.folder.resolve() / "search.db")
        self.storage = RDBStorage(f"sqlite:///{file.replace('{', '{{').replace('}', '}}')}")  # it fills in braces
        self.study = optuna.create_study(
            storage=self.storage,
            study_name=f"{sweep.id} {self.metric}",
            load_if_exists=True,
            direction="minimize" if less else "maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=config.startup_trials),
        )
        self.cut_off = self.of(TrialState.RUNNING)
        self.jobs: list[Job] = []
        self.training: dict[str, _Asked] = {}  # by the name of their job
        self.waiting: list[_Asked] = []  # for the trial that trains the same setting
        self.failed: Failures = {}  # of this start
        self.failed_keys: set[str] = set()  # of their runs
        self.broken = 0  # trials without a value, of this start
        self.pruned: dict[int, int] = {}  # trial -> the step of the evaluation at which the median stopped it

    def run(self) -> None:
        """Bring all trials to their end."""
        self._advance()
        self.sweep.workers.work(self.jobs, self._told)

    def best(self) -> Arm:
        """The setting of the best trial that was trained to its end."""
        if not self.of(TrialState.COMPLETE):
            raise TrainingError("no trial of the search finished; the workers' logs say why")
        arm = self._arm(self.study.best_trial.user_attrs["settings"])
        return replace(arm, role="arm", name=f"best {arm.name}")

    def of(self, *states: TrialState) -> list[FrozenTrial]:
        """The study's trials in these states."""
        return self.study.get_trials(deepcopy=False, states=states)

    def _arm(self, values: Mapping[str, Any]) -> Arm:
        arm = overridden(self.sweep.plan.baseline, self.config.settings | dict(values), TRIAL)
        return replace(arm, name=arm.config.arm_name())

    # ---------------------------------------------------------------- what there is to do

    def _advance(self) -> None:
        """Settle what waited, and take trials until every worker has one or there is none to take."""
        waiting, self.waiting = self.waiting, []
        for asked in waiting:
            self._place(asked)
        while len(self.training) < self.sweep.plan.sweep.jobs and self.broken < self.config.trials:
            if self.cut_off:
                self._place(self._again(self.cut_off.pop(0)))
            elif len(self.of(*DONE, TrialState.RUNNING)) < self.config.trials:
                self.study.sampler = self._sampler(len(self.study.get_trials(deepcopy=False)))
                self._place(self._asked(self.study.ask(), {}))
            else:
                break

    def _again(self, cut_off: FrozenTrial) -> _Asked:
        """The trial that an earlier start was at, with what it had drawn and reported."""
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        self.study.sampler = self._sampler(cut_off.number)  # for what it had not drawn yet
        trial = Trial(self.study, self.storage.get_trial_id_from_study_id_trial_number(study_id, cut_off.number))
        return self._asked(trial, dict(cut_off.intermediate_values))

    def _asked(self, trial: Trial, values: dict[int, float]) -> _Asked:
        settings = {key: _suggest(trial, key, space) for key, space in self.config.space.items()}
        arm = self._arm(settings)
        key = arm.at(self.config.seed).fingerprint(self.sweep.digest)
        trial.set_user_attr("settings", settings)
        trial.set_user_attr("run_key", key)
        return _Asked(trial, arm, key, values)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Draws of its own for each trial: the same whichever start asks for it."""
        seed = int(np.random.SeedSequence((self.config.seed, number)).generate_state(1)[0])
        return optuna.samplers.TPESampler(n_startup_trials=self.config.startup_trials, seed=seed, constant_liar=True)

    def _place(self, asked: _Asked) -> None:
        """Train the trial, or let it wait for the one that trains the same setting, or give it that one's end."""
        if any(other.key == asked.key for other in self.training.values()):
            self.waiting.append(asked)
        elif end := self._end_of(asked.key):
            self._tell(asked, end)
        else:
            tags = {"sweep_id": self.sweep.id, "arm": asked.arm.name, "role": TRIAL, "trial": str(asked.trial.number)}
            begun = self.known.get(asked.key)
            request = train_request(self.sweep.entry, asked.arm, self.config.seed, tags, begun, watched=self.metric)
            self.training[asked.name] = asked
            self.jobs.append(Job(asked.name, request, finished=self._finished))

    def _end_of(self, key: str) -> _End | None:
        """How the setting with this key ended; None where it has to be trained (again: failures of earlier starts)."""
        for trial in self.of(*DONE):
            if trial.user_attrs.get("run_key") == key:
                return _End(trial.state, trial.value if trial.state == TrialState.COMPLETE else None)
        return _End(TrialState.FAIL) if key in self.failed_keys else None

    # ---------------------------------------------------------------- what came of it

    def _told(self, job: Job, news: Evaluated) -> None:
        """An evaluation of a running trial: the median of the others decides whether it goes on."""
        asked = self.training[job.name]
        if news.step not in asked.values:  # a run that goes on tells its earlier ones again
            asked.values[news.step] = news.value
            asked.trial.report(news.value, news.step)
        if asked.trial.number not in self.pruned and asked.trial.should_prune():
            self.pruned[asked.trial.number] = news.step
            self.sweep.workers.stop(job)

    def _finished(self, job: Job) -> None:
        asked = self.training.pop(job.name)
        step = self.pruned.get(asked.trial.number)
        failed = job.failed or (None if asked.values else f"no evaluation of it has {self.metric}")
        if failed:
            end = _End(TrialState.FAIL)
            self.failed[asked.name, self.config.seed] = failed
            self.failed_keys.add(asked.key)
            say(f"{job.name}: failed: {failed}")
        else:
            assert isinstance(job.reply, RunTrained)
            if step is not None and job.reply.stopped:
                end = _End(TrialState.PRUNED)
                tag_run(job.reply.run_id, {"pruned": str(step)})
                last = asked.values[max(asked.values)]
                say(f"{job.name}: {self.metric} {last:.4f}, stopped by the median of the others at step {step}")
            else:
                end = _End(TrialState.COMPLETE, self.better(asked.values.values()))
                say(f"{job.name}: {self.metric} {end.value:.4f}, {job.reply.seconds:.0f} s")
        self._tell(asked, end)
        self._advance()

    def _tell(self, asked: _Asked, end: _End) -> None:
        self.study.tell(asked.trial, end.value, state=end.state)
        self.broken += end.state == TrialState.FAIL


def _suggest(trial: Trial, key: str, space: SpaceConfig) -> Any:
    if space.choices is not None:
        return space.choices[trial.suggest_categorical(key, range(len(space.choices)))]
    assert space.low is not None
    assert space.high is not None
    if space.integer:
        return trial.suggest_int(key, int(space.low), int(space.high), log=space.log)
    return trial.suggest_float(key, space.low, space.high, log=space.log)
