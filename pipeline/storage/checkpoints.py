"""A training's state on disk, whole or not at all, and known to be so when it is read again.

On disk a state (`pipeline.storage.state_file`) is a *generation*, a folder of

- `state.pt`: the state;
- links: files that were there already;
- `manifest.json`, written last: format version, step, facts, and size and SHA-256 of every file.

None of them can hold code that reading would run.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import TrainingError, UserError
from pipeline.runtime.console import warn
from pipeline.storage.files import Entry, replacing, sync, write_hashed
from pipeline.storage.state_file import read_state, state_bytes, write_state

FORMAT = 2  # 1: tensors and values in two files of our own
STATE_FILE, MANIFEST_FILE = "state.pt", "manifest.json"
CHUNK = 1 << 20  # bytes of a file that are copied at a time
SPARE = 1 << 14  # bytes for a manifest, a folder and what files are rounded up to on disk
NEW, OLD = ".new", ".old"  # ends of the names of hidden folders: being written, being removed
NUMBER = re.compile(r"\d{9,}")


class Damaged(UserError):  # noqa: N818 (the word that callers read)
    """A generation is not whole: names the file and what is wrong with it."""


class OtherFormat(UserError):  # noqa: N818 (the word that callers read)
    """A generation is of another format: whole, but not for this program to read."""


class Inode(NamedTuple):
    """A file by what it is rather than by its name; one that is only ever replaced by a rename has its own for good."""

    device: int
    number: int
    size: int
    changed_ns: int


Hashes = dict[Inode, str]


class Manifest(NamedTuple):
    """What a generation's manifest says, and the bytes of all its files."""

    step: int
    facts: Mapping[str, Any]
    files: Mapping[str, Entry]
    size: int


@dataclass(frozen=True)
class Generation:
    """A state as it was read, its tensors on the CPU; `folder` holds the linked files too."""

    folder: Path
    step: int
    facts: Mapping[str, Any]
    state: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """What a save cost: bytes of the generation (links among them) and seconds."""

    bytes: int
    seconds: float


def save_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    """Write a state dict so that the file is always a complete one: the new or the one before.

    Raises:
        TrainingError: the disk does not take it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for leftover in file.parent.glob(".tmp*"):  # of safetensors, in a process that was killed
            leftover.unlink()
        with replacing(file, durable=True) as work:
            save_file(_separate(weights), work)
            work.chmod(0o644)  # safetensors closes its files to others
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{file}: {_reason(error) if isinstance(error, OSError) else error}") from None


def _separate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights on the CPU, each contiguous and in a storage of its own: safetensors takes no others."""
    found: dict[str, Tensor] = {}
    storages = set[int]()
    for name, weight in weights.items():
        tensor = weight.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, in memory of their own.

    Raises:
        Damaged: the file cannot be read or is not one of tensors.
    """
    try:
        # mapped into memory and copied: faster than its reading into memory
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except OSError as error:
        raise Damaged(f"{file}: {_reason(error)}") from None
    except SafetensorError as error:
        raise Damaged(f"{file}: found no file of tensors: {error}") from None


def write(
    folder: Path,
    state: Mapping[str, Any],
    step: int,
    facts: Mapping[str, Any] = {},
    links: Mapping[str, Path] = {},
    *,
    hashes: Hashes | None = None,
) -> int:
    """Write a generation into an empty folder; when this returns, its files survive a power cut. Returns their bytes.

    Args:
        facts: plain values, kept in the manifest.
        links: name in the generation -> a file that is replaced, never changed in place: it is linked where the file
            system can, else copied.
        hashes: of links that were hashed before; what is hashed now is added. None = hash them all.

    Raises:
        TypeError, ValueError: the state, facts or links hold something that is no part of them.
        OSError: the disk does not take it.
    """
    files = {STATE_FILE: write_state(folder / STATE_FILE, state)}
    for name, source in links.items():
        if not _is_plain(name) or name in (*files, MANIFEST_FILE):
            raise ValueError(f"links: found {name!r}, allowed: the name of a file that is not the state's own")
        files[name] = _link(source.resolve(), folder / name, {} if hashes is None else hashes)
    content = _manifest(step, facts, files)
    manifest = write_hashed(folder / MANIFEST_FILE, lambda stream: stream.write(content))
    sync(folder)
    return _total(files) + manifest.size


def read(folder: Path) -> Generation:
    """The generation in the folder, every byte of it verified.

    Raises:
        Damaged: it is not whole.
        OtherFormat: another version wrote it.
    """
    manifest = _verified(folder)
    try:
        state = read_state(folder / STATE_FILE)
    except OSError as error:
        raise Damaged(f"{folder / STATE_FILE}: {_reason(error)}") from None
    except ValueError as error:
        raise Damaged(f"{folder / STATE_FILE}: {error}") from None
    return Generation(folder, manifest.step, manifest.facts, state)


class Checkpoints:
    """A run's generations: `<run folder>/checkpoints/<step, 9 digits>/`. The run has one owner, who alone saves."""

    def __init__(
        self, folder: Path, keep_steps: Collection[int] = (), max_bytes: int | None = None, last: int = 2
    ) -> None:
        """`folder` is the run's. `last`: how many of the newest are kept; `max_bytes`: of all generations together."""
        self.folder, self.keep_steps, self.max_bytes, self.last = folder / "checkpoints", keep_steps, max_bytes, last
        self.hashes: Hashes = {}

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        facts: Mapping[str, Any],
        links: Mapping[str, Path],
        best: int | None,
    ) -> Saved:
        """Write the generation of a step, then remove those that need not stay.

        The newest ones, those of `keep_steps` and that of the step `best` stay. One that is there and whole is not
        written again.

        Raises:
            TrainingError: it does not fit, or the disk does not take it; the newest generation before it is as it was.
        """
        started = time.perf_counter()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.*"):  # of a process that was killed
                if leftover.suffix in (NEW, OLD):
                    shutil.rmtree(leftover, ignore_errors=True)
            size = self._whole(step)
            if size is None:
                self._make_room(step, state, links, best)
                size = self._write(step, state, facts, links)
            self._prune(step, best)
        except OSError as error:
            raise TrainingError(f"checkpoint of step {step} in {self.folder}: {_reason(error)}") from None
        return Saved(size, time.perf_counter() - started)

    def steps(self) -> list[int]:
        """The steps whose generations are there, in order, whole or not."""
        if not self.folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.folder.iterdir() if NUMBER.fullmatch(entry.name))

    def latest(self) -> Generation | None:
        """The newest whole generation; None where there is none. Tells of each damaged one that it passes over.

        Raises:
            OtherFormat: another version wrote it; to pass it over would begin the run again without a word.
        """
        found, damages = None, list[Damaged]()
        for step in reversed(self.steps()):
            try:
                found = self._read(step)
                break
            except Damaged as damage:
                damages.append(damage)
        instead = f"that of step {found.step} is used instead" if found else "no whole one is left"
        for each in damages:
            warn(f"damaged checkpoint: {each}; {instead}")
        return found

    def at(self, step: int) -> Generation:
        """The generation of this very step.

        Raises:
            UserError: it was not kept; names the steps that were.
            Damaged: it is not whole.
            OtherFormat: another version wrote it.
        """
        steps = self.steps()
        if step not in steps:
            kept = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self.folder}: found no checkpoint of step {step}; kept: {kept}")
        return self._read(step)

    def check_format(self) -> None:
        """Read the manifests alone.

        Raises:
            OtherFormat: another version wrote a generation.
        """
        for step in self.steps():
            with contextlib.suppress(Damaged):
                _read_manifest(self._path(step) / MANIFEST_FILE)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:09d}"

    def _read(self, step: int) -> Generation:
        generation = read(self._path(step))
        if generation.step != step:
            raise Damaged(f"{generation.folder}: found step {generation.step} in it")
        return generation

    def _whole(self, step: int) -> int | None:
        """Bytes of the step's generation if it is there and whole; what is there and is not is removed."""
        if not self._path(step).exists():
            return None
        try:
            return _verified(self._path(step)).size
        except Damaged as damage:
            warn(f"damaged checkpoint: {damage}; it is removed")
            self._remove(step)
            return None

    def _write(self, step: int, state: Mapping[str, Any], facts: Mapping[str, Any], links: Mapping[str, Path]) -> int:
        """The generation, in a hidden folder that gets its name when all is on disk."""
        work = self.folder / f".{step:09d}{NEW}"
        try:
            work.mkdir()
            size = write(work, state, step, facts, links, hashes=self.hashes)
            work.rename(self._path(step))
        finally:
            shutil.rmtree(work, ignore_errors=True)
        sync(self.folder)
        return size

    def _make_room(self, step: int, state: Mapping[str, Any], links: Mapping[str, Path], best: int | None) -> None:
        """Remove older generations that stand only for being among the last, if the new one does not fit beside them.

        The newest whole one always stays.

        Raises:
            TrainingError: it does not fit all the same.
        """
        lacking = self._lacking(step, state, links)
        if lacking is None:
            return
        before = [kept for kept in self.steps() if kept < step]
        while before and self._whole(before[-1]) is None:
            before.pop()
        for kept in before[:-1]:
            if kept in self.keep_steps or kept == best:
                continue
            self._remove(kept)
            lacking = self._lacking(step, state, links)
            if lacking is None:
                return
        if lacking := self._lacking(step, state, links):
            raise TrainingError(lacking)

    def _lacking(self, step: int, state: Mapping[str, Any], links: Mapping[str, Path]) -> str | None:
        """What stands against writing the generation, in words; None where it fits."""
        size = state_bytes(state) + SPARE
        linked = {name: source.stat() for name, source in links.items()}
        copied = sum(stat.st_size for stat in linked.values() if stat.st_dev != self.folder.stat().st_dev)
        limits = {"the disk": (size + copied, shutil.disk_usage(self.folder).free)}
        if self.max_bytes is not None:
            taken = [file.stat() for file in self.folder.glob("*/*")]
            held = {(stat.st_dev, stat.st_ino): stat.st_size for stat in taken}  # a file that several share counts once
            new = sum(stat.st_size for stat in linked.values() if (stat.st_dev, stat.st_ino) not in held)
            limits["checkpoint.max_gb"] = (size + new, max(0, self.max_bytes - sum(held.values())))
        for what, (needed, available) in limits.items():
            if needed > available:
                return (f"checkpoint of step {step} in {self.folder}: needs {needed:,} bytes, "
                        f"{what} has {available:,} left")  # fmt: skip
        return None

    def _prune(self, step: int, best: int | None) -> None:
        """Remove all that need not stay; those after `step` are damaged, or the run would not be there again."""
        steps = self.steps()
        stay = {*[kept for kept in steps if kept <= step][-self.last :], *self.keep_steps, best}
        for kept in steps:
            if kept not in stay:
                self._remove(kept)

    def _remove(self, step: int) -> None:
        """Gone at once: what a kill leaves of it has no number."""
        hidden = self.folder / f".{step:09d}{OLD}"
        self._path(step).rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _link(source: Path, target: Path, hashes: Hashes) -> Entry:
    """The file under another name, or a copy of it."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        with source.open("rb") as stream:
            return write_hashed(target, lambda copy: shutil.copyfileobj(stream, copy, CHUNK))
    with target.open("rb") as stream:
        os.fsync(stream.fileno())
        stat = os.fstat(stream.fileno())
        inode = Inode(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if inode not in hashes:
            hashes[inode] = hashlib.file_digest(stream, "sha256").hexdigest()
    return Entry(inode.size, hashes[inode])


def _manifest(step: int, facts: Mapping[str, Any], files: Mapping[str, Entry]) -> bytes:
    listed = {name: entry._asdict() for name, entry in files.items()}
    content = {"format": FORMAT, "step": step, "facts": dict(facts), "files": listed}
    return json.dumps(content | {"sha256": _seal(content)}, indent=2, allow_nan=False).encode()


def _seal(content: Mapping[str, Any]) -> str:
    """The hash of a manifest without its hash."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _verified(folder: Path) -> Manifest:
    """The manifest of a generation, once every file is what it says.

    Raises:
        Damaged: names the first file that is not.
        OtherFormat: another version wrote it.
    """
    manifest = _read_manifest(folder / MANIFEST_FILE)
    for name, entry in manifest.files.items():
        file = folder / name
        try:
            found = file.stat().st_size
            if found != entry.size:
                raise Damaged(f"{file}: found {found:,} bytes, expected {entry.size:,}")
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise Damaged(f"{file}: {_reason(error)}") from None
        if digest != entry.sha256:
            raise Damaged(f"{file}: found SHA-256 {digest[:12]}..., expected {entry.sha256[:12]}...")
    return manifest


def _read_manifest(file: Path) -> Manifest:
    try:
        text = file.read_bytes()
        content = json.loads(text)
        version, seal = content["format"], content.pop("sha256")
        if seal != _seal(content):
            raise Damaged(f"{file}: found other content than was written")
        if version != FORMAT:  # asked second: a flipped bit makes no other format
            raise OtherFormat(f"{file}: found checkpoint format {version!r}, this program reads {FORMAT}; resume with "
                              "the version of focal-pipeline that wrote it, or delete "
                              f"{file.parent.parent} to train from the beginning")  # fmt: skip
        files = {name: Entry(entry["size"], entry["sha256"]) for name, entry in content["files"].items()}
        if STATE_FILE not in files or not all(map(_is_plain, files)):
            raise Damaged(f"{file}: found files {', '.join(map(repr, files))}")
        return Manifest(content["step"], content["facts"], files, _total(files) + len(text))
    except OSError as error:
        raise Damaged(f"{file}: {_reason(error)}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise Damaged(f"{file}: found no manifest in it") from None


def _total(files: Mapping[str, Entry]) -> int:
    return sum(entry.size for entry in files.values())


def _is_plain(name: str) -> bool:
    """The name is of a file in the folder itself."""
    return name == Path(name).name and name not in ("", "..") and "\0" not in name


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
