"""Arms found rather than listed: Optuna proposes settings, the best one is then compared to the baseline.

Trials are runs of one seed, judged on validation. The winner of many trials looks better than it is, so its trial is
no evidence: the sweep runs it again on seeds that had no say in the choice.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.config import nearest, to_yaml
from pipeline.console import say
from pipeline.errors import TrainingError, UserError
from pipeline.journal import Record
from pipeline.sweep import Job, Sweep, resumed
from pipeline.sweep_config import SearchConfig, SpaceConfig
from pipeline.sweep_plan import Arm, Plan, controls_of, overridden
from pipeline.tracking.reading import StoredRun, set_tags

TRIAL = "trial"  # the role of these runs: no comparison takes them for arms


def search(sweep: Sweep, known: Mapping[str, StoredRun]) -> Plan:
    """Run what is missing of the trials; returns the plan that compares the best of them to the baseline.

    known: by run key.

    Raises:
        TrainingError: no trial finished.
    """
    config = sweep.plan.sweep.search
    assert config
    trials = _Trials(sweep, config, known)
    trials.run()
    best = trials.best()
    say(f"best of {len(trials.study.trials)} trials on {trials.metric} (seed {config.seed}): {best.name}")
    found = (best, *(controls_of([best]) if sweep.plan.sweep.controls == "reweight" else ()))
    return replace(sweep.plan, arms=(sweep.plan.baseline, *found))


class _Trials:
    """The study and its runs."""

    def __init__(self, sweep: Sweep, config: SearchConfig, known: Mapping[str, StoredRun]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.config, self.known = sweep, config, known
        evaluation = sweep.plan.baseline.config.evaluation
        self.metric = config.metric or evaluation.metric
        less = (config.mode or evaluation.mode) == "min"
        self.study = optuna.create_study(
            storage=f"sqlite:///{sweep.folder.resolve() / 'search.db'}",
            study_name=f"{sweep.id} {self.metric}",
            load_if_exists=True,
            direction="minimize" if less else "maximize",
            sampler=optuna.samplers.TPESampler(
                n_startup_trials=config.startup_trials, seed=config.seed, constant_liar=True
            ),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=config.startup_trials),
        )
        self.better = min if less else max
        self.trials: dict[str, Trial] = {}  # by the name of their job
        self.waiting: dict[str, list[Trial]] = {}  # run key -> trials of the run that was begun for the first of them
        self.broken = 0
        self.values: dict[int, list[float]] = {}
        self.pruned: dict[int, int] = {}  # trial -> the step of the evaluation at which the median stopped it
        # run key -> how the trial of this very setting ended, and its value
        self.ended = {trial.user_attrs["run_key"]: (trial.state, trial.value) for trial in self._complete()}

    def run(self) -> None:
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):  # cut off by a kill
            self.study.tell(trial.number, state=TrialState.FAIL)
            self.study.enqueue_trial(trial.params, skip_if_exists=False)
        self.jobs: list[Job] = []
        for _ in range(self.sweep.plan.sweep.jobs):
            self._next()
        self.sweep.crew.work(self.jobs, self._told)

    def best(self) -> Arm:
        """The setting of the best trial that was trained to its end."""
        if not self._complete():
            raise TrainingError("no trial of the search finished; the workers' logs say why")
        arm = self._arm(self.study.best_trial.user_attrs["settings"])
        return replace(arm, role="arm", name=f"best {arm.name}")

    def _complete(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def _arm(self, values: Mapping[str, Any]) -> Arm:
        arm = overridden(self.sweep.plan.baseline, self.config.settings | dict(values), TRIAL)
        return replace(arm, name=arm.config.arm_name())

    def _next(self) -> None:
        """Ask for one more trial until there are enough; a setting that was tried has its value at once."""
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        while len(self.study.get_trials(deepcopy=False, states=states)) < self.config.trials > self.broken:
            trial = self.study.ask()
            settings = {key: _suggest(trial, key, space) for key, space in self.config.space.items()}
            arm = self._arm(settings)
            key = arm.at(self.config.seed).fingerprint(self.sweep.digest)
            trial.set_user_attr("settings", settings)
            trial.set_user_attr("run_key", key)
            if key in self.ended:
                self._tell([trial], *self.ended[key])
            elif key in self.waiting:
                self.waiting[key].append(trial)  # the same run: what comes of it is this trial's too
            else:
                self.waiting[key] = [trial]
                self.jobs.append(self._job(trial, arm, key))
                return

    def _job(self, trial: Trial, arm: Arm, key: str) -> Job:
        config = arm.at(self.config.seed)
        tags = {"sweep_id": self.sweep.id, "arm": arm.name, "role": TRIAL, "trial": str(trial.number)}
        request: Record = {"do": "train", "entry": self.sweep.entry, "config": to_yaml(config), "tags": tags,
                           "name": arm.run_name(self.config.seed), "trunk": None, "given": sorted(arm.overridden),
                           "watched": self.metric}  # fmt: skip
        request |= resumed(self.known.get(key))
        job = Job(f"trial {trial.number}: {arm.name}", request)
        job.finished = partial(self._finished, trial, key)
        self.trials[job.name] = trial
        return job

    def _told(self, job: Job, news: Record) -> None:
        """An evaluation of a running trial: the median of the others decides whether it goes on."""
        trial = self.trials[job.name]
        self.values.setdefault(trial.number, []).append(news["value"])
        trial.report(news["value"], news["evaluated"])
        if trial.number not in self.pruned and trial.should_prune():
            self.pruned[trial.number] = news["evaluated"]
            self.sweep.crew.stop(job)

    def _finished(self, trial: Trial, key: str, job: Job) -> None:
        assert job.reply
        values = self.values.get(trial.number, [])
        if not job.failed and not values:
            names = [name for name in job.reply["metrics"] if name.startswith("valid/")]
            raise UserError(f"search.metric {self.metric}: not among the metrics{nearest(self.metric, names[:12])}")
        step = self.pruned.get(trial.number)
        if job.failed:
            self.ended[key] = (TrialState.FAIL, None)
            self.sweep.progress.failed[job.name, self.config.seed] = job.failed
            say(f"{job.name}: failed: {job.failed}")
        elif step is not None and job.reply["stopped"]:
            self.ended[key] = (TrialState.PRUNED, None)
            set_tags(job.reply["run_id"], {"pruned": str(step)})
            say(f"{job.name}: {self.metric} {values[-1]:.4f}, stopped by the median of the others at step {step}")
        else:
            value = self.better(values)
            self.ended[key] = (TrialState.COMPLETE, value)
            say(f"{job.name}: {self.metric} {value:.4f}, {job.reply['seconds']:.0f} s")
        self._tell(self.waiting.pop(key), *self.ended[key])
        self._next()

    def _tell(self, trials: list[Trial], state: TrialState, value: float | None = None) -> None:
        """The end of a run, to every trial of its setting."""
        for trial in trials:
            self.study.tell(trial, value, state=state)
            self.broken += state == TrialState.FAIL


def _suggest(trial: Trial, key: str, space: SpaceConfig) -> Any:
    if space.choices is not None:
        return space.choices[trial.suggest_categorical(key, range(len(space.choices)))]
    assert space.low is not None
    assert space.high is not None
    if space.integer:
        return trial.suggest_int(key, int(space.low), int(space.high), log=space.log)
    return trial.suggest_float(key, space.low, space.high, log=space.log)
