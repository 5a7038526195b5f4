"""`sweep`: train a baseline and arms with every seed, one unnested MLflow run each, and report a verdict.

This process plans the runs, submits them as jobs to workers (`worker.py`), and compares the results. Existing runs are
found in the tracking store by their run key, so the same command resumes an interrupted sweep.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import TrainingError, UserError
from pipeline.runtime.console import info, warn
from pipeline.runtime.gpus import visible_gpus
from pipeline.runtime.importing import import_reference
from pipeline.sweeps.arm_runs import ArmRuns
from pipeline.sweeps.data_check import check_data
from pipeline.sweeps.jobs import SweepContext, Workers
from pipeline.sweeps.local_workers import LocalWorkers
from pipeline.sweeps.sweep_config import SweepConfig
from pipeline.sweeps.sweep_plan import Plan, resolve
from pipeline.tasks.registry import ROOT, config_class
from pipeline.tracking.store import check_uri


def sweep(config: SweepConfig, file: Path, typed: Mapping[str, str]) -> None:
    """Train the missing runs of the sweep, compare all runs, and store the report in the summary run.

    Raises:
        UserError: the sweep file or a setting is invalid.
        TrainingError: some runs failed; the others are compared.
    """
    check_uri()
    plan = resolve(config, file, config_class(config.task), [Path(), file.parent, ROOT], typed)
    for warning in _warnings(plan):
        warn(warning)
    if not plan.baseline.config.tracking.enabled:
        raise UserError(f"{file}: tracking.enabled is false, allowed: true (a sweep compares what is in MLflow)")
    if any(arm.config.resume or arm.config.fork for arm in plan.arms):
        raise UserError(f"{file}: resume and fork are for single runs; the same command resumes a sweep")
    if config.engine == "ray" and any(arm.config.training.threads is None for arm in plan.arms):
        raise UserError(f"{file}: training.threads is null, allowed with engine ray: a number (of CPUs for a run)")
    folder = Path(plan.baseline.config.output_dir) / "sweeps" / plan.identity()
    if config.plan:
        from pipeline.sweeps.planning import print_plan

        print_plan(plan, folder)
        return
    with _locked(folder):
        from pipeline.tracking.writer_client import Writer

        workers = _start_workers(config, folder, plan)
        try:
            with Writer() as writer:
                _train_and_compare(plan, folder, workers, writer)
        finally:
            workers.close()


def _start_workers(config: SweepConfig, folder: Path, plan: Plan) -> Workers:
    if config.engine == "local":
        on_gpu = any(arm.config.device != "cpu" for arm in plan.arms)
        return LocalWorkers(config.jobs, folder, visible_gpus() if on_gpu else ())
    from pipeline.sweeps.ray_workers import RayWorkers

    return RayWorkers(config.jobs, folder, config.ray_address)


def _train_and_compare(plan: Plan, folder: Path, workers: Workers, writer: Any) -> None:
    with ThreadPoolExecutor(1) as pool:  # import mlflow while the workers load the data: both take seconds
        claim = pool.submit(lambda: import_reference("pipeline.sweeps.summary_run:claim_launcher")(folder.name))
        plan, data_digest = check_data(plan, workers)
        claim.result()
    from pipeline.sweeps.growth import grown, with_known_name
    from pipeline.sweeps.summary_run import SummaryRun, equal_runs, stored_sweep

    sweep_id, settings = plan.identity(data_digest), plan.sweep
    if generated := plan.baseline.config.embedded():  # all arms have the same data
        info(generated)
    seeds = " to ".join(map(str, dict.fromkeys((settings.looks[0], settings.looks[-1]))))
    info(f"sweep {sweep_id}: {len(plan.arms)} arms x {seeds} seeds, {settings.jobs} at a time")
    stored = stored_sweep(sweep_id)
    if not settings.search:
        grown(stored.families, plan)  # an arm that the sweep cannot have is refused before a run is opened
    summary = SummaryRun.open(writer, plan, folder.name, data_digest, stored.summary)
    try:
        equal = equal_runs(plan, data_digest)
        context = SweepContext(sweep_id, data_digest, plan, folder, workers, stored.by_key, equal)
        failures: dict[tuple[str, int], str] = {}
        if settings.search:
            from pipeline.sweeps.search import search

            plan, failures = search(context, partial(with_known_name, stored.families))
            context = replace(context, plan=plan)
        families = grown(stored.families, plan)
        summary.record_families(families)
        start = time.perf_counter()
        runs = ArmRuns(context)
        if settings.is_sequential:  # as many runs as decide the arms
            from pipeline.sweeps.rounds import train_in_rounds

            train_in_rounds(plan, families, runs)
        else:
            runs.train(plan.arms, settings.all_seeds)
        runs.report_cost(time.perf_counter() - start)
        if remark := equal.note():
            info(remark)
        failures |= runs.failures
        summary.conclude(plan, folder, failures, remark)
    except BaseException as error:
        workers.close()
        summary.abandon(error)
        raise
    if failures:
        raise TrainingError(f"{len(failures)} of {runs.total} runs failed; the same command tries them again")
    shutil.rmtree(runs.prefix_folder, ignore_errors=True)


def _warnings(plan: Plan) -> Iterator[str]:
    """Warnings about likely mistakes in the settings, each yielded once and naming the arms concerned."""
    yield from plan.notes
    arms: dict[str, list[str]] = {}
    for arm in plan.arms:
        for warning in arm.config.warnings(arm.overridden):
            arms.setdefault(warning, []).append(arm.name)
    for warning, names in arms.items():
        yield warning if len(names) == len(plan.arms) else f"{', '.join(names)}: {warning}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the sweep's lock. Refuse to start while another process runs the same sweep."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"), blocking=False, fallback_to_soft=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        acquired = lock.acquire()
    except Timeout:
        message = f"this sweep is already running (it holds {lock.lock_file}); wait until it ends, or stop it"
        raise UserError(message) from None
    except OSError as error:
        raise UserError(f"output_dir {folder.parent}: {error.strerror or error}") from None
    with acquired:
        yield
