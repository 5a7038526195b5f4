"""Train and track one run, given a validated config."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.compute import distributed
from pipeline.compute.compilation import check_compiler
from pipeline.compute.device import amp_warning, precision, resolve_device
from pipeline.config.run_config import RunConfig
from pipeline.errors import UserError
from pipeline.names import LAST_KEPT, LAUNCHED, WEIGHTS_DIGEST
from pipeline.runs.earlier_runs import EarlierRun
from pipeline.runs.machine_errors import explained, one_line_machine_errors
from pipeline.runs.resume import fork, identity_tags, newest_state, restore, use_first_threads
from pipeline.runs.run_artifacts import headline, log_description, log_results
from pipeline.runs.run_start import RunStart, open_run
from pipeline.runs.shared_prefix import start_from_prefix
from pipeline.runs.source_changes import log_source_changes
from pipeline.runtime import process_rank
from pipeline.runtime.console import Console, info, warn
from pipeline.tasks.base import Task, predictor_module, undefined
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun, end_early
from pipeline.tracking.run import MemoryRun, Run
from pipeline.tracking.writer_client import Writer
from pipeline.training.loop import Training, Watch, count_steps
from pipeline.training.saver import Saver

TORCH_THREADS = torch.get_num_threads()  # torch's default: the number of cores, or OMP_NUM_THREADS

TaskFactory = Callable[[Any], Task[Any]]


@dataclass(frozen=True)
class Trained:
    """The outcome of a run."""

    id: str
    name: str
    tracking_uri: str | None  # None: nothing was tracked
    metrics: Mapping[str, float]  # the last value of every evaluation metric
    steps: int = 0  # completed optimizer steps, including earlier starts; 0: nothing was left to train
    weights_digest: str = ""  # of the last weights


def launch(config: RunConfig, make_task: TaskFactory, overrides: frozenset[str], writer: Writer | None) -> None:
    """Train one run; under `mlflow run`, use the run that it opened. Without a writer nothing is tracked."""
    if not process_rank.is_main_process():
        follow(config, make_task, overrides)
        return
    request = RunRequest(run_id=os.environ.get("MLFLOW_RUN_ID"))
    trained = train_run(config, make_task, writer, request, given=overrides)
    info(f"\n{trained.name}\n{headline(trained.metrics, config.headline)}")
    if trained.tracking_uri:
        info(f"run {trained.id} in {trained.tracking_uri}\nnext: make ui opens MLflow on it")


@one_line_machine_errors()
def train_run(
    config: RunConfig,
    make_task: TaskFactory,
    writer: Writer | None,
    request: RunRequest | None = None,
    *,
    given: frozenset[str] = frozenset(),
    prefix: Path | None = None,
    watch: Watch | None = None,
    quiet: bool = False,
) -> Trained:
    """Load the data, open the run, train, and log the results. Without a writer nothing is tracked.

    Args:
        request: how to open the run; name, experiment and tags are completed from config and data.
        given: dotted keys that the user overrode.
        prefix: a folder written by `train_prefix`, whose state this run starts from.
        watch: see `Training`.
        quiet: do not show steps on the console.
    """
    if writer is None and (config.resume or config.fork):
        raise UserError("resume and fork need tracking.enabled: true; without it nothing of a run is kept")
    distributed.init(device := prepare_torch(config))
    task = _load_task(config, make_task, given)
    config = task.config
    identity = identity_tags(config, task.dataset.digest)
    request = request or RunRequest()
    request = replace(request, name=request.name or config.name(), experiment=config.experiment,
                      tags=identity | dict(request.tags))  # fmt: skip
    opened = open_run(config, writer, request, identity)
    if isinstance(opened, EarlierRun):
        distributed.check_same(None)
        return _already_trained(opened, request.run_id or request.launcher)
    run = opened.run
    with _ending_early(run):
        training = _prepared(opened, task, identity, device, given, prefix=prefix, watch=watch, quiet=quiet)
        result = training.train()
        try:
            log_results(run, task, training, device)
        except KeyboardInterrupt:
            training.save_interrupted()
            raise
    run.finish("FINISHED")
    uri = run.tracking_uri if isinstance(run, MlflowRun) else None
    return Trained(run.id, run.name, uri, result.metrics, result.steps, weights_digest=result.weights_digest)


def follow(config: RunConfig, make_task: TaskFactory, overrides: frozenset[str]) -> None:
    """Train as a rank other than 0, without tracking; see `pipeline.compute.distributed`."""
    distributed.init(device := prepare_torch(config))
    task = _load_task(config, make_task, overrides)
    run = MemoryRun()
    try:
        training = Training(task, run, Console(0, quiet=True), device, saver=Saver(None, files=task.files))
        if _synchronise(training, identity_tags(task.config, task.dataset.digest)):
            training.train()
    finally:
        run.discard()


def prepare_torch(config: RunConfig) -> str:
    """Set the number of CPU threads; returns the device.

    Raises:
        UserError: the device does not exist, or the config needs a compiler that does not.
    """
    torch.set_num_threads(config.training.threads or max(1, TORCH_THREADS - 1))
    device = resolve_device(config.device)
    if config.training.compile:
        check_compiler(device)
    return device


def _load_task(config: RunConfig, make_task: TaskFactory, overrides: frozenset[str]) -> Task[Any]:
    """Create the task and load its data.

    Raises:
        UserError: evaluation.metric does not exist, or is undefined on this data although the config relies on it; or
            the task has no module `predict`, which its logged model needs.
    """
    task = make_task(config)
    chosen = config if "evaluation.metric" in overrides else task.config
    reason = undefined(task, "evaluation.metric", chosen.evaluation.metric)
    if reason and config.relies_on_metric(overrides):
        raise UserError(f"evaluation.metric: {reason}; allowed: a metric that these data define")
    if config.tracking.log_model:
        predictor_module(task)  # refused now instead of after the training
    return task


def _prepared(
    opened: RunStart, task: Task[Any], identity: Mapping[str, str], device: str, overrides: frozenset[str], *,
    prefix: Path | None, watch: Watch | None, quiet: bool,
) -> Training:  # fmt: skip
    """Create the `Training`, at step 0 or with the state of an earlier start, another run or a shared prefix."""
    run, config = opened.run, task.config
    if generated := config.embedded():
        info(generated)
    tracked = run if isinstance(run, MlflowRun) else None
    state = newest_state(tracked) if tracked and opened.resumed else None
    run.set_tags(config.operational(overrides) | {"precision": precision(config.training.amp, device)})
    if tracked and opened.resumed and state is None:
        use_first_threads(tracked)
    if state is None:
        log_description(run, task, overrides)
    total_steps = _announce(run, task, device, overrides)
    if state is None:
        log_source_changes(run, config.tracking.log_diff)
    facts = {"task": config.task, "config_digest": config.fingerprint(), "data_digest": identity["data_digest"],
             "torch": torch.__version__}  # fmt: skip
    saver = Saver(tracked, config.checkpoint, facts, task.files)
    training = Training(task, run, Console(total_steps, quiet), device, watch=watch, saver=saver)
    if state:
        restore(training, state)
        info(f"{run.name}: continues after step {state.step} of {total_steps}")
        run.set_tags({"resumed_at": str(state.step)})
        _repeat_evaluations(run, training, watch)
    elif tracked and opened.origin:
        fork(training, tracked, opened.origin)
    elif prefix:
        start_from_prefix(training, prefix)
    if process_rank.world_size() > 1:
        run.set_tags({"processes": str(process_rank.world_size())})
        _synchronise(training, identity)
    return training


def _synchronise(training: Training, identity: Mapping[str, str]) -> bool:
    """Load the state of rank 0; returns False if there is nothing to train.

    Raises:
        UserError: the processes differ in config, data, precision or torch version.
    """
    facts = {name: identity[name] for name in ("task", "data_digest", "run_key")}
    facts |= {"training.amp": precision(training.config.training.amp, training.device), "torch": torch.__version__}
    if not distributed.check_same(facts):
        return False
    state = distributed.broadcast(lambda: training.state() | {"threads": torch.get_num_threads()})
    if not process_rank.is_main_process():
        torch.set_num_threads(state["threads"])
        training.load_state(state)
    return True


def _announce(run: Run, task: Task[Any], device: str, overrides: frozenset[str]) -> int:
    """Print what will be trained, with warnings; returns the number of optimizer steps."""
    config, total_steps = task.config, count_steps(task)
    announce_epochs(config, overrides)
    if reason := undefined(task, "evaluation.metric", config.evaluation.metric):
        warn(f"evaluation.metric: {reason}; {LAST_KEPT}")
    slow = amp_warning(config.training.amp, device)
    for warning in [*config.warnings(overrides), *task.warnings(total_steps), *([slow] if slow else [])]:
        warn(warning)
    info(f"{run.name}: {total_steps} steps on {device}")
    for name, value in task.summary().items():
        info(f"  {name} {value}")
    return total_steps


def announce_epochs(config: RunConfig, overrides: frozenset[str]) -> None:
    epochs = config.training.num_train_epochs
    if "training.num_train_epochs" in overrides:
        warn(f"Using epochs from command line: {epochs} (overrides config)")
    else:
        info(f"Using epochs from config: {epochs}")


def _repeat_evaluations(run: Run, training: Training, watch: Watch | None) -> None:
    """Call `watch` with the evaluations of earlier starts."""
    for step, metrics in run.history() if watch else ():
        if watch and step <= training.evaluated_at and any(name.startswith("valid/") for name in metrics):
            watch(step, metrics)


def _already_trained(earlier: EarlierRun, launcher: str | None) -> Trained:
    """Report a run that is already trained; deliver the rest of its journal if necessary."""
    from pipeline.tracking.store import tracking_uri
    from pipeline.tracking.stored_runs import tag_run
    from pipeline.tracking.sync import sync

    if launcher and launcher != earlier.run_id:
        tag_run(launcher, {"role": "launcher", LAUNCHED: earlier.run_id})
    if earlier.finished:
        info(f"{earlier.name}: run {earlier.run_id} is finished already; nothing is trained (without resume a new run "
            "is)")  # fmt: skip
    else:
        info(f"{earlier.name}: run {earlier.run_id} is trained already; delivering the rest of {earlier.folder}")
        sync(earlier.folder)
    digest = earlier.tags.get(WEIGHTS_DIGEST, "")
    return Trained(earlier.run_id, earlier.name, tracking_uri(), earlier.metrics, weights_digest=digest)


@contextmanager
def _ending_early(run: Run) -> Iterator[None]:
    """After an error, end the run as FAILED or KILLED, and print how to resume it."""
    try:
        yield
    except BaseException as error:
        status = end_early(run, explained(error))
        if process_rank.world_size() > 1 and isinstance(error, KeyboardInterrupt):
            info("torchrun stops all its processes when one of them has ended: its report names that one")
        if isinstance(run, MlflowRun) and not run.lost:
            info(f"{run.name}: run {run.id} is {status}; the same command with resume=auto continues it")
        raise
