"""Uncommitted changes of the code that trains: with them, the tag of the git commit does not tell what ran."""

import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pipeline
from pipeline.names import CODE_CHANGES, GIT_DIRTY
from pipeline.runtime.console import warn
from pipeline.tracking.run import Run

PACKAGE = Path(pipeline.__file__).parent  # MLflow tags the commit of the repository that it lies in
DIFF_FILE = "git_diff.patch"
MOST_BYTES = 1_000_000
GIT_SECONDS = 10.0
COMMAND = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--")
PYTHON_FILES = ":(top)*.py"  # as git names those of the whole repository
HASH_LENGTH = 8  # hexadecimal digits


def log_source_changes(run: Run, log_diff: bool) -> None:
    """Set the tags `git_dirty` and `code_changes`, and log the diff of tracked files; nothing without git."""
    diff = uncommitted_changes(PACKAGE)
    if diff is None:
        return
    run.set_tags({GIT_DIRTY: str(bool(diff)).lower()})
    if not diff:
        return
    if code := code_changes(PACKAGE):
        run.set_tags({CODE_CHANGES: code})
    kept = f"tag {GIT_DIRTY}"
    if log_diff:
        cut = diff[:MOST_BYTES].rpartition(b"\n")[0] + b"\n"
        file = run.folder / DIFF_FILE
        file.write_bytes(cut)
        run.log_artifact(file)
        kept += f" and {DIFF_FILE}" + (", its first MB" if len(diff) > MOST_BYTES else "")
    _warn_once(f"the code that trains has changes that are not committed ({PACKAGE.parent}): {kept}")


def code_changes(folder: Path) -> str:
    """Hash of the uncommitted changes of Python files in the repository around a folder; "" if there are none."""
    diff = uncommitted_changes(folder, PYTHON_FILES)
    return hashlib.sha256(diff).hexdigest()[:HASH_LENGTH] if diff else ""


@cache
def uncommitted_changes(folder: Path, *files: str) -> bytes | None:
    """The diff of tracked files of the repository around a folder, cut after more than MOST_BYTES; b"" if clean.

    files: git's patterns of the files; all if there are none.

    Returns None if there is no repository with a commit, no git, or no answer from it. Cached, because code that is
    imported already does not change either.
    """
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # leaves the repository's index alone
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *COMMAND, *files], stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.DEVNULL, env=environment, timeout=GIT_SECONDS, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        output.seek(0)
        return output.read(MOST_BYTES + 1) if done.returncode == 0 else None


@cache
def _warn_once(message: str) -> None:
    """Warn once in a process that trains many runs."""
    warn(message)
