"""Arms found rather than listed: Optuna proposes settings, the best one is then compared to the baseline.

Trials are runs of one seed, judged on validation. The winner of many trials looks better than it is, so its trial is
no evidence: the sweep runs it again on seeds that had no say in the choice.

With the study on PostgreSQL several processes do this at once. What they know of each other is in the study: a trial is
RUNNING for one process, which trains it, or waits for the trial that trains the same setting.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.config import nearest, to_yaml
from pipeline.console import say
from pipeline.errors import TrainingError, UserError
from pipeline.interrupts import check
from pipeline.journal import Record
from pipeline.ownership import Ownership, alive_owner
from pipeline.study import BEGUN, FAILED, RETRIES, Away, is_retry, storage_of, try_again
from pipeline.summary import known_runs
from pipeline.sweep import Job, Sweep, resumed
from pipeline.sweep_config import SearchConfig, SpaceConfig
from pipeline.sweep_plan import Arm, Plan, controls_of, overridden
from pipeline.tracking.reading import StoredRun, end_run, set_tags

TRIAL = "trial"  # the role of these runs: no comparison takes them for arms
TRAINS = "trains"  # of a trial: it is the one of its setting that is trained; the others wait for it
POLL_SECONDS = 1.0  # between two looks at what other processes have done
LEAVE_SECONDS = 2.0  # that a process which is asked to end has to give its trials back
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


def search(sweep: Sweep, known: Mapping[str, StoredRun]) -> Plan:
    """Run what is missing of the trials; returns the plan that compares the best of them to the baseline.

    known: by run key. Where other processes are at the search, it returns when the trials of all are done.

    Raises:
        UserError: the study's server does not let us in.
        TrainingError: no trial finished.
    """
    config = sweep.plan.sweep.search
    assert config
    trials = _Trials(sweep, config, known)
    trials.run()
    best = trials.best()
    sweep.progress.failed |= trials.failed()
    say(f"best of {trials.count(*DONE)} trials on {trials.metric} (seed {config.seed}): {best.name}")
    found = (best, *(controls_of([best]) if sweep.plan.sweep.controls == "reweight" else ()))
    return replace(sweep.plan, arms=(sweep.plan.baseline, *found))


@contextmanager
def the_one_to_compare(folder: Path) -> Iterator[bool]:
    """True for one of the processes that come here with the sweep's folder, until it is done or dead."""
    mine = None
    if alive_owner(folder) is None:
        try:
            mine = Ownership(folder)
        except UserError:
            if alive_owner(folder) is None:  # it cannot be written
                raise
    try:
        yield mine is not None
    finally:
        if mine:
            mine.release()


@dataclass(frozen=True)
class _Asked:
    """A trial that is this process' to bring to an end."""

    trial: Trial
    arm: Arm
    key: str  # of its run


class _End(NamedTuple):
    """How the trial of a setting ended."""

    state: TrialState
    value: float | None = None
    why: str | None = None  # a training that failed


class _Trials:
    """The study and its runs."""

    def __init__(self, sweep: Sweep, config: SearchConfig, known: Mapping[str, StoredRun]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.config, self.known = sweep, config, known
        evaluation = sweep.plan.baseline.config.evaluation
        self.metric = config.metric or evaluation.metric
        less = (config.mode or evaluation.mode) == "min"
        url = config.storage.get_secret_value() if config.storage else None
        self.storage = storage_of(url, config.grace_seconds, sweep.folder)
        make = partial(
            optuna.create_study,
            storage=self.storage.base,
            study_name=f"{sweep.id} {self.metric}",
            load_if_exists=True,
            direction="minimize" if less else "maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=config.startup_trials),
        )
        self.study = self.storage.insist(make)
        self.better = min if less else max
        self.jobs: list[Job] = []
        self.training: dict[str, _Asked] = {}  # by the name of their job
        self.waiting: list[_Asked] = []  # for another trial, or another process, at the same run
        self.broken = 0
        self.values: dict[int, list[float]] = {}
        self.pruned: dict[int, int] = {}  # trial -> the step of the evaluation at which the median stopped it
        # failures of an earlier start: tried again, should they be proposed again
        self.forgiven = {trial.number for trial in self._trials(TrialState.FAIL)}
        self.lost: dict[int, FrozenTrial] = {}  # found to have died too often
        self.hopeless: set[int] = set()  # of these, what was told
        self.looked_at = float("-inf")

    def run(self) -> None:
        """Until the trials are done, by whichever process."""
        told = False
        try:
            while not self._all_done():
                self._advance()
                if self.training:
                    self.sweep.crew.work(self.jobs, self._told)
                elif not self._all_done():
                    if not told:
                        say("waiting for the trials of other processes")
                    told = True
                    _sleep(POLL_SECONDS)
        except BaseException:
            self._leave()
            raise
        finally:
            self.storage.close()

    def best(self) -> Arm:
        """The setting of the best trial that was trained to its end."""
        if not self._trials(TrialState.COMPLETE):
            raise TrainingError("no trial of the search finished; the workers' logs say why")
        best = self.storage.insist(lambda: self.study.best_trial)
        arm = self._arm(best.user_attrs["settings"])
        return replace(arm, role="arm", name=f"best {arm.name}")

    def failed(self) -> dict[tuple[str, int], str]:
        """Why trainings failed since this start, by the name of their trial, in whichever process."""
        found = {
            _name(trial.number, self._arm(trial.user_attrs["settings"])): trial.user_attrs[FAILED]
            for trial in self._trials(TrialState.FAIL)
            if trial.number not in self.forgiven and FAILED in trial.user_attrs and trial.user_attrs[TRAINS]
        }
        return {(name, self.config.seed): why for name, why in found.items()}

    def count(self, *states: TrialState) -> int:
        return len(self._trials(*states))

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.storage.insist(lambda: self.study.get_trials(deepcopy=False, states=states))

    def _arm(self, values: Mapping[str, Any]) -> Arm:
        arm = overridden(self.sweep.plan.baseline, self.config.settings | dict(values), TRIAL)
        return replace(arm, name=arm.config.arm_name())

    def _all_done(self) -> bool:
        if self.training or self.waiting:
            return False
        given_up = self.broken >= self.config.trials and not self.count(TrialState.RUNNING)
        return given_up or self.count(*DONE) >= self.config.trials

    # ---------------------------------------------------------------- what there is to do

    def _advance(self) -> None:
        """Settle what waited for others, and take trials until every worker has one or there is none to take."""
        self.looked_at = time.monotonic()
        waiting, self.waiting = self.waiting, []
        for asked in waiting:
            self._place(asked)
        while len(self.training) < self.sweep.plan.sweep.jobs and self.broken < self.config.trials:
            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # stopped for long, and taken for dead
                new = self.storage.insist(self._ask)
                if new is None:
                    break
                self._place(new)
        self._end_hopeless()

    def _ask(self) -> _Asked | None:
        """One more trial, or one whose process died; None if there are enough."""
        with self.storage.asking():
            self.storage.end_dead(self.study)
            hopeless = try_again(self.study)
            self.lost = {trial.number: trial for trial in hopeless if trial.number not in self.hopeless}
            trials = self.study.get_trials(deepcopy=False)
            if sum(trial.state in (*DONE, TrialState.RUNNING) for trial in trials) >= self.config.trials:
                return None
            self.study.sampler = self._sampler(len(trials))
            trial = self.study.ask()
            try:
                self.storage.keep(self.study, trial.number)
                settings = {key: _suggest(trial, key, space) for key, space in self.config.space.items()}
                arm = self._arm(settings)
                key = arm.at(self.config.seed).fingerprint(self.sweep.digest)
                for name, value in {"settings": settings, "run_key": key, TRAINS: False, BEGUN: trial.number}.items():
                    trial.set_user_attr(name, value)
            except BaseException:
                self.storage.drop(trial.number)
                raise
        return _Asked(trial, arm, key)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Draws of its own for each trial: the same whichever process asks, and not those of an earlier start."""
        seed = int(np.random.SeedSequence((self.config.seed, number)).generate_state(1)[0])
        return optuna.samplers.TPESampler(n_startup_trials=self.config.startup_trials, seed=seed, constant_liar=True)

    def _place(self, asked: _Asked) -> None:
        """Train the trial, or let it wait for the one that trains the same setting, or give it that one's end."""
        try:
            end = self.storage.insist(partial(self._claim, asked))
        except optuna.exceptions.UpdateFinishedTrialError:  # while it waited we were taken for dead
            self.storage.drop(asked.trial.number)
            return
        if isinstance(end, _End):
            self._tell(asked.trial, end)
            return
        begun = self._begun(asked) if end is None else None
        if end is False or (begun and _is_alive(begun)):
            self.waiting.append(asked)
            return
        job = self._job(asked, begun)
        self.training[job.name] = asked
        self.jobs.append(job)

    def _claim(self, asked: _Asked) -> _End | bool | None:
        """How the setting's trial ended; False while another trains it; None: it is ours to train."""
        with self.storage.asking():
            same = [trial for trial in self.study.get_trials(deepcopy=False)
                    if trial.user_attrs.get("run_key") == asked.key and trial.number != asked.trial.number]  # fmt: skip
            for trial in same:
                if trial.state in DONE:
                    return _End(trial.state, trial.value if trial.state == TrialState.COMPLETE else None)
                if trial.state == TrialState.FAIL and FAILED in trial.user_attrs and trial.number not in self.forgiven:
                    return _End(trial.state, why=trial.user_attrs[FAILED])
                at_it = trial.user_attrs.get(BEGUN) == trial.number and trial.user_attrs[TRAINS]
                if trial.state == TrialState.RUNNING and at_it:
                    return False
            asked.trial.set_user_attr(TRAINS, True)
        return None

    def _begun(self, asked: _Asked) -> StoredRun | None:
        """The run of this setting that is in MLflow, if any."""
        if self.storage.insist(lambda: is_retry(self.study, asked.trial.number)):
            return known_runs(self.sweep.id).by_key.get(asked.key)  # begun since we started, maybe
        return self.known.get(asked.key)

    def _job(self, asked: _Asked, begun: StoredRun | None) -> Job:
        config, arm, number = asked.arm.at(self.config.seed), asked.arm, asked.trial.number
        tags = {"sweep_id": self.sweep.id, "arm": arm.name, "role": TRIAL, "trial": str(number)}
        request: Record = {"do": "train", "entry": self.sweep.entry, "config": to_yaml(config), "tags": tags,
                           "name": arm.run_name(self.config.seed), "trunk": None, "given": sorted(arm.overridden),
                           "watched": self.metric}  # fmt: skip
        request |= resumed(begun)
        return Job(_name(number, arm), request, finished=self._finished)

    # ---------------------------------------------------------------- what came of it

    def _told(self, job: Job, news: Record) -> None:
        """An evaluation of a running trial: the median of the others decides whether it goes on."""
        trial = self.training[job.name].trial
        self.values.setdefault(trial.number, []).append(news["value"])

        def report() -> bool:
            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # others took us for dead: `_tell` says so
                trial.report(news["value"], news["evaluated"])
                return trial.number not in self.pruned and trial.should_prune()
            return False

        if self.storage.insist(report):
            self.pruned[trial.number] = news["evaluated"]
            self.sweep.crew.stop(job)
        if self.storage.shared and time.monotonic() > self.looked_at + POLL_SECONDS:
            self._advance()

    def _finished(self, job: Job) -> None:
        assert job.reply
        trial = self.training[job.name].trial
        values = self.values.get(trial.number, [])
        if not job.failed and not values:
            names = [name for name in job.reply["metrics"] if name.startswith("valid/")]
            raise UserError(f"search.metric {self.metric}: not among the metrics{nearest(self.metric, names[:12])}")
        step = self.pruned.get(trial.number)
        if job.failed:
            end = _End(TrialState.FAIL, why=job.failed)
            say(f"{job.name}: failed: {job.failed}")
        elif step is not None and job.reply["stopped"]:
            end = _End(TrialState.PRUNED)
            set_tags(job.reply["run_id"], {"pruned": str(step)})
            say(f"{job.name}: {self.metric} {values[-1]:.4f}, stopped by the median of the others at step {step}")
        else:
            end = _End(TrialState.COMPLETE, self.better(values))
            say(f"{job.name}: {self.metric} {end.value:.4f}, {job.reply['seconds']:.0f} s")
        del self.training[job.name]
        self._tell(trial, end)
        self._advance()

    def _tell(self, trial: Trial, end: _End) -> None:
        def tell() -> FrozenTrial:
            if end.why:
                with suppress(optuna.exceptions.UpdateFinishedTrialError):
                    trial.set_user_attr(FAILED, end.why)
            return self.study.tell(trial, end.value, state=end.state, skip_if_finished=True)

        told = self.storage.insist(tell)
        self.storage.drop(trial.number)
        self.broken += end.state == TrialState.FAIL
        if told.state != end.state:
            say(f"trial {trial.number}: this process gave no sign of life for {self.config.grace_seconds} s, so "
                "another has the trial, and finds its run finished")  # fmt: skip

    def _end_hopeless(self) -> None:
        """The runs of trials whose processes died again and again are nobody's."""
        for number, trial in self.lost.items():
            why = f"its process died {RETRIES + 1} times"
            say(f"trial {number}: {why}; it is left out")
            self.sweep.progress.failed[f"trial {number}", self.config.seed] = why
            run = known_runs(self.sweep.id).by_key.get(trial.user_attrs["run_key"])
            if run and run.status == "RUNNING" and not _is_alive(run):
                end_run(run.run_id, "FAILED")
            self.hopeless.add(number)
        self.lost = {}

    def _leave(self) -> None:
        """Others need not wait until they take our trials for dead. A server that is away is not waited for."""
        ours = [asked.trial.number for asked in (*self.training.values(), *self.waiting)]

        def give_back() -> None:
            with suppress(*Away, optuna.exceptions.UpdateFinishedTrialError):
                for number in ours:
                    self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

        if self.storage.shared:
            thread = threading.Thread(target=give_back, daemon=True)
            thread.start()
            thread.join(LEAVE_SECONDS)


def _name(number: int, arm: Arm) -> str:
    return f"trial {number}: {arm.name}"


def _is_alive(run: StoredRun) -> bool:
    """Another process writes the run."""
    folder = Path(run.tags.get("run_dir", ""))
    return "run_dir" in run.tags and folder.is_dir() and alive_owner(folder) is not None


def _sleep(seconds: float) -> None:
    check()
    time.sleep(seconds)
    check()


def _suggest(trial: Trial, key: str, space: SpaceConfig) -> Any:
    if space.choices is not None:
        return space.choices[trial.suggest_categorical(key, range(len(space.choices)))]
    assert space.low is not None
    assert space.high is not None
    if space.integer:
        return trial.suggest_int(key, int(space.low), int(space.high), log=space.log)
    return trial.suggest_float(key, space.low, space.high, log=space.log)
