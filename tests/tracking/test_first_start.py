"""The first start creates the store completely, even beside other starts.

By `make faults`: many starts at once, and kills at twenty moments.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Call, only_full

from pipeline.errors import UserError
from pipeline.tracking import store_creation
from pipeline.tracking.store_creation import ensure_store

STATEMENTS = 1500  # of the 1,700 that create a store, before the schema is complete

# Imports mlflow once and forks the processes that start, since the import takes longer than the start. Each argument is
# a folder, and what happens there: `together N MOMENT...`: N of them at once, of which some are killed.
# `killed MOMENT...`: at each moment, in a folder of its own, a start that is killed, then one that is not.
STARTS = """
import json, os, signal, sys, time
from pathlib import Path
import mlflow, sqlalchemy
import mlflow.store.tracking.sqlalchemy_store
from pipeline.tracking import store_creation
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.run_opening import Opening

def report_line(**values):
    line = json.dumps({"folder": folder, **values})
    os.write(1, line.encode() + b"\\n")  # in one piece, whoever else prints

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def start():
    run_id = Opening(RunRequest("first"), Path("outputs").resolve(), {}).open().run_id
    run = mlflow.MlflowClient().get_run(run_id)  # nothing is configured
    report_line(run_id=run.info.run_id, artifacts=run.info.artifact_uri)

def forked(function, *arguments):
    child = os.fork()
    if child:
        return child
    try:
        function(*arguments)
    except BaseException as error:
        report_line(error=str(error))
        os._exit(1)
    os._exit(0)

def killed(moment):
    kind, _, count = moment.partition(":")
    left = int(count or 0)
    def tick(*_):
        nonlocal left
        left -= 1
        if left < 0:
            die()
    if kind == "statement":
        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", tick)
    elif kind == "rename":
        Path.replace = die
    start()

def report(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def together(count, *moments):
    children = [forked(killed, moment) for moment in moments]
    children += [forked(start) for _ in range(int(count) - len(moments))]
    if any([code for child in children if (code := report(child)) != -signal.SIGKILL]):
        sys.exit("a start failed")

def one_by_one(*moments):
    for number, moment in enumerate(moments):
        os.makedirs(f"{number}")
        os.chdir(f"{number}")
        child = forked(killed, moment)
        if moment.startswith("milliseconds"):
            time.sleep(int(moment.partition(":")[2]) / 1000)
            os.kill(child, signal.SIGKILL)
        code = report(child)
        exists = os.path.exists("mlflow.db")
        if exists:
            os.system("cp mlflow.db seen.db")  # judged by the test
        report_line(moment=moment, code=code, there=exists)
        report(forked(start))
        os.chdir("..")

for arguments in sys.argv[1:]:
    folder, what, *rest = arguments.split()
    os.makedirs(folder)
    os.chdir(folder)
    together(*rest) if what == "together" else one_by_one(*rest)
    os.chdir("..")
"""
DEADLY = (f"statement:{STATEMENTS // 2}", "rename", "statement:0", f"statement:{STATEMENTS}")
STARTERS = 8  # at once, beside those that are killed


def moments(statements: int) -> list[str]:
    """When a start is killed: before a statement, or after some time."""
    spread = [f"statement:{statements * part // 10}" for part in range(10)]
    timed = [f"milliseconds:{150 * part}" for part in range(1, 9)]
    return spread + timed


KILLS = [*moments(STATEMENTS), "rename"]


@dataclass(frozen=True)
class Starts:
    """Output of the starts in a folder, a JSON object per line."""

    folder: Path
    lines: list[dict[str, Any]]


@pytest.fixture(scope="module")
def starts_by_folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Starts]:
    """Every real start, by folder; one process imports mlflow for all of them."""
    place = tmp_path_factory.mktemp("starts")
    arguments = {
        "together": ["together", str(len(DEADLY) + STARTERS), *DEADLY],
        "killed": ["killed", *KILLS],
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, "-c", STARTS, *(" ".join([folder, *words]) for folder, words in arguments.items())],
        cwd=place, env=environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        folder: Starts(place / folder, [line for line in lines if line["folder"] == folder]) for folder in arguments
    }


def query(file: Path, statement: str) -> list[Any]:
    with closing(sqlite3.connect(file)) as base:
        return base.execute(statement).fetchall()


def schema(file: Path) -> set[tuple[str, ...]]:
    """Every table and index with its columns, and the version. MLflow writes a table's checks in any order."""
    created = {
        (name, *sorted((sql or "").replace(",", " ").split()))
        for name, sql in query(file, "select name, sql from sqlite_master")
    }
    return created | set(query(file, "select * from alembic_version"))


MADE = {"mlflow.db", "mlruns"}  # by a start, whose run gets a folder for its artifacts


def files(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.mark.faults
@only_full
def test_starts_at_the_same_moment_share_one_store(starts_by_folder: dict[str, Starts], empty_store: Path) -> None:
    """Some are killed while they create the store, some while they wait for it."""
    folder, starts = starts_by_folder["together"].folder, starts_by_folder["together"].lines
    assert len({start["run_id"] for start in starts}) == len(starts) >= STARTERS, starts
    ours, theirs = folder / "mlflow.db", empty_store
    assert query(ours, "select count(*) from runs")[0][0] >= len(starts)
    assert files(folder) == MADE
    # as MLflow creates it
    assert schema(ours) == schema(theirs)
    default = "select experiment_id, name, lifecycle_stage, workspace from experiments"
    assert query(ours, default) == query(theirs, default)
    [(where,)] = query(theirs, "select artifact_location from experiments")
    assert Path(where).parts[-2:] == ("mlruns", "0")  # below the folder it was made in
    assert query(ours, "select artifact_location from experiments") == [(str(folder / "mlruns" / "0"),)]
    assert {Path(start["artifacts"]).parent.parent for start in starts} == {folder / "mlruns" / "0"}
    assert (ROOT / ".gitignore").read_text().count("mlflow.db") == 1


@pytest.mark.faults
@only_full
def test_start_that_was_killed_leaves_no_store_or_a_whole_one(
    starts_by_folder: dict[str, Starts], empty_store: Path
) -> None:
    kills, following = starts_by_folder["killed"].lines[0::2], starts_by_folder["killed"].lines[1::2]
    assert len(kills) == len(following) == len(KILLS)
    assert all("run_id" in start for start in following), following
    for number, kill in enumerate(kills):
        folder = starts_by_folder["killed"].folder / f"{number}"
        assert kill["code"] == -9 or kill["moment"].startswith("milliseconds"), kill
        assert not kill["there"] or kill["moment"].startswith("milliseconds"), kill
        if kill["there"]:
            assert schema(folder / "seen.db") == schema(empty_store)
        assert query(folder / "mlflow.db", "select count(*) from runs")[0][0] >= 1
        assert schema(folder / "mlflow.db") == schema(empty_store)
        # a start that is killed after the rename leaves its lock
        late = {"mlflow.db.lock", "mlflow.db.new"} if kill["there"] else set()
        assert files(folder) - {"seen.db"} - late == MADE


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> list[Path]:
    """Stores created by copying, which takes no time."""
    calls: list[Path] = []

    def copy(uri: str, file: Path) -> None:
        calls.append(file)
        work = file.with_name("copy")
        shutil.copyfile(empty_store, work)
        store_creation._rename(work, file)

    monkeypatch.setattr(store_creation, "_create", copy)
    return calls


def change(file: Path, *statements: str) -> bytes:
    with closing(sqlite3.connect(file)) as base:
        for statement in statements:
            base.execute(statement)
        base.commit()
    return file.read_bytes()


RUN = "insert into runs (run_uuid, experiment_id, start_time, lifecycle_stage) values ('r1', 0, 1, 'active')"


@pytest.mark.parametrize("rows", [(), (RUN,)], ids=["empty", "with a run"])
def test_store_of_another_version_is_unchanged_and_gets_mlflows_line(
    workplace: Path, created: list[Path], empty_store: Path, call_pipeline: Call, rows: tuple[str, ...]
) -> None:
    """Also a store that MLflow left incomplete."""
    file = workplace / "mlflow.db"
    shutil.copyfile(empty_store, file)
    before = change(file, *rows, "update alembic_version set version_num = '451aebb31d03'")  # the first migration
    result = call_pipeline("compare", "--sweep_id", "none")
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: tracking store sqlite:///")
    assert "out-of-date database schema (found version 451aebb31d03" in line
    assert "mlflow db upgrade" in line
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", [b"#!/bin/sh\n", b"SQLite format 3\0" + b"\xff" * 4096, b"SQLite"])
def test_what_is_no_database_is_left_alone(tmp_path: Path, created: list[Path], content: bytes) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(content)
    ensure_store(f"sqlite:///{file}")
    assert file.read_bytes() == content
    assert not created


def test_store_needs_no_lock_and_no_writing(tmp_path: Path, created: list[Path], empty_store: Path) -> None:
    file = tmp_path / "mlflow.db"
    shutil.copyfile(empty_store, file)
    change(file, RUN)
    (tmp_path / "mlflow.db.lock").mkdir()  # a lock that nobody could take
    ensure_store(f"sqlite:///{file}")
    assert not created


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "http://127.0.0.1:1", "postgresql://u:p@h/d", "x"])
def test_other_uris_create_nothing(
    tmp_path: Path, created: list[Path], uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ensure_store(uri)
    assert files(tmp_path) == set()
    assert not created


def test_empty_file_becomes_a_store_with_its_rights(tmp_path: Path, created: list[Path], empty_store: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.touch()
    file.chmod(0o600)
    ensure_store(f"sqlite:///{file}")
    assert created == [file]
    assert schema(file) == schema(empty_store)
    assert file.stat().st_mode & 0o777 == 0o600
    assert files(tmp_path) == {"mlflow.db"}


def test_relative_path_folders_and_links_are_as_in_sqlite(
    tmp_path: Path, created: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ensure_store("sqlite:///new folder/50%/a?b#c.db?timeout=5".replace("?b#c", " b"))
    assert created == [tmp_path / "new folder" / "50%" / "a b.db"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mlflow.db").symlink_to(tmp_path / "elsewhere" / "real.db")
    ensure_store("sqlite:///mlflow.db")
    assert (tmp_path / "mlflow.db").is_symlink()
    assert created[1] == tmp_path / "elsewhere" / "real.db"
    assert files(tmp_path / "elsewhere") == {"real.db"}


def test_journal_of_a_deleted_store_is_not_played_into_the_new_one(tmp_path: Path, created: list[Path]) -> None:
    for end in ("-journal", "-wal"):
        (tmp_path / f"mlflow.db{end}").write_bytes(end.encode())
    with pytest.raises(UserError, match=r"found none, but mlflow\.db-journal and mlflow\.db-wal of an earlier one"):
        ensure_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert files(tmp_path) == {"mlflow.db-journal", "mlflow.db-wal"}
    assert not created


def test_store_that_mlflow_created_meanwhile_is_kept(tmp_path: Path, empty_store: Path) -> None:
    file, work = tmp_path / "mlflow.db", tmp_path / "mlflow.db.new"
    shutil.copyfile(empty_store, file)
    before = change(file, RUN)
    shutil.copyfile(empty_store, work)
    store_creation._rename(work, file)
    assert file.read_bytes() == before
    assert not work.exists()


def test_place_that_cannot_hold_a_store_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^tracking store .*file/mlflow.db: .*file is not a folder$"):
        ensure_store(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
    with pytest.raises(UserError, match=r"^tracking store .*file/sub/mlflow.db: Not a directory$"):
        ensure_store(f"sqlite:///{tmp_path / 'file' / 'sub' / 'mlflow.db'}")


# One trainer: every step is logged and flushed by itself.
TRAINER = """
import sys, time
from pathlib import Path
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.writer_client import Writer

number, steps, metrics = map(int, sys.argv[1:])
with Writer() as writer:
    run = MlflowRun(writer, RunRequest(name=f"t{number}"), Path("outputs"))
    for step in range(steps):
        run.log_metrics(step, {f"m{metric}": number + step + metric / 16 for metric in range(metrics)})
        run.flush()
        time.sleep(0.02)
    run.finish("FINISHED")
"""


@pytest.mark.faults
@only_full
def test_eight_trainers_log_every_step_to_one_new_store(tmp_path: Path) -> None:
    steps, metrics = 300, 12
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    trainers = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(number), str(steps), str(metrics)],
            cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for number in range(8)
    ]  # fmt: skip
    starts_by_folder = [trainer.communicate(timeout=600)[1] for trainer in trainers]
    assert [trainer.returncode for trainer in trainers] == [0] * 8, starts_by_folder
    lines = [line for text in starts_by_folder for line in text.splitlines()]
    assert all(line.startswith("delivered ") for line in lines), lines  # the store was never away for anybody
    file = tmp_path / "mlflow.db"
    runs = query(file, "select name, status, run_uuid from runs order by name")
    assert [run[:2] for run in runs] == [(f"t{number}", "FINISHED") for number in range(8)]
    for number, (_, _, run_id) in enumerate(runs):
        points = query(file, f"select key, step, value from metrics where run_uuid = '{run_id}'")  # noqa: S608
        assert len(points) == steps * metrics
        assert set(points) == {
            (f"m{metric}", step, number + step + metric / 16) for step in range(steps) for metric in range(metrics)
        }
