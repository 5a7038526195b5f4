"""Hyperparameter search of a sweep with Optuna. The best setting is then compared with the baseline.

Trials run with one seed and are scored on validation. The best score of many trials is biased upwards, so it is not
used as evidence: the sweep runs the best setting again with other seeds.

The study is stored in the sweep's folder. Trials that are RUNNING in it when a search starts were interrupted, and are
resumed.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.errors import TrainingError
from pipeline.runtime.console import info
from pipeline.sweeps.jobs import Job, SweepContext
from pipeline.sweeps.requests import Evaluated, RunTrained
from pipeline.sweeps.sweep_config import SpaceConfig
from pipeline.sweeps.sweep_plan import Arm, Plan, controls_of, with_overrides
from pipeline.tracking.stored_runs import tag_run

TRIAL = "trial"  # value of the tag `role`; comparisons leave these runs out
EVALUATED = (TrialState.COMPLETE, TrialState.PRUNED)


def search(context: SweepContext, named: Callable[[Arm], Arm]) -> tuple[Plan, dict[tuple[str, int], str]]:
    """Run the missing trials. named: names the best arm.

    Returns the plan that compares the best setting with the baseline, and the errors of failed trials by trial name
    and seed.

    Raises:
        TrainingError: no trial finished.
    """
    trials = _Trials(context)
    trials.run()
    best, plan = named(trials.best()), context.plan
    count = len(trials.in_state(*EVALUATED))
    info(f"best of {count} trials on {trials.metric} (seed {trials.config.seed}): {best.name}")
    controls = controls_of([best]) if plan.sweep.controls == "reweight" else []
    return replace(plan, arms=(plan.baseline, best, *controls)), trials.failures


@dataclass(frozen=True)
class _OpenTrial:
    """A trial that has not ended."""

    trial: Trial
    arm: Arm
    run_key: str
    values: dict[int, float]  # evaluation step -> metric

    @property
    def name(self) -> str:
        return f"trial {self.trial.number}: {self.arm.name}"


class _Outcome(NamedTuple):
    state: TrialState
    value: float | None = None


class _Trials:
    """The study and the runs of its trials."""

    def __init__(self, context: SweepContext) -> None:
        assert context.plan.sweep.search
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.context, self.baseline, self.config = context, context.plan.baseline, context.plan.sweep.search
        evaluation = self.baseline.config.evaluation
        self.metric = self.config.metric or evaluation.metric
        minimize = (self.config.mode or evaluation.mode) == "min"
        self.best_of = min if minimize else max
        # Optuna treats the URL as a format string
        file = str(context.folder.resolve() / "search.db").replace("{", "{{").replace("}", "}}")
        self.storage = RDBStorage(f"sqlite:///{file}")
        self.study = optuna.create_study(
            storage=self.storage,
            study_name=f"{context.id} {self.metric}{self._variant()}",
            load_if_exists=True,
            direction="minimize" if minimize else "maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=self.config.startup_trials),
        )
        self.interrupted = self.in_state(TrialState.RUNNING)  # left by an earlier start
        self.jobs: list[Job] = []
        self.training: dict[str, _OpenTrial] = {}  # job name -> trial
        self.waiting: list[_OpenTrial] = []  # trials that wait for a running trial with the same settings
        self.pruned: dict[int, int] = {}  # trial number -> step at which the median pruner stopped it
        # failures of this start only: trials that failed in an earlier start are tried again
        self.failures: dict[tuple[str, int], str] = {}  # (trial name, seed) -> error
        self.failed_keys: set[str] = set()  # run keys of failed trials
        self.failed_count = 0

    def _variant(self) -> str:
        """Part of the study's name: a sweep with sequential seeds keeps its id if the search changes."""
        if not self.context.plan.sweep.is_sequential:
            return ""
        settings = self.config.model_dump_json(exclude={"trials", "metric"})
        return f" {hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    def run(self) -> None:
        """Run all trials to completion."""
        self._submit_trials()
        self.context.workers.work(self.jobs, self._on_evaluation)

    def best(self) -> Arm:
        """Arm with the settings of the best completed trial.

        Raises:
            TrainingError: no trial completed.
        """
        if not self.in_state(TrialState.COMPLETE):
            raise TrainingError("no trial of the search finished; the workers' logs say why")
        arm = self._arm(self.study.best_trial.user_attrs["settings"])
        return replace(arm, name=f"best {arm.name}")

    def in_state(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def _arm(self, values: Mapping[str, Any]) -> Arm:
        arm = with_overrides(self.baseline, self.config.settings | dict(values))
        return replace(arm, name=arm.config.arm_name())

    # ---------------------------------------------------------------- proposing and submitting

    def _submit_trials(self) -> None:
        """Submit waiting and new trials until every worker has one or no trial is left."""
        waiting, self.waiting = self.waiting, []
        for trial in waiting:
            self._submit(trial)
        while len(self.training) < self.context.plan.sweep.jobs and self.failed_count < self.config.trials:
            if self.interrupted:
                self._submit(self._resume(self.interrupted.pop(0)))
            elif len(self.in_state(*EVALUATED, TrialState.RUNNING)) < self.config.trials:
                self.study.sampler = self._sampler(len(self.study.get_trials(deepcopy=False)))
                self._submit(self._open(self.study.ask(), {}))
            else:
                break

    def _resume(self, interrupted: FrozenTrial) -> _OpenTrial:
        """Reopen an interrupted trial with the values that it had drawn and reported."""
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        self.study.sampler = self._sampler(interrupted.number)  # for values not drawn yet
        trial = Trial(self.study, self.storage.get_trial_id_from_study_id_trial_number(study_id, interrupted.number))
        return self._open(trial, dict(interrupted.intermediate_values))

    def _open(self, trial: Trial, values: dict[int, float]) -> _OpenTrial:
        settings = {key: _suggest(trial, key, space) for key, space in self.config.space.items()}
        arm = self._arm(settings)
        run_key = arm.at(self.config.seed).fingerprint(self.context.data_digest)
        trial.set_user_attr("settings", settings)
        trial.set_user_attr("run_key", run_key)
        return _OpenTrial(trial, arm, run_key, values)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Sampler seeded by the trial's number, so that a resumed search draws the same values."""
        seed = int(np.random.SeedSequence((self.config.seed, number)).generate_state(1)[0])
        return optuna.samplers.TPESampler(n_startup_trials=self.config.startup_trials, seed=seed, constant_liar=True)

    def _submit(self, trial: _OpenTrial) -> None:
        """Train the trial, or reuse the outcome of an earlier trial with the same settings, once it is known."""
        if any(other.run_key == trial.run_key for other in self.training.values()):
            self.waiting.append(trial)
        elif outcome := self._outcome_of(trial.run_key):
            self._record(trial, outcome)
        else:
            tags = {"role": TRIAL, "trial": str(trial.trial.number)}
            request = self.context.train_request(trial.arm, self.config.seed, tags, watched=self.metric)
            self.training[trial.name] = trial
            self.jobs.append(Job(trial.name, request, finished=self._on_end))

    def _outcome_of(self, run_key: str) -> _Outcome | None:
        """Outcome of the run with this key; None if it has to be trained."""
        for trial in self.in_state(*EVALUATED):
            if trial.user_attrs.get("run_key") == run_key:
                return _Outcome(trial.state, trial.value if trial.state == TrialState.COMPLETE else None)
        return _Outcome(TrialState.FAIL) if run_key in self.failed_keys else None

    # ---------------------------------------------------------------- results

    def _on_evaluation(self, job: Job, evaluated: Evaluated) -> None:
        """Report the evaluation to Optuna, and prune the trial if it is worse than the median of the others."""
        trial = self.training[job.name]
        if evaluated.step not in trial.values:  # a resumed run repeats its earlier evaluations
            trial.values[evaluated.step] = evaluated.value
            trial.trial.report(evaluated.value, evaluated.step)
        if trial.trial.number not in self.pruned and trial.trial.should_prune():
            self.pruned[trial.trial.number] = evaluated.step
            self.context.workers.stop(job)

    def _on_end(self, job: Job) -> None:
        trial = self.training.pop(job.name)
        step = self.pruned.get(trial.trial.number)
        if error := job.error or (None if trial.values else f"no evaluation of it has {self.metric}"):
            outcome, line = _Outcome(TrialState.FAIL), f"failed: {error}"
            self.failures[trial.name, self.config.seed] = error
            self.failed_keys.add(trial.run_key)
        else:
            assert isinstance(job.reply, RunTrained)
            if step is not None and job.reply.stopped:
                outcome, value = _Outcome(TrialState.PRUNED), trial.values[max(trial.values)]
                line = f"{self.metric} {value:.4f}, stopped by the median of the others at step {step}"
                tag_run(job.reply.run_id, {"pruned": str(step)})
            else:
                value = self.best_of(trial.values.values())
                outcome = _Outcome(TrialState.COMPLETE, value)
                line = f"{self.metric} {value:.4f}, {job.reply.seconds:.0f} s"
        info(f"{job.name}: {line}")
        self._record(trial, outcome)
        self._submit_trials()

    def _record(self, trial: _OpenTrial, outcome: _Outcome) -> None:
        self.study.tell(trial.trial, outcome.value, state=outcome.state)
        self.failed_count += outcome.state == TrialState.FAIL


def _suggest(trial: Trial, key: str, space: SpaceConfig) -> Any:
    if space.choices is not None:
        return space.choices[trial.suggest_categorical(key, range(len(space.choices)))]
    assert space.low is not None
    assert space.high is not None
    if space.integer:
        return trial.suggest_int(key, int(space.low), int(space.high), log=space.log)
    return trial.suggest_float(key, space.low, space.high, log=space.log)
