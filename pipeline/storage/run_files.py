"""The files of a run's folder, as its journal names them: by relative paths that stay in the folder.

A journal may come from elsewhere, and whoever delivers it may read what its author may not.
"""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.names import DELIVERED_FILE
from pipeline.storage.files import check_file, copy_contents, replacing

CURSOR_KEYS = {"run_id", "offset", "ended", "problems"}
LOGGED = "logged"  # below the run's folder: what was logged from elsewhere


def take_in(path: Path, folder: Path, place: str) -> str:
    """The relative path of a file or folder in the run's `folder`; what lies elsewhere is copied to `place` in there.

    Raises:
        OSError: it cannot be copied, or is neither a file nor a folder.
    """
    folder, found = folder.resolve(), path.resolve()
    if found.is_relative_to(folder) and found.name == path.name:
        return found.relative_to(folder).as_posix()
    copy = folder / place
    if found.is_dir():
        shutil.rmtree(copy, ignore_errors=True)
        copy_contents(found, copy)
    else:
        check_file(found)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replacing(copy) as work:
            shutil.copyfile(found, work)
    return PurePosixPath(place).as_posix()


def own_file(folder: Path, name: str) -> Path:
    """The file of the run's folder with this relative path.

    Raises:
        ValueError: the path leaves the folder or follows a link, or it is not a file.
        OSError: it is not there, or cannot be read.
    """
    return _own(folder, name, stat.S_ISREG, "not a file")


def own_folder(folder: Path, name: str) -> Path:
    """The folder in the run's folder with this relative path; it holds files and folders alone.

    Raises:
        ValueError: the path leaves the run's folder or follows a link, it is not a folder, or holds something else.
        OSError: it is not there, or cannot be read.
    """
    found = _own(folder, name, stat.S_ISDIR, "not a folder")
    for path in found.rglob("*"):
        _own(folder, path.relative_to(folder).as_posix(), lambda mode: stat.S_ISREG(mode) or stat.S_ISDIR(mode),
             "not a file")  # fmt: skip
    return found


def _own(folder: Path, name: str, is_kind: Callable[[int], bool], otherwise: str) -> Path:
    relative, path, mode = PurePosixPath(name), folder, 0
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise ValueError(f"{name}: its path leaves the run's folder")
    for part in relative.parts:
        path /= part
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise ValueError(f"{name}: {part} is a symbolic link")
    if not is_kind(mode):
        raise ValueError(f"{name}: {otherwise}")
    return path


def read_delivered(folder: Path) -> dict[str, dict[str, Any]]:
    """How far the journal came, by store: `run_id`, `offset` in bytes, `ended`, `problems`, `more_problems`.

    What is damaged, or another program's, is left out: then all is delivered again.
    """
    try:
        check_file(folder / DELIVERED_FILE)
        found = json.loads((folder / DELIVERED_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: saved for name, saved in found.items() if _is_cursor(saved)} if isinstance(found, dict) else {}


def _is_cursor(saved: object) -> bool:
    if not isinstance(saved, dict) or saved.keys() - {"more_problems"} != CURSOR_KEYS:
        return False
    run_id, offset, ended, problems = saved["run_id"], saved["offset"], saved["ended"], saved["problems"]
    return (
        type(offset) is int
        and type(saved.get("more_problems", 0)) is int
        and offset >= 0
        and all(value is None or isinstance(value, str) for value in (run_id, ended))
        and isinstance(problems, list)
        and all(isinstance(problem, str) for problem in problems)
    )


def leaves(folder: str) -> bool:
    """An artifact's folder that is not below the run's own."""
    place = PurePosixPath(folder)
    return place.is_absolute() or ".." in place.parts or "\\" in folder
