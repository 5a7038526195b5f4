"""`python -m pipeline doctor <run>`: do journal, store and checkpoints of a run agree, and if not, what mends it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import TrainingError, UserError
from pipeline.runtime.console import say
from pipeline.storage.checkpoints import Checkpoints, Damaged, OtherFormat
from pipeline.storage.journal import JOURNAL_FILE, JournalReader, same_value
from pipeline.storage.ownership import alive_owner
from pipeline.tracking.client import connect, find_by_id, stored_points, stored_run
from pipeline.tracking.delivery import Cursor
from pipeline.tracking.store import check_uri, probe, refusal, store_key, tracking_uri

SHOWN = 3  # metrics that are named
Points = dict[str, dict[int, list[float]]]  # metric -> step -> values


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    mend: str | None = None  # None: as it should be


@dataclass
class Journal:
    """What a run's journal says."""

    folder: Path
    opened: Mapping[str, Any]
    records: int
    damaged: int
    torn_bytes: int
    points: Points
    params: dict[str, str]
    artifacts: list[str]
    ended_as: str | None


def doctor(run: str, output_dir: Path = Path("outputs")) -> None:
    """Look a run over and say what is found. `run`: its id, or its folder.

    Raises:
        UserError: there is no such run here, or MLFLOW_TRACKING_URI is no URI.
        TrainingError: something differs; every line says what mends it.
    """
    check_uri()
    folder = _folder_of(run, output_dir)
    journal = read_journal(folder)
    say(f"run {journal.opened['id']} ({journal.opened['name']}) in {folder}")
    findings = [*_of_owner(folder), *_of_journal(journal), *_of_checkpoints(folder), *_of_store(journal)]
    for finding in findings:
        say(
            f"  ok       {finding.what}"
            if finding.mend is None
            else f"  DIFFERS  {finding.what}\n           {finding.mend}"
        )
    wrong = sum(finding.mend is not None for finding in findings)
    if wrong:
        raise TrainingError(f"run {journal.opened['id']}: {wrong} of {len(findings)} things are not as they should be")


def _folder_of(run: str, output_dir: Path) -> Path:
    """Where the run's files are: the folder itself, one below the output folder, or what the store says."""
    for folder in (Path(run), output_dir / run):
        if (folder / JOURNAL_FILE).is_file():
            return folder.resolve()
    try:
        probe()
        found = find_by_id(connect(), run)
    except Exception as error:  # whatever the store says becomes the user's one line
        raise UserError(f"{run}: no run's folder, and {refusal(error)}") from None
    folder = Path(found.data.tags.get("run_dir", "")) if found else Path()
    if found is None or not (folder / JOURNAL_FILE).is_file():
        raise UserError(f"{run}: found no run with a {JOURNAL_FILE}, allowed: a run's folder, or the id of a run whose "
                        f"folder is here or below {output_dir}")  # fmt: skip
    return folder


def read_journal(folder: Path) -> Journal:
    """Read a journal to its end.

    Raises:
        UserError: it does not say which run it is of.
    """
    file = folder / JOURNAL_FILE
    found = Journal(folder, {}, 0, 0, 0, {}, {}, [], None)
    reader, end = JournalReader(file), 0
    while records := reader.read():
        for end, record in records:  # noqa: B007
            _take(found, record)
    reader.close()
    found.damaged, found.torn_bytes = reader.damaged, file.stat().st_size - end
    if not found.opened:
        raise UserError(f"{file}: found no record of the run's beginning")
    return found


def _take(journal: Journal, record: Mapping[str, Any]) -> None:
    journal.records += 1
    op, journal.ended_as = record["op"], None
    if op == "open":
        journal.opened = journal.opened or record
    elif op in ("metrics", "known"):
        for key, value in record["values"].items():
            journal.points.setdefault(key, {}).setdefault(record["step"], []).append(float(value))
    elif op == "params":
        journal.params |= record["values"]
    elif op == "artifact":
        journal.artifacts.append(f"{record['folder']}/{Path(record['file']).name}".lstrip("/"))
    elif op == "finish":
        journal.ended_as = record["status"]


def _of_owner(folder: Path) -> Iterator[Finding]:
    owner = alive_owner(folder)
    yield Finding(f"alive: {owner} writes it; what follows is of this moment" if owner else "no process writes it")


def _of_journal(journal: Journal) -> Iterator[Finding]:
    doubled = [key for key, steps in journal.points.items() if any(len(values) > 1 for values in steps.values())]
    count = sum(map(len, journal.points.values()))
    mend = f"{_named(doubled)} twice at a step: a defect of ours; please report it" if doubled else None
    yield Finding(f"journal: {journal.records:,} records, {count:,} points of {len(journal.points)} metrics", mend)
    if journal.torn_bytes or journal.damaged:
        yield Finding(f"journal: {journal.damaged} damaged lines, {journal.torn_bytes} bytes of a torn one",
                      "the next start (resume=auto) cuts the torn line off and trains again what it held")  # fmt: skip
    resume = "start it again with resume=auto"
    mend = {"FINISHED": None, None: resume}.get(journal.ended_as, resume)
    yield Finding(f"journal: ends as {journal.ended_as or 'a run that goes on, or was cut off without a word'}", mend)


def _of_checkpoints(folder: Path) -> Iterator[Finding]:
    checkpoints = Checkpoints(folder)
    for step in checkpoints.steps():
        try:
            checkpoints.at(step)
            yield Finding(f"checkpoint of step {step}: whole")
        except Damaged as damage:
            yield Finding(f"checkpoint of step {step}: {damage}", "the next start passes it over; it may be deleted")
        except OtherFormat as error:
            yield Finding(f"checkpoint of step {step}: {error}", "resume=auto refuses it")


def _of_store(journal: Journal) -> Iterator[Finding]:
    sync = f"python -m pipeline sync {journal.folder}"
    cursor = Cursor(journal.folder, store_key())
    waiting = (journal.folder / JOURNAL_FILE).stat().st_size - cursor.offset - journal.torn_bytes
    try:
        probe()
        client = connect()
        run = find_by_id(client, cursor.run_id or journal.opened["id"])
    except Exception as error:  # whatever the store says becomes one finding
        yield Finding(refusal(error), f"once it is back: {sync}")
        return
    if run is None:
        yield Finding(f"tracking store {tracking_uri()}: has no such run", f"{sync} makes it there")
        return
    yield Finding(f"delivery: {waiting:,} bytes of the journal wait", sync if waiting else None)
    for problem in cursor.problems:
        yield Finding(f"delivery: {problem}", f"{sync} tries it again")
    status = run.info.status
    yield Finding(f"store: run {run.info.run_id} is {status}", None if status == (journal.ended_as or status) else sync)
    again = f"{sync} --again"
    params = stored_run(run).canonical_params
    # a short name keeps what `mlflow run` wrote as it was typed
    wrong = [
        key for key, value in journal.params.items() if params.get(key) != value and ("." in key or key not in params)
    ]
    yield Finding(f"store: {len(journal.params) - len(wrong)} of {len(journal.params)} params",
                  f"{_named(wrong)}: {again}" if wrong else None)  # fmt: skip
    try:
        stored, lost = _points_in_store(client, run), _missing_artifacts(client, run.info.run_id, journal.artifacts)
    except Exception as error:  # whatever the store says becomes the user's one line
        raise TrainingError(refusal(error)) from None
    yield from _of_points(journal, stored, again)
    yield Finding(f"store: {len(journal.artifacts) - len(lost)} of {len(journal.artifacts)} artifacts",
                  f"{_named(lost)}: {again}" if lost else None)  # fmt: skip


def _of_points(journal: Journal, stored: Points, again: str) -> Iterator[Finding]:
    """Each point of the journal once in the store, with its value, and no others."""
    missing, doubled, differ, more = [], [], [], []
    for key, steps in journal.points.items():
        there = stored.get(key, {})
        missing += [key for step in steps if step not in there]
        doubled += [key for step in steps if len(there.get(step, ())) > 1]
        differ += [key for step, values in steps.items()
                   if step in there and not any(same_value(values[0], value) for value in there[step])]  # fmt: skip
    for key, there in stored.items():
        more += [key for step in there if step not in journal.points.get(key, {})]
    count = sum(map(len, journal.points.values()))
    yield Finding(f"store: {count - len(missing):,} of {count:,} points",
                  f"{len(missing):,} are missing, of {_named(missing)}: {again}" if missing else None)  # fmt: skip
    if doubled:
        yield Finding(f"store: {len(doubled):,} points are there more than once, of {_named(doubled)}",
                      "MLflow cannot take points back: history.parquet has each once")  # fmt: skip
    if differ:
        yield Finding(f"store: {len(differ):,} points have another value than in the journal, of {_named(differ)}",
                      "another program wrote to the run, or the store's backup is of another run")  # fmt: skip
    if more:
        yield Finding(f"store: {len(more):,} points that the journal has not, of {_named(more)}",
                      "its tail was lost (a power cut?): the next start with resume=auto reads them back")  # fmt: skip


def _points_in_store(client: Any, run: Any) -> Points:
    found: Points = {}
    for key in run.data.metrics:
        for point in stored_points(client, run.info.run_id, key):
            found.setdefault(key, {}).setdefault(point.step, []).append(point.value)
    return found


def _missing_artifacts(client: Any, run_id: str, names: list[str]) -> list[str]:
    there: set[str] = set()
    for folder in {str(Path(name).parent) for name in names}:
        listed = client.list_artifacts(run_id, None if folder == "." else folder)
        there |= {found.path for found in listed}
    return [name for name in dict.fromkeys(names) if name not in there]


def _named(names: list[str]) -> str:
    listed = list(dict.fromkeys(names))
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} others" if len(listed) > SHOWN else "")
