"""Runs say whether the code that trained them was committed."""

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from conftest import Call

from pipeline.config.run_config import is_operational
from pipeline.config.strict_config import flatten
from pipeline.runs import source_changes
from pipeline.runs.source_changes import MOST_BYTES, log_source_changes, uncommitted_changes
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tracking.run import MemoryRun

torch.set_num_threads(1)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A clean repository whose folder `code` is taken for the package."""
    folder = tmp_path / "repository"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "loss.py").write_text("GAMMA = 1\n")
    (folder / "notes.txt").write_text("one\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "first")
    monkeypatch.setattr(source_changes, "PACKAGE", folder / "code")
    forget()
    yield folder
    forget()


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


def forget() -> None:
    """As a new process begins."""
    uncommitted_changes.cache_clear()
    source_changes._warn_once.cache_clear()


def logged(folder: Path, log_diff: bool = True) -> MemoryRun:
    run = MemoryRun(folder=folder)
    log_source_changes(run, log_diff)
    return run


def test_a_clean_tree_is_silent(repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (repository / "code" / "untracked.py").write_text("no file of the commit")
    run = logged(tmp_path)
    assert (run.tags, run.artifacts) == ({"git_dirty": "false"}, [])
    assert capfd.readouterr().err == ""


def test_the_diff_restores_what_ran(repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of staged and other changes, anywhere in the repository; the warning comes once in a process."""
    (repository / "code" / "loss.py").write_text("GAMMA = 2\n")
    (repository / "notes.txt").write_text("two\n")
    git(repository, "add", "notes.txt")
    index = (repository / ".git" / "index").read_bytes()
    for _ in range(2):
        run = logged(tmp_path)
        assert (run.tags, run.artifacts) == ({"git_dirty": "true", "code_changes": ANY}, ["git_diff.patch"])
    assert (repository / ".git" / "index").read_bytes() == index
    message = f"({repository}): tag git_dirty and git_diff.patch\n"
    assert capfd.readouterr().err == f"warning: the code that trains has changes that are not committed {message}"
    git(repository, "reset", "-q", "--hard")
    git(repository, "apply", str(tmp_path / "git_diff.patch"))
    assert (repository / "code" / "loss.py").read_text() + (repository / "notes.txt").read_text() == "GAMMA = 2\ntwo\n"


def test_the_changes_of_python_files_have_a_hash(repository: Path, tmp_path: Path) -> None:
    """Edited settings do not make another version of the code: they are in the run key. Equal changes are equal."""
    (repository / "notes.txt").write_text("two\n")
    assert logged(tmp_path).tags == {"git_dirty": "true"}
    hashes = []
    for value in (2, 3, 2):
        (repository / "code" / "loss.py").write_text(f"GAMMA = {value}\n")
        forget()
        hashes.append(logged(tmp_path).tags["code_changes"])
    assert hashes[0] == hashes[2] != hashes[1]
    command = ["git", "diff", "HEAD", "--", "code/loss.py"]
    difference = subprocess.run(command, cwd=repository, check=True, capture_output=True)
    assert hashes[0] == hashlib.sha256(difference.stdout).hexdigest()[:8]


def test_a_long_diff_is_cut_and_one_that_is_not_wanted_left_out(
    repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (repository / "notes.txt").write_text(("0123456789" * 9 + "\n") * (MOST_BYTES // 90), encoding="utf-8")
    assert logged(tmp_path, log_diff=False).artifacts == []
    assert not (tmp_path / "git_diff.patch").exists()
    assert capfd.readouterr().err.endswith(": tag git_dirty\n")
    logged(tmp_path)
    content = (tmp_path / "git_diff.patch").read_bytes()
    assert MOST_BYTES - 100 < len(content) <= MOST_BYTES
    assert content.endswith(b"789\n")
    assert capfd.readouterr().err.endswith(": tag git_dirty and git_diff.patch, its first MB\n")


@pytest.mark.parametrize("missing", ["repository", "commit", "git", "answer"])
def test_without_an_answer_nothing_is_said(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    if missing == "git":
        monkeypatch.setenv("PATH", "")
    elif missing == "answer":
        (tmp_path / "git").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
        (tmp_path / "git").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(source_changes, "GIT_SECONDS", 0.1)
    else:
        alone = tmp_path / "alone"
        alone.mkdir()
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
        if missing == "commit":
            git(alone, "init", "-q")
        monkeypatch.setattr(source_changes, "PACKAGE", alone)
    run = logged(tmp_path)
    assert (run.tags, run.artifacts) == ({}, [])


def test_a_run_carries_it_after_its_first_line(
    repository: Path, tmp_path: Path, small: Callable[..., Any], call_pipeline: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On embedded data the first line is that they are; the key changes no run key."""
    (repository / "code" / "loss.py").write_text("GAMMA = 2\n")
    monkeypatch.chdir(tmp_path)
    arguments = ("--data.embedded.rows", "2000", "--max_steps", "1", "--tracking.enabled", "false")
    done = call_pipeline("train_mmoe", *arguments, "--aux_focal", "false", "--tracking.log_report", "false")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "embedded data: generated, 2,000 impressions, because data.path is null"
    assert done.stderr.count("has changes that are not committed") == 1
    config = small()
    without = config.with_values(tracking=config.tracking.model_dump() | {"log_diff": False})
    assert without.fingerprint("data") == config.fingerprint("data")
    assert {key for key in flatten(MmoeConfig()) if "log_diff" in key and not is_operational(key)} == set()
