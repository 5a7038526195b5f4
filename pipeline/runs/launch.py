"""From a validated config to a finished, tracked run."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.compute import distributed as ranks
from pipeline.config.run_config import RunConfig
from pipeline.config.strict_config import to_yaml
from pipeline.errors import TrainingError, UserError
from pipeline.names import FORKED_FROM, LAST_KEPT, LAUNCHED, NOTE_LENGTH, THREADS
from pipeline.runs.resume import (
    Begun,
    begin_again,
    facts_of,
    find_begun,
    fork,
    newest_state,
    one_at_a_time,
    origin_of,
    restore,
)
from pipeline.runs.shared_prefix import branch
from pipeline.runtime import process_rank
from pipeline.runtime.console import Console, optional, say, warn
from pipeline.storage.checkpoints import Checkpoints, Generation
from pipeline.tasks.base import Task, evaluating, precision, undefined
from pipeline.tracking import plots
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MemoryRun, MlflowRun, Run, Writer, end_early
from pipeline.training.loop import Result, Training, Watch, amp_warning, count_steps, resolve_device
from pipeline.training.saver import Saver

MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")
TORCH_THREADS = torch.get_num_threads()  # what torch would take: the cores, or OMP_NUM_THREADS

TaskFactory = Callable[[Any], Task[Any]]


@dataclass(frozen=True)
class Trained:
    """What came of a run."""

    id: str
    name: str
    tracking_uri: str | None  # None: nothing was tracked
    metrics: Mapping[str, float]  # the last value of every evaluation metric
    steps: int = 0  # optimizer steps completed, by this start and those before
    before: bool = False  # an earlier start had finished it


def launch(config: RunConfig, make_task: TaskFactory, given: frozenset[str], writer: Writer | None) -> None:
    """Train one run, in the MLflow run that `mlflow run` opened if there is one. Without a writer none is tracked."""
    asked = RunRequest(run_id=os.environ.get("MLFLOW_RUN_ID"))
    if not process_rank.leads():
        follow(config, make_task, given)
        return
    trained = train_run(config, make_task, writer, asked, given=given)
    say(f"\n{trained.name}\n{headline(trained.metrics)}")
    if trained.tracking_uri:
        say(f"run {trained.id} in {trained.tracking_uri}\nnext: make ui opens MLflow on it")


@contextmanager
def _in_one_line() -> Iterator[None]:
    """What the machine refuses is told as the user's errors are."""
    try:
        yield
    except Exception as error:  # whatever it is: what is not the machine's goes on as it came
        told = explained(error)
        if told is error:
            raise
        raise told from error


def explained(error: BaseException) -> BaseException:
    """The error as the user's one line where the machine is what gave in: memory, or a disk."""
    if isinstance(error, UserError | KeyboardInterrupt):
        return error
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return TrainingError(f"out of memory: {text or 'an allocation failed'}; try a smaller training.batch_size, or "
                             "close what else runs")  # fmt: skip
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return TrainingError(f"{where}{error.strerror}")
    return error


@_in_one_line()
def train_run(
    config: RunConfig,
    make_task: TaskFactory,
    writer: Writer | None,
    asked: RunRequest | None = None,
    *,
    given: frozenset[str] = frozenset(),
    trunk: Path | None = None,
    watch: Watch | None = None,
    quiet: bool = False,
) -> Trained:
    """Load the data, open the run, train, and leave everything in it. Without a writer nothing is tracked.

    asked: what the run is opened with, beside what config and data say of it; `asked.resume` brings that run to its
    end. given: dotted keys that the user overrode. trunk: a folder of `branching.grow`, where this run starts. watch:
    see `Training`. quiet: no line a step.
    """
    if writer is None and (config.resume or config.fork):
        raise UserError("resume and fork need tracking.enabled: true; without it nothing of a run is kept")
    ranks.join(device := prepare_torch(config))
    task = _load(config, make_task, given)
    known_by = _known_by(config, task.dataset.digest)
    asked = asked or RunRequest()
    asked = replace(asked, name=asked.name or config.name(), experiment=config.experiment,
                    tags=known_by | dict(asked.tags))  # fmt: skip
    opened = _open(config, writer, asked, known_by)
    if isinstance(opened, Begun):
        ranks.agree(None)
        return _end_of(opened, asked.run_id or asked.launcher)
    run, resumed, origin = opened
    finished = False
    try:
        state = newest_state(run) if resumed and isinstance(run, MlflowRun) else None
        run.set_tags(config.operational(given) | {"precision": precision(config.training.amp, device)})
        if resumed and state is None and isinstance(run, MlflowRun):
            begin_again(run)
        if state is None:
            _describe(run, task, given)
        total_steps = _tell(run, task, device, given)
        saver = Saver(None, files=task.files)
        if isinstance(run, MlflowRun):
            saver = Saver(run, config.checkpoint, facts_of(config, known_by), task.files)
        training = Training(task, run, Console(total_steps, quiet), device, watch=watch, saver=saver)
        if state:
            restore(training, state)
            say(f"{run.name}: goes on after step {state.step} of {total_steps}")
            run.set_tags({"resumed_at": str(state.step)})
            _tell_evaluations(run, training, watch)
        elif origin and isinstance(run, MlflowRun):
            fork(training, run, origin)
        elif trunk:
            branch(training, trunk)
        if process_rank.size() > 1:
            run.set_tags({"processes": str(process_rank.size())})
            _meet(training, known_by)
        result = training.train()
        try:
            _leave(run, task, training, device)
        except KeyboardInterrupt:
            training.save_interrupted()
            raise
        finished = True
        run.finish("FINISHED")
    except BaseException as error:
        if not finished:
            _abandon(run, explained(error))
        raise
    uri = run.tracking_uri if isinstance(run, MlflowRun) else None
    return Trained(run.id, run.name, uri, result.metrics, result.steps)


def _load(config: RunConfig, make_task: TaskFactory, given: frozenset[str]) -> Task[Any]:
    """The task with its data.

    Raises:
        UserError: no evaluation gives evaluation.metric, or not of these data though the config relies on it.
    """
    task = make_task(config)
    reason = undefined(task, "evaluation.metric", config.evaluation.metric)
    if reason and config.relies_on_metric(given):
        raise UserError(f"evaluation.metric: {reason}; allowed: a metric that these data define")
    return task


def follow(config: RunConfig, make_task: TaskFactory, given: frozenset[str]) -> None:
    """Train with the other processes, of which rank 0 tracks: see `pipeline.compute.distributed`."""
    ranks.join(device := prepare_torch(config))
    task = _load(config, make_task, given)
    run = MemoryRun()
    try:
        training = Training(task, run, Console(0, quiet=True), device, saver=Saver(None, files=task.files))
        if _meet(training, _known_by(config, task.dataset.digest)):
            training.train()
    finally:
        run.discard()


def _meet(training: Training, known_by: Mapping[str, str]) -> bool:
    """Stand where rank 0 stands, with the other processes. False: there is nothing to train.

    Raises:
        UserError: they have another config, data or precision.
    """
    facts = {name: known_by[name] for name in ("task", "data_digest", "run_key")}
    facts |= {"training.amp": precision(training.config.training.amp, training.device), "torch": torch.__version__}
    if ranks.agree(facts) is None:
        return False
    state = ranks.first_of(lambda: training.state() | {"threads": torch.get_num_threads()})
    if not process_rank.leads():
        torch.set_num_threads(state["threads"])
        training.load_state(state)
    return True


class _Opened(NamedTuple):
    run: Run
    resumed: bool  # an earlier start began it
    origin: Generation | None  # where a fork starts


def _open(config: RunConfig, writer: Writer | None, asked: RunRequest, known_by: Mapping[str, str]) -> _Opened | Begun:
    """The run to train, opened; or one that an earlier start has brought to its end."""
    if writer is None:
        return _Opened(MemoryRun(asked.name), resumed=False, origin=None)
    with one_at_a_time(config, known_by["run_key"]):
        begun, origin = find_begun(config, known_by, writer, None if asked.resume else asked.run_id), None
        if begun and (begun.finished or begun.ended_as == "FINISHED"):
            return begun
        if begun:
            asked = _going_on(asked, begun)
        if asked.resume and asked.run_id:  # before the run is opened: where it cannot go on, it stays as it is
            folder = Path(asked.folder) if asked.folder else Path(config.output_dir) / asked.run_id
            Checkpoints(folder).check_format()
        if begun is None or not Checkpoints(begun.folder).steps():
            origin = origin_of(config, writer)
        run = MlflowRun(writer, asked, Path(config.output_dir), config.tracking.offline)
    return _Opened(run, asked.resume, origin)


def _known_by(config: RunConfig, digest: str) -> dict[str, str]:
    """The tags by which a run is found again."""
    found = {"task": config.task, "seed": str(config.seed), "data_digest": digest,
             "run_key": config.fingerprint(digest), THREADS: str(torch.get_num_threads())}  # fmt: skip
    return found | ({FORKED_FROM: config.fork} if config.fork else {})


def _going_on(asked: RunRequest, begun: Begun) -> RunRequest:
    """The request for a run that was begun before; the run that `mlflow run` opened is then its launcher."""
    launcher = asked.launcher if asked.run_id in (None, begun.run_id) else asked.run_id
    if begun.ended_as is None and begun.folder.is_dir():
        warn(f"{begun.name}: the last start of run {begun.run_id} ended without a word: it was killed, or the machine "
             f"went down{_memory_kills()}")  # fmt: skip
    tags = {name: value for name, value in asked.tags.items() if name != THREADS}  # as it began
    return replace(asked, run_id=begun.run_id, resume=True, folder=str(begun.folder), launcher=launcher, tags=tags)


def _tell(run: Run, task: Task[Any], device: str, given: frozenset[str]) -> int:
    """Say what is begun, and what looks like a mistake; returns the optimizer steps."""
    config, total_steps = task.config, count_steps(task)
    if generated := config.embedded():
        say(generated)
    _tell_epochs(config, given)
    if reason := undefined(task, "evaluation.metric", config.evaluation.metric):
        warn(f"evaluation.metric: {reason}; {LAST_KEPT}")
    slow = amp_warning(config.training.amp, device)
    for warning in [*config.warnings(given), *task.warnings(total_steps), *([slow] if slow else [])]:
        warn(warning)
    say(f"{run.name}: {total_steps} steps on {device}")
    for name, value in task.summary().items():
        say(f"  {name} {value}")
    return total_steps


def prepare_torch(config: RunConfig) -> str:
    """Threads and device as the config says; returns the device."""
    torch.set_num_threads(config.training.threads or max(1, TORCH_THREADS - 1))
    return resolve_device(config.device)


def _end_of(begun: Begun, launcher: str | None) -> Trained:
    """Say that there is nothing to train; deliver what is left of it."""
    from pipeline.tracking.store import tracking_uri
    from pipeline.tracking.stored_runs import tag_run
    from pipeline.tracking.sync import sync

    if launcher and launcher != begun.run_id:
        tag_run(launcher, {"role": "launcher", LAUNCHED: begun.run_id})
    if begun.finished:
        say(f"{begun.name}: run {begun.run_id} is finished already; nothing is trained (without resume a new run is)")
    else:
        say(f"{begun.name}: run {begun.run_id} is trained already; what waits in {begun.folder} is delivered")
        sync(begun.folder)
    return Trained(begun.run_id, begun.name, tracking_uri(), begun.metrics, before=True)


def _tell_evaluations(run: Run, training: Training, watch: Watch | None) -> None:
    """What the watch has heard of before the run was cut off, or would have."""
    for step, metrics in run.history() if watch else ():
        if watch and step <= training.evaluated_at and any(name.startswith("valid/") for name in metrics):
            watch(step, metrics)


def _memory_kills() -> str:
    """How often the kernel has killed here for want of memory, where it says so."""
    try:
        counts = dict(line.split() for line in MEMORY_EVENTS.read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return ""
    killed = int(counts.get("oom_kill", 0))
    return f"; the kernel has killed {killed} processes here for want of memory" if killed else ""


def _abandon(run: Run, error: BaseException) -> None:
    """End a run that an error cut off, and say how it goes on."""
    status = end_early(run, error)
    if process_rank.size() > 1 and isinstance(error, KeyboardInterrupt):
        say("torchrun stops all its processes when one of them has ended: its report names that one")
    if isinstance(run, MlflowRun) and not run.lost:
        say(f"{run.name}: run {run.id} is {status}; the same command with resume=auto goes on with it")


def headline(metrics: Mapping[str, float]) -> str:
    """The test metrics in a few words; validation where there is no test split."""
    split = "test" if any(name.startswith("test/") for name in metrics) else "valid"
    shown = {name: value for name, value in metrics.items() if name.startswith(f"{split}/") and name.count("/") == 1}
    return "  ".join(f"{name} {value:.4f}" for name, value in shown.items() if "auc" in name or "f1" in name)


def _describe(run: Run, task: Task[Any], given: frozenset[str]) -> None:
    """Params, tags, input and config of a run: what it is before it starts."""
    config, dataset = task.config, task.dataset
    flat = config.decisive()
    short = {name: flat[path] for name, path in config.short.items() if path in flat}
    run.log_params(flat | short | dict(task.summary()))
    if given:
        run.set_tags({"overrides": ", ".join(sorted(given))})
    run.log_input(dataset.name, dataset.digest, dataset.source, dataset.profile)
    file = run.folder / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    run.log_artifact(file)
    folder = run.folder / "description"
    folder.mkdir(parents=True, exist_ok=True)
    known = task.describe(folder)
    if known:
        run.log_metrics(0, known)
    _log_files(run, folder)
    run.flush()


def _log_files(run: Run, folder: Path) -> None:
    """Every file below the folder as an artifact, where it lies in it."""
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        where = file.parent.relative_to(folder).as_posix()
        run.log_artifact(file, "" if where == "." else where)


def _tell_epochs(config: RunConfig, given: frozenset[str]) -> None:
    epochs = config.training.num_train_epochs
    if "training.num_train_epochs" in given:
        warn(f"Using epochs from command line: {epochs} (overrides config)")
    else:
        say(f"Using epochs from config: {epochs}")


def _leave(run: Run, task: Task[Any], training: Training, device: str) -> None:
    """Report, note and model of a trained run; of these, the model alone decides whether the run is whole."""
    folder, model = run.folder / "report", training.result.model
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    if task.config.tracking.log_report:
        with optional("plots/losses.png"):
            plots.losses(run.history(), folder / "plots" / "losses.png")
    with optional("the report on the finished model"), evaluating(model):
        task.report(model, folder, device)
    _log_files(run, folder)
    with optional("the run's note"):
        if text := note(training.result, training.keeper.step, run.history()):
            run.set_tags({"mlflow.note.content": text})
    if task.config.tracking.log_model:
        export = asdict(task.export(model, run.folder / "model"))
        run.log_model(export | {"folder": str(export["folder"].resolve())})


def note(result: Result, best_step: int | None, history: Iterable[tuple[int, Mapping[str, float]]]) -> str:
    """Scores as a table in Markdown: on the test split, or on validation where there is none; "" without any."""
    split, weights = "test", "last" if best_step is None else "best"
    scores = {name: value for name, value in result.metrics.items() if name.startswith("test/")}
    if not scores:
        split, at = "validation", result.steps if best_step is None else best_step
        scores = {name: value for step, values in history if step == at
                  for name, value in values.items() if name.startswith("valid/")}  # fmt: skip
    text = f"| {split}, at the {weights} weights | |\n|---|---|\n"
    for name, value in scores.items():
        line = f"| {name} | {value:.4f} |\n"
        if len(text) + len(line) > NOTE_LENGTH:  # whole lines, or it would be no table
            break
        text += line
    return text.rstrip("\n") if scores else ""
