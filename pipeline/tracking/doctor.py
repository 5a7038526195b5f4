"""`python -m pipeline doctor <run>`: check that a run's journal, store and checkpoints agree, and suggest repairs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import TrainingError, UserError
from pipeline.runtime.console import info
from pipeline.runtime.text import listed
from pipeline.storage.files import Damaged
from pipeline.storage.journal import JOURNAL_FILE, JournalReader, Record, same_value
from pipeline.storage.ownership import live_owner
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking.client import connect, find_by_id, stored_points, stored_run
from pipeline.tracking.cursor import Cursor
from pipeline.tracking.store import check_reachable, check_uri, store_key, tracking_uri
from pipeline.tracking.store_errors import refusal

SHOWN = 3  # names listed in a line
Points = dict[str, dict[int, list[float]]]  # metric -> step -> values


@dataclass(frozen=True)
class Finding:
    """Result of one check; `repair`: how to repair it, or None if nothing is wrong."""

    what: str
    repair: str | None = None


@dataclass
class Journal:
    """Content of a run's journal."""

    folder: RunFolder
    opened: Record = field(default_factory=dict)
    records: int = 0
    damaged: int = 0
    torn_bytes: int = 0
    points: Points = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    final_status: str | None = None

    def add(self, record: Record) -> None:
        self.records += 1
        self.final_status = None
        match record["op"]:
            case "open":
                self.opened = self.opened or record
            case "metrics" | "known":
                _add_points(self.points, record["step"], record["values"])
            case "params":
                self.params |= record["values"]
            case "artifact":
                self.artifacts.append(f"{record['folder']}/{Path(record['file']).name}".lstrip("/"))
            case "finish":
                self.final_status = record["status"]


def doctor(run: str, output_dir: Path = Path("outputs")) -> None:
    """Check a run, given by its id or its folder, and print the findings.

    Raises:
        UserError: the run is not found here, or MLFLOW_TRACKING_URI cannot be parsed.
        TrainingError: at least one check failed.
    """
    check_uri()
    folder = _find_folder(run, output_dir)
    journal = _read_journal(folder)
    info(f"run {journal.opened['id']} ({journal.opened['name']}) in {folder.path}")
    findings = [*_check_journal(journal), *_check_checkpoints(folder), *_check_store(journal)]
    for finding in findings:
        differs = f"  DIFFERS  {finding.what}\n           {finding.repair}"
        info(f"  ok       {finding.what}" if finding.repair is None else differs)
    wrong = sum(finding.repair is not None for finding in findings)
    if wrong:
        raise TrainingError(f"run {journal.opened['id']}: {wrong} of {len(findings)} checks failed")


def _find_folder(run: str, output_dir: Path) -> RunFolder:
    """Find the run's folder: `run` itself, a subfolder of the output folder, or the folder that the store names."""
    for path in (Path(run), output_dir / run):
        if RunFolder(path).journal.is_file():
            return RunFolder(path.resolve())
    try:
        check_reachable()
        stored = find_by_id(connect(), run)
    except Exception as error:  # report any error of the store in one line
        raise UserError(f"{run}: no run's folder, and {refusal(error)}") from None
    folder = RunFolder(Path(stored.data.tags.get("run_dir", "")) if stored else Path())
    if stored is None or not folder.journal.is_file():
        raise UserError(f"{run}: found no run with a {JOURNAL_FILE}, allowed: a run's folder, or the id of a run whose "
                        f"folder is here or below {output_dir}")  # fmt: skip
    return folder


def _read_journal(folder: RunFolder) -> Journal:
    journal, reader, end = Journal(folder), JournalReader(folder.journal), 0
    while records := reader.read():
        for end, record in records:  # noqa: B007
            journal.add(record)
    reader.close()
    journal.damaged, journal.torn_bytes = reader.damaged, folder.journal.stat().st_size - end
    if not journal.opened:
        raise UserError(f"{folder.journal}: found no record of the run's beginning")
    return journal


def _check_journal(journal: Journal) -> Iterator[Finding]:
    owner = live_owner(journal.folder.path)
    yield Finding(f"{owner} is writing it; the checks below may change" if owner else "no process writes it")
    doubled = [key for key, steps in journal.points.items() if any(len(values) > 1 for values in steps.values())]
    count = sum(map(len, journal.points.values()))
    repair = f"{_listed(doubled)} logged twice at a step; this is a bug, please report it" if doubled else None
    yield Finding(f"journal: {journal.records:,} records, {count:,} points of {len(journal.points)} metrics", repair)
    if journal.torn_bytes or journal.damaged:
        yield Finding(f"journal: {journal.damaged} damaged lines, {journal.torn_bytes} bytes of an incomplete one",
                      "the next start (resume=auto) removes the incomplete line and repeats those steps")  # fmt: skip
    status = journal.final_status
    yield Finding(f"journal: ends as {status or 'a run that still trains, or was killed'}",
                  None if status == "FINISHED" else "start it again with resume=auto")  # fmt: skip


def _check_checkpoints(folder: RunFolder) -> Iterator[Finding]:
    checkpoints = folder.checkpoints()
    for step in checkpoints.steps():
        try:
            checkpoints.at(step)
            yield Finding(f"checkpoint of step {step}: whole")
        except Damaged as damage:
            yield Finding(f"checkpoint of step {step}: {damage}", "the next start skips it; it may be deleted")
        except UserError as error:
            yield Finding(f"checkpoint of step {step}: {error}", "resume=auto refuses it")


def _check_store(journal: Journal) -> Iterator[Finding]:
    sync = f"python -m pipeline sync {journal.folder.path}"
    again = f"{sync} --again"
    cursor = Cursor(journal.folder, store_key())
    waiting = journal.folder.journal.stat().st_size - cursor.at.offset - journal.torn_bytes
    try:
        check_reachable()
        client = connect()
        run = find_by_id(client, cursor.at.run_id or journal.opened["id"])
    except Exception as error:  # report any error of the store as a finding
        yield Finding(refusal(error), f"once it is back: {sync}")
        return
    if run is None:
        yield Finding(f"tracking store {tracking_uri()}: has no such run", f"{sync} creates it")
        return
    yield Finding(f"delivery: {waiting:,} bytes of the journal wait", sync if waiting else None)
    for problem in cursor.at.problems:
        yield Finding(f"delivery: {problem}", f"{sync} tries it again")
    status = run.info.status
    is_expected = status == (journal.final_status or status)
    yield Finding(f"store: run {run.info.run_id} is {status}", None if is_expected else sync)
    params = stored_run(run).canonical_params
    # short names may keep the spelling that `mlflow run` logged: check only that they exist
    wrong = [
        key for key, value in journal.params.items() if params.get(key) != value and ("." in key or key not in params)
    ]
    yield Finding(f"store: {len(journal.params) - len(wrong)} of {len(journal.params)} params",
                  f"{_listed(wrong)}: {again}" if wrong else None)  # fmt: skip
    try:
        points, lost = _stored_points(client, run), _missing_artifacts(client, run.info.run_id, journal.artifacts)
    except Exception as error:  # report any error of the store in one line
        raise TrainingError(refusal(error)) from None
    yield from _compare_points(journal.points, points, again)
    yield Finding(f"store: {len(journal.artifacts) - len(lost)} of {len(journal.artifacts)} artifacts",
                  f"{_listed(lost)}: {again}" if lost else None)  # fmt: skip


def _compare_points(journal: Points, store: Points, again: str) -> Iterator[Finding]:
    """Check that the store has exactly the points of the journal, each once and with the same value."""
    missing, doubled, differing, extra = [], [], [], []
    for key, steps in journal.items():
        stored = store.get(key, {})
        missing += [key for step in steps if step not in stored]
        doubled += [key for step in steps if len(stored.get(step, ())) > 1]
        differing += [
            key
            for step, values in steps.items()
            if step in stored and not any(same_value(values[0], value) for value in stored[step])
        ]
    for key, stored in store.items():
        extra += [key for step in stored if step not in journal.get(key, {})]
    count = sum(map(len, journal.values()))
    yield Finding(f"store: {count - len(missing):,} of {count:,} points",
                  f"{len(missing):,} are missing, of {_listed(missing)}: {again}" if missing else None)  # fmt: skip
    if doubled:
        yield Finding(f"store: {len(doubled):,} points are there more than once, of {_listed(doubled)}",
                      "MLflow cannot take points back: history.parquet has each once")  # fmt: skip
    if differing:
        yield Finding(f"store: {len(differing):,} points have another value than in the journal, of "
                      f"{_listed(differing)}",
                      "another program wrote to the run, or the store's backup is of another run")  # fmt: skip
    if extra:
        yield Finding(f"store: {len(extra):,} points missing from the journal, of {_listed(extra)}",
                      "its tail was lost (a power cut?): the next start with resume=auto reads them back")  # fmt: skip


def _stored_points(client: Any, run: Any) -> Points:
    points: Points = {}
    for key in run.data.metrics:
        for point in stored_points(client, run.info.run_id, key):
            _add_points(points, point.step, {key: point.value})
    return points


def _add_points(points: Points, step: int, values: dict[str, float]) -> None:
    for key, value in values.items():
        points.setdefault(key, {}).setdefault(step, []).append(float(value))


def _missing_artifacts(client: Any, run_id: str, names: list[str]) -> list[str]:
    stored: set[str] = set()
    for folder in {str(Path(name).parent) for name in names}:
        entries = client.list_artifacts(run_id, None if folder == "." else folder)
        stored |= {entry.path for entry in entries}
    return [name for name in dict.fromkeys(names) if name not in stored]


def _listed(names: list[str]) -> str:
    return listed(dict.fromkeys(names), SHOWN)
