"""`sweep`: a baseline and arms, each with every seed, as flat runs that end in a verdict.

The sweep plans and collects; workers train (`worker.py`). Runs that are alike up to a gate share a prefix
(`runs/shared_prefix.py`). A run is known again by its key, so that a sweep that was cut off goes on where it was.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pipeline.config.strict_config import to_yaml
from pipeline.errors import TrainingError, UserError
from pipeline.names import COLORS, CONTROLLED, LAST_KEPT, TRUNK_FILES
from pipeline.runtime.console import say, warn
from pipeline.runtime.importing import import_reference
from pipeline.sweeps.jobs import Job, SweepContext, Workers, train_request
from pipeline.sweeps.local_workers import LocalWorkers
from pipeline.sweeps.requests import (
    DataDigest,
    DigestData,
    LoadModules,
    PrefixTrained,
    RunTrained,
    TrainPrefix,
    TrainRun,
)
from pipeline.sweeps.sweep_config import SweepConfig
from pipeline.sweeps.sweep_plan import Arm, Plan, resolve
from pipeline.tasks.registry import ROOT, TASKS
from pipeline.tracking.store import check_uri

if TYPE_CHECKING:
    from pipeline.tracking.messages import StoredRun


@dataclass
class Progress:
    """What came of the runs, and what was spent on them."""

    total: int
    done: dict[tuple[str, int], str] = field(default_factory=dict)  # (arm, seed) -> run id
    failed: dict[tuple[str, int], str] = field(default_factory=dict)  # -> why
    steps: int = 0  # of all runs that were trained now, as if each were alone
    trained: int = 0  # optimizer steps that were really made
    saved_seconds: float = 0.0


def sweep(config: SweepConfig, file: Path, typed: Mapping[str, str]) -> None:
    """Run what is missing of the sweep, compare, and leave the report in the summary run.

    Raises:
        UserError: the sweep file, or a setting.
        TrainingError: some runs failed; the others are compared.
    """
    check_uri()
    plan = resolve(config, file, import_reference(TASKS[config.task].config), [Path(), file.parent, ROOT], typed)
    for note in _warnings(plan):
        warn(note)
    if not plan.baseline.config.tracking.enabled:
        raise UserError(f"{file}: tracking.enabled is false, allowed: true (a sweep compares what is in MLflow)")
    if any(arm.config.resume or arm.config.fork for arm in plan.arms):
        raise UserError(f"{file}: resume and fork are of single runs; the same sweep again goes on by itself")
    if config.engine == "ray" and any(arm.config.training.threads is None for arm in plan.arms):
        raise UserError(f"{file}: training.threads is null, allowed with engine ray: a number (of CPUs for a run)")
    with _alone(plan):
        Sweep(plan).run()


class Sweep:
    """One sweep at work."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.entry = plan, plan.sweep.task
        self.folder = Path(plan.baseline.config.output_dir) / "sweeps" / plan.identity()
        self.progress = Progress(len(plan.sweep.seeds) * len(plan.arms))

    @property
    def colors(self) -> dict[str, str]:
        """A colour an arm, the same in MLflow's charts and in the report."""
        others = dict(zip((arm.name for arm in self.plan.arms[1:]), cycle(COLORS[1:]), strict=False))
        return {self.plan.baseline.name: COLORS[0]} | others

    def run(self) -> None:
        from pipeline.tracking.mlflow_run import Writer

        self.workers = self._workers()
        try:
            with Writer() as writer:
                self._run(writer)
        finally:
            self.workers.close()

    def _workers(self) -> Workers:
        settings = self.plan.sweep
        if settings.engine == "local":
            return LocalWorkers(settings.jobs, self.folder)
        from pipeline.sweeps.ray_workers import RayWorkers

        return RayWorkers(settings.jobs, self.folder, settings.ray_address)

    def _run(self, writer: Any) -> None:
        with ThreadPoolExecutor(1) as pool:  # mlflow takes seconds to import, and the data to load
            claimed = pool.submit(_claim_launcher, self.plan)
            self.digest = self._data_digest()
            claimed.result()
        from pipeline.sweeps.summary_run import Summary, known_runs

        self.id = self.plan.identity(self.digest)
        runs = known_runs(self.id)
        if generated := self.plan.baseline.config.embedded():  # all arms have the same data
            say(generated)
        say(f"sweep {self.id}: {len(self.plan.arms)} arms x {len(self.plan.sweep.seeds)} seeds, "
            f"{self.plan.sweep.jobs} at a time")  # fmt: skip
        summary = Summary(writer, self.plan, self.id, runs)
        try:
            if self.plan.sweep.search:
                from pipeline.sweeps.search import search

                context = SweepContext(self.id, self.digest, self.entry, self.plan, self.folder, self.workers)
                self.plan, failed = search(context, runs.by_key)
                self.progress.failed |= failed
                summary.plan = self.plan
                self.progress.total = len(self.plan.sweep.seeds) * len(self.plan.arms)
            started = time.perf_counter()
            self.workers.work(self.jobs(runs.by_key))
            self._tell_spent(time.perf_counter() - started)
            summary.conclude(self.folder, self.progress.failed)
            if not self.progress.failed:
                shutil.rmtree(self.folder / "trunks", ignore_errors=True)
        except BaseException as error:
            self.workers.close()
            summary.abandon(error)
            raise
        if self.progress.failed:
            raise TrainingError(f"{len(self.progress.failed)} of {self.progress.total} runs failed; the same command "
                                "tries them again")  # fmt: skip

    def _data_digest(self) -> str:
        """Load the arms' data and return their digest, once it is one and defines the metrics that the sweep needs."""
        jobs: dict[str, tuple[Arm, Job]] = {}
        first: dict[str, Job] = {}  # by the data, which it loads for those behind it
        for arm in self.plan.arms:
            data, deciding = _settings(arm, "data."), _settings(arm, "data.", "model.", "evaluation.")
            if deciding in jobs:  # the same data and metrics
                continue
            request = DigestData(self.entry, to_yaml(arm.config), self._metrics(arm))
            job = Job(f"data of {arm.name}", request, needs=first.get(data))
            first.setdefault(data, job)
            jobs[deciding] = arm, job
        spare = [Job("start", LoadModules()) for _ in range(self.plan.sweep.jobs - 1)]
        self.workers.work([job for _, job in jobs.values()] + spare)
        found: dict[str, str] = {}
        undefined: dict[tuple[str, str], Arm] = {}  # (key, why)
        for arm, job in jobs.values():
            if job.failed:
                raise UserError(job.failed)
            assert isinstance(job.reply, DataDigest)
            found.setdefault(job.reply.digest, arm.name)
            for key_and_reason in job.reply.undefined.items():
                undefined.setdefault(key_and_reason, arm)
        if len(found) > 1:
            (one, first_arm), (other, second_arm) = list(found.items())[:2]
            raise UserError(f"{first_arm} has data {one[:12]}..., {second_arm} has {other[:12]}...: a sweep is on one "
                            "data set")  # fmt: skip
        self._check_metrics(undefined)
        return next(iter(found))

    def _metrics(self, arm: Arm) -> dict[str, str]:
        """The metrics that the arm's runs must have, by the key that names them."""
        search, validated = self.plan.sweep.search, arm.config.evaluation.metric
        found = {"evaluation.metric": validated} | ({"search.metric": search.metric or validated} if search else {})
        return found | {"metric": self.plan.metric}

    def _check_metrics(self, undefined: Mapping[tuple[str, str], Arm]) -> None:
        """Refuse what the data leave undefined and the sweep needs; in place of a default on test goes validation's.

        Raises:
            UserError: names the key.
        """
        validated = self.plan.baseline.config.evaluation.metric
        replaceable = not self.plan.sweep.metric and "evaluation.metric" not in {key for key, _ in undefined}
        for (key, reason), arm in undefined.items():
            relied_on = {"evaluation.metric": arm.config.relies_on_metric(arm.overridden), "metric": not replaceable}
            if relied_on.get(key, True):
                raise UserError(f"{key}: {reason}; allowed: a metric that these data define")
        for key, reason in undefined:
            if key == "metric":
                say(f"{key}: {reason}; the verdict is about {validated}")
                self.plan = replace(self.plan, metric=validated)
            else:
                warn(f"{key}: {reason}; {LAST_KEPT}")

    def jobs(self, known: "Mapping[str, StoredRun]") -> list[Job]:
        """Trunks first, then the runs that are not finished. known: by run key."""
        trunks: list[Job] = []
        runs: list[Job] = []
        for seed in self.plan.sweep.seeds:
            missing = []
            for arm in self.plan.arms:
                run = known.get(arm.at(seed).fingerprint(self.digest))
                if run and run.status == "FINISHED":
                    self.progress.done[arm.name, seed] = run.run_id
                    say(f"{self._count()} {arm.run_name(seed)}: finished before (run {run.run_id})")
                else:
                    missing.append((arm, run))
            places = self._trunks([arm for arm, _ in missing], seed, trunks) if self.plan.sweep.share_prefix else {}
            runs += [self._run_job(arm, seed, run, places.get(arm.name)) for arm, run in missing]
        self.waiting = runs
        return trunks + runs

    def _trunks(self, arms: list[Arm], seed: int, jobs: list[Job]) -> dict[str, tuple[Path, int, Job | None]]:
        """Where each arm that shares its beginning branches: (folder, step, the job that makes it)."""
        groups: dict[str, list[tuple[Arm, int | None]]] = {}
        for arm in arms:
            config, step = arm.at(seed).trunk()
            key = config.fingerprint(f"{self.digest} {config.tracking} {config.device}")
            groups.setdefault(key, []).append((arm, step))
        found: dict[str, tuple[Path, int, Job | None]] = {}
        for key, members in groups.items():
            steps = sorted({step for _, step in members if step})
            sharing = [(arm, step) for arm, step in members if step != 0]
            folders = {step: self.folder / "trunks" / key[:16] / str(step) for step in steps}
            ready = all((folder / name).is_file() for folder in folders.values() for name in TRUNK_FILES)
            if not steps or (len(sharing) < 2 and not ready):
                continue
            job = None
            if not ready:
                config = sharing[0][0].at(seed).trunk()[0]
                states = {str(step): str(folder) for step, folder in folders.items()}
                request = TrainPrefix(self.entry, to_yaml(config), states)
                job = Job(f"trunk s{seed}", request, finished=partial(self._grown, len(sharing)))
                jobs.append(job)
            found |= {arm.name: (folders[step or steps[-1]], step or steps[-1], job) for arm, step in sharing}
        return found

    def _grown(self, members: int, job: Job) -> None:
        if job.failed:
            warn(f"{job.name}: {job.failed}; its runs are trained alone")
            for run in self.waiting:
                if run.needs is job and isinstance(run.request, TrainRun):
                    run.request = run.request.alone()
            return
        assert isinstance(job.reply, PrefixTrained)
        self.progress.trained += job.reply.steps
        self.progress.saved_seconds += (members - 1) * job.reply.seconds
        say(f"{job.name}: {job.reply.steps} steps that {members} runs share, {job.reply.seconds:.0f} s")

    def _run_job(
        self, arm: Arm, seed: int, begun: "StoredRun | None", place: tuple[Path, int, Job | None] | None
    ) -> Job:
        place_in_plan = [other.name for other in self.plan.arms].index(arm.name)
        tags = {"sweep_id": self.id, "arm": arm.name, "arm_number": str(place_in_plan), "role": arm.role,
                "mlflow.runColor": self.colors[arm.name]}  # fmt: skip
        if arm.control_of:
            tags["control_of"] = CONTROLLED.join(arm.control_of)
        if place:
            folder, step, _ = place
            tags |= {"branched_from": f"trunk {folder.parent.name}", "branch_step": str(step)}
        request = train_request(self.entry, arm, seed, tags, begun)
        request = replace(request, prefix=str(place[0]) if place else None)
        finished = partial(self._trained, (arm.name, seed), place[1] if place else 0)
        return Job(arm.run_name(seed), request, place[2] if place else None, finished)

    def _trained(self, key: tuple[str, int], branched_at: int, job: Job) -> None:
        if job.failed:
            self.progress.failed[key] = job.failed
            say(f"{self._count()} {job.name}: failed: {job.failed}")
            return
        assert isinstance(job.request, TrainRun)
        assert isinstance(job.reply, RunTrained)
        self.progress.done[key] = job.reply.run_id
        steps = job.reply.steps
        self.progress.steps += steps
        self.progress.trained += steps - (min(steps, branched_at) if job.request.prefix else 0)
        value = job.reply.metrics.get(self.plan.metric)
        shown = f"{self.plan.metric} {value:.4f}" if value is not None else f"no {self.plan.metric}"
        say(f"{self._count()} {job.name}: {shown}, {job.reply.seconds:.0f} s")

    def _count(self) -> str:
        return f"[{len(self.progress.done) + len(self.progress.failed)}/{self.progress.total}]"

    def _tell_spent(self, seconds: float) -> None:
        spent = self.progress
        if spent.steps:
            saved = max(0, spent.steps - spent.trained)
            say(f"trained {spent.trained:,} optimizer steps for runs of {spent.steps:,} in {seconds:.0f} s; sharing "
                f"beginnings saved {saved:,} steps, about {spent.saved_seconds:.0f} s of "
                "training")  # fmt: skip


def _settings(arm: Arm, *prefixes: str) -> str:
    return str({key: value for key, value in arm.config.decisive().items() if key.startswith(prefixes)})


def _claim_launcher(plan: Plan) -> None:
    from pipeline.sweeps.summary_run import claim_launcher

    claim_launcher(plan.identity())


def _warnings(plan: Plan) -> Iterator[str]:
    """What looks like a mistake, once for all the arms that it holds for."""
    yield from plan.notes
    found: dict[str, list[str]] = {}
    for arm in plan.arms:
        for warning in arm.config.warnings(arm.overridden):
            found.setdefault(warning, []).append(arm.name)
    for warning, arms in found.items():
        yield warning if len(arms) == len(plan.arms) else f"{', '.join(arms)}: {warning}"


@contextmanager
def _alone(plan: Plan) -> Iterator[None]:
    """Refuse to run beside another process that is at the same sweep."""
    folder = Path(plan.baseline.config.output_dir) / "sweeps"
    lock = FileLock(folder / f"{plan.identity()}.lock", blocking=False, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock.acquire()
    except Timeout:
        raise UserError(f"this sweep is already running (it holds {lock.lock_file}); wait for its end, or end it "
                        "first") from None  # fmt: skip
    except OSError as error:
        raise UserError(f"output_dir {folder}: {error.strerror or error}") from None
    with held:
        yield
