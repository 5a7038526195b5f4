"""Which run a start goes on with: `resume` brings one to its end, `fork` starts a new one from an old state."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from pipeline.config.run_config import RunConfig, is_operational
from pipeline.config.strict_config import flatten, read_yaml, validate
from pipeline.errors import UserError, os_errors
from pipeline.names import FORKED_FROM, THREADS
from pipeline.runtime.console import say, warn
from pipeline.storage.checkpoints import Checkpoints, Generation
from pipeline.storage.files import check_file
from pipeline.storage.journal import JOURNAL_FILE, Record, beginning, parsed, points
from pipeline.storage.ownership import alive_owner
from pipeline.tracking.messages import StoredRun
from pipeline.tracking.mlflow_run import MlflowRun, Writer
from pipeline.training.loop import Training

CONFIG_FILE = "config.yaml"
TAIL_BYTES = 1 << 16  # of a journal, that hold its last record
SHOWN = 5  # differences that are named


@dataclass(frozen=True)
class Begun:
    """A run that an earlier start began."""

    run_id: str
    name: str
    folder: Path
    finished: bool  # nothing is left to do
    ended_as: str | None  # by its own word; None = it was cut off without one
    tags: Mapping[str, str]
    metrics: Mapping[str, float]  # last values, as far as the store has them
    params: Mapping[str, str]  # as the store has them


@contextmanager
def one_at_a_time(config: RunConfig, key: str) -> Iterator[None]:
    """Serialise starts with `resume=auto` and this key: each looks for its run, and begins it, before the next does."""
    if config.resume != "auto":
        yield
        return
    folder = Path(config.output_dir)
    with os_errors(f"output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{key[:16]}.lock", fallback_to_soft=False).acquire()
    with lock:
        yield


def find_begun(
    config: RunConfig, known_by: Mapping[str, str], writer: Writer, opened: str | None = None
) -> Begun | None:
    """The run that `config.resume` means; None = there is none. `known_by`: the tags of such a run.

    opened: the run that this start was told to write to. If an earlier start has (a pod that follows another one has
    its environment), that one goes on, asked for or not: written from its beginning again, it would hold points twice.

    Raises:
        UserError: that run is alive, there is none with the id, or it is of another config or other data.
    """
    output_dir = Path(config.output_dir)
    wanted = config.resume
    if wanted is None and opened and _was_begun(opened, config, writer):
        wanted = opened
    if wanted is None:
        return None
    if wanted == "auto":
        begun = _matching(config, known_by["run_key"], output_dir, writer)
    else:
        begun = _named(wanted, config, output_dir, writer)
        _refuse_another(config, known_by, begun)
    if begun and not begun.finished:
        _refuse_alive(begun.folder)
    return begun


def _was_begun(run_id: str, config: RunConfig, writer: Writer) -> bool:
    """An earlier start has written to the run: its folder is here, or the store knows its key."""
    if (Path(config.output_dir) / run_id / JOURNAL_FILE).exists():
        return True
    found = _asked(config, writer, run_id=run_id)
    return bool(found and "run_key" in found[0].tags)


def _matching(config: RunConfig, key: str, output_dir: Path, writer: Writer) -> Begun | None:
    """The newest run of this config and data."""
    local = {folder: opened for folder, opened in _local_runs(output_dir)
             if opened["tags"].get("run_key") == key and opened["tags"].get(FORKED_FROM) == config.fork}  # fmt: skip
    for folder in local:  # before the store is asked: who starts a run twice shall hear of it at once
        _refuse_alive(folder)
    found = _asked(config, writer, run_key=key, fork=config.fork)
    if found is None:
        return _of_folder(*list(local.items())[-1]) if local else None
    there = {run.first_id for run in found}
    waiting = [folder for folder in local if folder.name not in there and _is_missing(folder, config, writer)]
    begun = [(run.start_time, _of_store(run, output_dir)) for run in found
             if "pruned" not in run.tags and not run.deleted]  # fmt: skip
    begun += [(local[folder]["time"], _of_folder(folder, local[folder])) for folder in waiting]
    return max(begun, key=lambda run: run[0])[1] if begun else None


def _is_missing(folder: Path, config: RunConfig, writer: Writer) -> bool:
    """The store has no run of the folder: it was away when that began, it lost it, or it is another store.

    One that somebody deleted there is not missing.
    """
    return not _asked(config, writer, run_id=folder.name)


def _named(run_id: str, config: RunConfig, output_dir: Path, writer: Writer) -> Begun:
    """The run with the id, whatever it is."""
    folder = output_dir / run_id
    if folder.is_dir():
        _refuse_alive(folder)
    found = _asked(config, writer, run_id=run_id)
    if found and found[0].deleted:
        raise UserError(f"resume {run_id}: the run was deleted in the tracking store; restore it there (`mlflow runs "
                        f"restore --run-id {found[0].run_id}`), or start anew")  # fmt: skip
    if found:
        return _of_store(found[0], output_dir)
    if not (folder / JOURNAL_FILE).exists():
        raise UserError(f"resume {run_id}: there is no such run; allowed: auto, or the id of a run")
    with os_errors(f"journal {folder / JOURNAL_FILE}"):
        opened = beginning(folder / JOURNAL_FILE)
    if opened is None:
        raise UserError(f"{folder / JOURNAL_FILE}: found no record of the run's beginning; it cannot go on")
    return _of_folder(folder, opened)


def _asked(config: RunConfig, writer: Writer, **what: str | None) -> list[StoredRun] | None:
    """What the store knows, oldest first; None where it does not answer and need not."""
    try:
        return writer.find(**what)
    except UserError as error:
        if not config.tracking.offline:
            raise
        warn(f"{error}; looking into {config.output_dir} alone")
        return None


def _local_runs(output_dir: Path) -> list[tuple[Path, Record]]:
    """Folders of runs with the first record of their journals, oldest first."""
    found = []
    for file in output_dir.glob(f"*/{JOURNAL_FILE}"):
        try:
            opened = beginning(file)
        except OSError as error:
            warn(f"{file}: {error.strerror or error}; the run is passed over")
            continue
        if opened:
            found.append((file.parent, opened))
    return sorted(found, key=lambda run: run[1]["time"])


def _of_store(run: StoredRun, output_dir: Path) -> Begun:
    folder = _folder_of(run, output_dir)
    ended = _ended_as(folder / JOURNAL_FILE)
    return Begun(run.first_id, run.name, folder, run.status == "FINISHED", ended, run.tags, run.metrics,
                 run.canonical_params)  # fmt: skip


def _folder_of(run: StoredRun, output_dir: Path) -> Path:
    """Below the output folder, which may have been moved; else where the run was last written, if that is here."""
    here, there = output_dir / run.first_id, Path(run.tags.get("run_dir", output_dir / run.first_id))
    return there if (there / JOURNAL_FILE).exists() and not (here / JOURNAL_FILE).exists() else here


def _of_folder(folder: Path, opened: Record) -> Begun:
    return Begun(folder.name, opened["name"], folder, False, _ended_as(folder / JOURNAL_FILE), opened["tags"], {}, {})


def _ended_as(journal: Path) -> str | None:
    """The status with which a journal ends; None where it ends without one."""
    try:
        check_file(journal)
        with journal.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - TAIL_BYTES))
            last = parsed(stream.read().rstrip(b"\n").rpartition(b"\n")[2])
    except OSError:
        return None
    return last["status"] if last and last["op"] == "finish" else None


def _refuse_alive(folder: Path) -> None:
    if folder.is_dir() and (owner := alive_owner(folder)):
        raise UserError(f"run {folder.name} is alive: {owner} writes it; wait for its end, or end it first")


def _refuse_another(config: RunConfig, known_by: Mapping[str, str], begun: Begun) -> None:
    """Raise a UserError that names how the run's config or data differ from what is asked for."""
    found = [f"task is {begun.tags.get('task')}, asked for {known_by['task']}"]
    if begun.tags.get("task") == known_by["task"]:
        if begun.tags.get("run_key") == known_by["run_key"]:
            return
        found = _differences(config, begun)
        if begun.tags.get("data_digest") != known_by["data_digest"]:
            found.append(f"data has SHA-256 {begun.tags.get('data_digest', '')[:12]}..., now "
                         f"{known_by['data_digest'][:12]}...")  # fmt: skip
    told = "; ".join(found[:SHOWN]) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    raise UserError(f"resume {begun.run_id}: that run is another one: {told or 'its config differs'}; allowed: the "
                    "same config and data (fork=<run id>@<step> starts a new run from its state)")  # fmt: skip


def _differences(config: RunConfig, begun: Begun) -> list[str]:
    """What decides the result and is not as in the run's own config; by its params where its folder is not here."""
    file = begun.folder / CONFIG_FILE
    before, now = dict[str, Any](begun.params), dict[str, Any](config.decisive())
    if file.exists() or not before:
        try:
            before, now = flatten(validate(type(config), read_yaml(file), file)), flatten(config)
        except UserError as error:
            return [str(error)]
    return [f"{key} was {before.get(key)}, now {now[key]}" for key in now
            if before.get(key) != now[key] and not is_operational(key)]  # fmt: skip


# ---------------------------------------------------------------- states


def newest_state(run: MlflowRun) -> Generation | None:
    """The run's newest whole checkpoint. Points that are logged already, from there on, are not logged again."""
    generation = Checkpoints(run.folder).latest()
    run.go_on(generation.facts["position"] if generation else 0)
    return generation


def restore(training: Training, generation: Generation) -> None:
    """Put a training where the checkpoint stands, with the threads that it was made with: others round differently.

    Raises:
        UserError: the state is of another model.
    """
    try:
        training.restore(generation)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{generation.folder}: its state does not fit this config: {error}") from None
    facts = generation.facts
    _take_threads(facts["threads"])
    if facts["torch"] != torch.__version__:
        warn(f"the checkpoint is of torch {facts['torch']}, this is {torch.__version__}: numbers may differ")


def origin_of(config: RunConfig, writer: Writer) -> Generation | None:
    """The checkpoint `<run id>@<step>` that `config.fork` names; to be found before a run is opened.

    Raises:
        UserError: no such run or checkpoint.
    """
    if config.fork is None:
        return None
    run_id, _, step = config.fork.partition("@")
    found = _asked(config, writer, run_id=run_id)
    folder = _folder_of(found[0], Path(config.output_dir)) if found else Path(config.output_dir) / run_id
    if not folder.is_dir():
        raise UserError(f"fork {config.fork}: found no folder of run {run_id}; allowed: one whose checkpoints are here")
    try:
        return Checkpoints(folder).at(int(step))
    except UserError as error:
        raise UserError(f"fork {config.fork}: {error}") from None


def begin_again(run: MlflowRun) -> None:
    """Take the threads that the run began with: it has no checkpoint, but points that were made with them."""
    opened = beginning(run.folder / JOURNAL_FILE) or {"tags": {}}
    _take_threads(int(opened["tags"].get(THREADS, torch.get_num_threads())))


def _take_threads(number: int) -> None:
    if number != torch.get_num_threads():
        say(f"{number} CPU threads, as before: {torch.get_num_threads()} would round differently")
        torch.set_num_threads(number)


def fork(training: Training, run: MlflowRun, origin: Generation) -> None:
    """Put a training where the checkpoint of another run stands, with that run's points up to it.

    Raises:
        UserError: the state is of another model.
    """
    options = [{key: value for key, value in group.items() if key != "params"}
               for optimizer in training.optimizers.values() for group in optimizer.param_groups]  # fmt: skip
    restore(training, origin)
    groups = [group for optimizer in training.optimizers.values() for group in optimizer.param_groups]
    for group, own in zip(groups, options, strict=True):  # the state is the other run's, the settings are not
        group.update(own)
    for record in _points_before(origin):
        run.log_metrics(record["step"], record["values"], record["time"])


def _points_before(generation: Generation) -> Iterator[Record]:
    """The points that led to the checkpoint: those of earlier steps, and of the evaluation at its own if that was done.

    The journal may hold later ones, of a start that came further before it was killed.
    """
    was_evaluated = generation.state["evaluated_at"] == generation.step
    for record in points(generation.folder.parent.parent / JOURNAL_FILE):
        of_evaluation = any(name.startswith("valid/") for name in record["values"])
        if record["step"] < generation.step or (record["step"] == generation.step and was_evaluated and of_evaluation):
            yield record


def facts_of(config: RunConfig, known_by: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint is known by."""
    return {"task": config.task, "config_digest": config.fingerprint(), "data_digest": known_by["data_digest"],
            "torch": torch.__version__}  # fmt: skip
