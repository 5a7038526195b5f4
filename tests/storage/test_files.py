"""Atomic replacement, and the files of a run's folder."""

import os
from pathlib import Path

import pytest

from pipeline.storage.files import replacing
from pipeline.storage.journal import JournalReader, JournalWriter
from pipeline.storage.ownership import owner_number
from pipeline.storage.run_folder import RunFolder


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with replacing(file) as work:
        work.write_text("old")
    with replacing(file, "host") as work:
        assert work == tmp_path / ".a.json.host"
        work.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), replacing(file) as work:  # noqa: PT012
        work.write_text("half")
        raise KeyboardInterrupt
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "new"}


def test_a_durable_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, synced, fsync = tmp_path / "a.json", [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), file.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with replacing(file, durable=True) as work:
        work.write_text("new")
    assert synced == [(str(work), False)]
    assert file.read_text() == "new"


def test_a_link_where_the_hidden_file_would_be_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("other")
    (tmp_path / ".a.json").symlink_to("other.txt")
    with replacing(tmp_path / "a.json") as work:
        work.write_text("new")
    assert (tmp_path / "other.txt").read_text() == "other"
    assert (tmp_path / "a.json").read_text() == "new"


def test_a_path_of_the_run_folder_is_relative_and_what_lies_elsewhere_is_copied(tmp_path: Path) -> None:
    real, elsewhere = tmp_path / "real", tmp_path / "elsewhere"
    for folder in (real / "notes", elsewhere / "part"):
        folder.mkdir(parents=True)
    (tmp_path / "run").symlink_to(real)  # the way to a run's folder may be a link, as any shared one's
    for file in (real / "notes" / "own.txt", elsewhere / "part" / "other.txt"):
        file.write_text(file.name)
        file.chmod(0o444)
    (real / "link.txt").symlink_to(elsewhere / "part" / "other.txt")
    run = RunFolder(tmp_path / "run")
    assert run.copy_in(run.path / "notes" / "own.txt", "own.txt") == "notes/own.txt"
    assert run.file("notes/own.txt").read_text() == "own.txt"
    for source, name in ((elsewhere / "part" / "other.txt", "/other.txt"), (run.path / "link.txt", "l.txt")):
        assert run.file(run.copy_in(source, name)).read_text() == "other.txt"
    for _ in range(2):  # the second time over the first
        folder = run.folder(run.copy_in(elsewhere, "model"))
        assert (folder / "part" / "other.txt").read_text() == "other.txt"
        assert (folder / "part" / "other.txt").stat().st_mode & 0o200  # can be written, whatever the original is


def test_a_pipe_in_a_run_folder_is_no_file_and_does_not_hang(tmp_path: Path) -> None:
    for name in ("journal.jsonl", "lease.json", "owner.number", "artifact"):
        os.mkfifo(tmp_path / name)
    assert owner_number(tmp_path) == 0
    for opened in (JournalReader, JournalWriter):
        with pytest.raises(OSError, match="not a file"):
            opened(tmp_path / "journal.jsonl")
    with pytest.raises(OSError, match="not a file"):
        RunFolder(tmp_path / "run").copy_in(tmp_path / "artifact", "artifact")


def test_a_journal_behind_a_link_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo")  # whose last line has no end: a writer would cut it
    (tmp_path / "journal.jsonl").symlink_to("keys")
    with pytest.raises(OSError, match="symbolic links"):
        JournalWriter(tmp_path / "journal.jsonl")
    assert (tmp_path / "keys").read_text() == "one\ntwo"
