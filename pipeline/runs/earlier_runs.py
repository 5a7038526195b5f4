"""Find runs that an earlier start began, in the tracking store and in the output folder."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.config.run_config import RunConfig, is_operational
from pipeline.config.strict_config import flatten, read_yaml, validate
from pipeline.errors import UserError, os_errors
from pipeline.names import FORKED_FROM
from pipeline.runs.run_artifacts import CONFIG_FILE
from pipeline.runtime.console import warn
from pipeline.storage.journal import Record, read_opening
from pipeline.storage.ownership import alive_error, live_owner
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking.messages import StoredRun
from pipeline.tracking.writer_client import Writer

SHOWN = 5  # number of differences listed in an error


@dataclass(frozen=True)
class EarlierRun:
    """A run that an earlier start began."""

    run_id: str
    name: str
    folder: Path
    finished: bool  # FINISHED in the store
    ended_as: str | None  # final status in its journal; None: the run was killed
    tags: Mapping[str, str]
    metrics: Mapping[str, float]  # last values in the store; empty if it is unreachable
    params: Mapping[str, str]  # params in the store; empty if it is unreachable


@contextmanager
def one_at_a_time(config: RunConfig, key: str) -> Iterator[None]:
    """Serialise starts with `resume=auto` and the same run key, so that the next one finds the run of the first."""
    if config.resume != "auto":
        yield
        return
    folder = Path(config.output_dir)
    with os_errors(f"output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{key[:16]}.lock", fallback_to_soft=False).acquire()
    with lock:
        yield


def find_earlier(
    config: RunConfig, identity: Mapping[str, str], writer: Writer, opened: str | None = None
) -> EarlierRun | None:
    """Find the run to resume according to `config.resume`; None if there is none.

    Args:
        identity: tags of the run to find (`identity_tags`).
        opened: run id given to this start (by `mlflow run`, or the environment of a restarted pod). If an earlier start
            has written to this run, it is resumed even without `resume`; otherwise its points would be logged twice.

    Raises:
        UserError: another process is writing the run, no run has the id, or its config or data differ.
    """
    output_dir = Path(config.output_dir)
    wanted = config.resume
    if wanted is None and opened and _has_begun(opened, config, writer):
        wanted = opened
    if wanted is None:
        return None
    if wanted == "auto":
        run = _newest_of_key(config, identity["run_key"], output_dir, writer)
    else:
        run = _of_id(wanted, config, output_dir, writer)
        _check_same(config, identity, run)
    if run and not run.finished:
        _check_abandoned(run.folder)
    return run


def _has_begun(run_id: str, config: RunConfig, writer: Writer) -> bool:
    """Whether an earlier start has written to the run: its journal is here, or the store has its run key."""
    if RunFolder(Path(config.output_dir) / run_id).journal.exists():
        return True
    stored = query_store(config, writer, run_id=run_id)
    return bool(stored and "run_key" in stored[0].tags)


def _newest_of_key(config: RunConfig, key: str, output_dir: Path, writer: Writer) -> EarlierRun | None:
    """The newest run with this run key, so with the same config and data; None if there is none."""
    local = {folder: opened for folder, opened in _local_runs(output_dir)
             if opened["tags"].get("run_key") == key and opened["tags"].get(FORKED_FROM) == config.fork}  # fmt: skip
    for folder in local:  # before the store is queried, so that a second start of a run fails at once
        _check_abandoned(folder)
    stored = query_store(config, writer, run_key=key, fork=config.fork)
    if stored is None:
        return _of_folder(*list(local.items())[-1]) if local else None
    stored_ids = {run.first_id for run in stored}
    runs = [(run.start_time, _of_store(run, output_dir)) for run in stored
            if "pruned" not in run.tags and not run.deleted]  # fmt: skip
    # Add folders without a run in the store: it was unreachable, lost the run, or is another store.
    runs += [(opened["time"], _of_folder(folder, opened)) for folder, opened in local.items()
             if folder.name not in stored_ids and not query_store(config, writer, run_id=folder.name)]  # fmt: skip
    return max(runs, key=lambda run: run[0])[1] if runs else None


def _of_id(run_id: str, config: RunConfig, output_dir: Path, writer: Writer) -> EarlierRun:
    folder = output_dir / run_id
    if folder.is_dir():
        _check_abandoned(folder)
    stored = query_store(config, writer, run_id=run_id)
    if stored and stored[0].deleted:
        raise UserError(f"resume {run_id}: the run was deleted in the tracking store; restore it there (`mlflow runs "
                        f"restore --run-id {stored[0].run_id}`), or start anew")  # fmt: skip
    if stored:
        return _of_store(stored[0], output_dir)
    journal = RunFolder(folder).journal
    if not journal.exists():
        raise UserError(f"resume {run_id}: there is no such run; allowed: auto, or the id of a run")
    with os_errors(f"journal {journal}"):
        opened = read_opening(journal)
    if opened is None:
        raise UserError(f"{journal}: found no record of the run's beginning; it cannot be resumed")
    return _of_folder(folder, opened)


def query_store(config: RunConfig, writer: Writer, **criteria: str | None) -> list[StoredRun] | None:
    """Find matching runs in the store, oldest first; None if it is unreachable and `tracking.offline` allows that."""
    try:
        return writer.find(**criteria)
    except UserError as error:
        if not config.tracking.offline:
            raise
        warn(f"{error}; searching only {config.output_dir}")
        return None


def _local_runs(output_dir: Path) -> list[tuple[Path, Record]]:
    """All run folders, each with the first record of its journal, oldest first."""
    runs = []
    for folder in RunFolder.below(output_dir):
        try:
            opened = folder.opening()
        except OSError as error:
            warn(f"{folder.journal}: {error.strerror or error}; this run is skipped")
            continue
        if opened:
            runs.append((folder.path, opened))
    return sorted(runs, key=lambda run: run[1]["time"])


def _of_store(run: StoredRun, output_dir: Path) -> EarlierRun:
    folder = folder_of(run, output_dir)
    ended = RunFolder(folder).final_status()
    return EarlierRun(run.first_id, run.name, folder, run.status == "FINISHED", ended, run.tags, run.metrics,
                      run.canonical_params)  # fmt: skip


def folder_of(run: StoredRun, output_dir: Path) -> Path:
    """The run's folder below `output_dir`, or the one recorded in the store if only that one has a journal."""
    here, there = output_dir / run.first_id, Path(run.tags.get("run_dir", output_dir / run.first_id))
    return there if RunFolder(there).journal.exists() and not RunFolder(here).journal.exists() else here


def _of_folder(folder: Path, opened: Record) -> EarlierRun:
    return EarlierRun(
        folder.name, opened["name"], folder, False, RunFolder(folder).final_status(), opened["tags"], {}, {}
    )


def _check_abandoned(folder: Path) -> None:
    """Raise a UserError if a process is writing the run."""
    if folder.is_dir() and (owner := live_owner(folder)):
        raise alive_error(folder.name, owner)


def _check_same(config: RunConfig, identity: Mapping[str, str], run: EarlierRun) -> None:
    """Raise a UserError that lists the differences if the run has another task, config or data."""
    differences = [f"task is {run.tags.get('task')}, asked for {identity['task']}"]
    if run.tags.get("task") == identity["task"]:
        if run.tags.get("run_key") == identity["run_key"]:
            return
        differences = _differences(config, run)
        if run.tags.get("data_digest") != identity["data_digest"]:
            differences.append(f"data has SHA-256 {run.tags.get('data_digest', '')[:12]}..., now "
                               f"{identity['data_digest'][:12]}...")  # fmt: skip
    more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    text = "; ".join(differences[:SHOWN]) + more
    raise UserError(f"resume {run.run_id}: that run differs: {text or 'its config differs'}; allowed: the "
                    "same config and data (fork=<run id>@<step> starts a new run from its state)")  # fmt: skip


def _differences(config: RunConfig, run: EarlierRun) -> list[str]:
    """List changes from the run's config file, or from its params if there is none; ignore operational keys."""
    file = run.folder / CONFIG_FILE
    before, now = dict[str, Any](run.params), dict[str, Any](config.decisive())
    if file.exists() or not before:
        try:
            before, now = flatten(validate(type(config), read_yaml(file), file)), flatten(config)
        except UserError as error:
            return [str(error)]
    return [f"{key} was {before.get(key)}, now {now[key]}" for key in now
            if before.get(key) != now[key] and not is_operational(key)]  # fmt: skip
