"""Format of a checkpoint: a folder with a manifest of hashes, by which damage is detected.

- `state.pt`: the training state (`pipeline.storage.state_file`);
- links to existing files, such as the best weights;
- `manifest.json`, written last: format version, step, facts, and size and SHA-256 of every file.

Reading a checkpoint never runs code from it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError, os_errors
from pipeline.runtime.platform_support import sync_path
from pipeline.storage.files import Damaged, Entry, file_sha256, write_hashed
from pipeline.storage.state_file import read_state, write_state

FORMAT = 2  # format 1: tensors and values in two files of a custom format
STATE_FILE, MANIFEST_FILE = "state.pt", "manifest.json"


class Manifest(NamedTuple):
    """Content of a manifest, and the size in bytes of the whole checkpoint."""

    step: int
    facts: Mapping[str, Any]
    files: Mapping[str, Entry]
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. Tensors are on the CPU; `folder` also contains the linked files."""

    folder: Path
    step: int
    facts: Mapping[str, Any]
    state: dict[str, Any]


def write_checkpoint(
    folder: Path,
    state: Mapping[str, Any],
    step: int,
    facts: Mapping[str, Any] = {},
    links: Mapping[str, Path] = {},
) -> int:
    """Write a checkpoint into an empty folder and sync it to the disk; returns its size in bytes.

    Args:
        facts: plain values for the manifest.
        links: name in the checkpoint -> file to link, or to copy if the file system cannot link. The file may be
            replaced later, but must not be modified in place.

    Raises:
        TypeError, ValueError: the state or facts contain something that cannot be saved.
        OSError: the disk is full or fails.
    """
    files = {STATE_FILE: write_state(folder / STATE_FILE, state)}
    for name, source in links.items():
        files[name] = _link(source.resolve(), folder / name)
    content = _manifest(step, facts, files)
    manifest = write_hashed(folder / MANIFEST_FILE, lambda stream: stream.write(content))
    sync_path(folder)
    return sum(entry.size for entry in files.values()) + manifest.size


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        Damaged: a file is missing or differs from the manifest.
        UserError: the checkpoint has the format of another version.
    """
    manifest = verify(folder)
    try:
        with os_errors(folder / STATE_FILE, Damaged):
            state = read_state(folder / STATE_FILE)
    except ValueError as error:
        raise Damaged(f"{folder / STATE_FILE}: {error}") from None
    return Checkpoint(folder, manifest.step, manifest.facts, state)


def verify(folder: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Raises:
        Damaged: a file is missing or differs; the message names the first one.
        UserError: the checkpoint has the format of another version.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        file = folder / name
        with os_errors(file, Damaged):
            size = file.stat().st_size
            if size != entry.size:
                raise Damaged(f"{file}: found {size:,} bytes, expected {entry.size:,}")
            digest = file_sha256(file)
        if digest != entry.sha256:
            raise Damaged(f"{file}: found SHA-256 {digest[:12]}..., expected {entry.sha256[:12]}...")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        Damaged: the manifest is missing, invalid or changed.
        UserError: the checkpoint has the format of another version.
    """
    file = folder / MANIFEST_FILE
    with os_errors(file, Damaged):
        text = file.read_bytes()
    try:
        content = json.loads(text)
        version, seal = content["format"], content.pop("sha256")
        if seal != _seal(content):
            raise Damaged(f"{file}: found other content than was written")
        if version != FORMAT:  # checked after the hash: a flipped bit is damage, not another format
            raise UserError(f"{file}: found checkpoint format {version!r}, this program reads {FORMAT}; resume with "
                            "the version of focal-pipeline that wrote it, or delete "
                            f"{file.parent.parent} to train from the beginning")  # fmt: skip
        files = {name: Entry(entry["size"], entry["sha256"]) for name, entry in content["files"].items()}
        if STATE_FILE not in files or not all(map(_is_file_name, files)):
            raise Damaged(f"{file}: found files {', '.join(map(repr, files))}")
        size = sum(entry.size for entry in files.values()) + len(text)
        return Manifest(content["step"], content["facts"], files, size)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise Damaged(f"{file}: found no manifest in it") from None


def _link(source: Path, target: Path) -> Entry:
    try:
        os.link(source, target)
    except OSError:  # on another file system, or links are not supported
        with source.open("rb") as stream:
            return write_hashed(target, lambda copy: shutil.copyfileobj(stream, copy))
    sync_path(target)
    return Entry(target.stat().st_size, file_sha256(target))


def _manifest(step: int, facts: Mapping[str, Any], files: Mapping[str, Entry]) -> bytes:
    entries = {name: entry._asdict() for name, entry in files.items()}
    content = {"format": FORMAT, "step": step, "facts": dict(facts), "files": entries}
    return json.dumps(content | {"sha256": _seal(content)}, indent=2, allow_nan=False).encode()


def _seal(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, apart from this hash."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_file_name(name: str) -> bool:
    return name == Path(name).name and name not in ("", "..") and "\0" not in name
