"""Files that are replaced at once."""

import os
from pathlib import Path

import pytest

from pipeline.storage.files import replacing


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
