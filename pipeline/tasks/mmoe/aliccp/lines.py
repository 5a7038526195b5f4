"""A text file as blocks of whole lines, with its digest on the way; reading goes on where an earlier process ended."""

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError

BLOCK_BYTES = 2 << 20  # read at once
MOST_LINE_BYTES = 256 << 20


class Position(NamedTuple):
    """Where reading stands; all that is needed to go on."""

    read: int = 0  # bytes of the file
    text: int = 0  # bytes of its text in whole lines that are done
    digest: str = ""  # SHA-256 (hex) of the bytes that were read


BEGINNING = Position()


class Block(NamedTuple):
    text: npt.NDArray[np.uint8]
    start: int
    end: int  # just after the last line end
    cut: bool  # the last line of the file, which had no line end (one was put there)


class Lines:
    """`blocks()` of a plain or gzip file; after the last one `position.digest` is the whole file's.

    Raises:
        UserError: the file cannot be read, is no whole gzip file, or is not what it was (`start` is of another).
    """

    def __init__(self, file: Path, start: Position = BEGINNING) -> None:
        self.file, self.position, self._start = file, start, start
        self.bytes = file.stat().st_size
        self._make_room(2 * BLOCK_BYTES)

    def blocks(self) -> Iterator[Block]:
        """Each block is valid until the next one. Once it is taken, `position` is after its lines."""
        held, skip, done = 0, self._start.text, 0
        digest = hashlib.sha256()
        read = 0
        for raw, text in self._pieces():
            digest.update(raw)
            read += len(raw)
            if read == self._start.read and digest.hexdigest() != self._start.digest:
                raise UserError(f"{self.file}: changed since its first half was prepared; start again")
            passed = min(skip, len(text))  # what an earlier process has done
            skip, done, piece = skip - passed, done + passed, text[passed:]
            if not len(piece):
                continue
            held = self._add(held, piece)
            end = self._bytes.rfind(b"\n", held - len(piece), held) + 1
            if end:
                done += end
                self.position = Position(read, done, digest.hexdigest())
                yield Block(self._text, 0, end, cut=False)
                self._text[: held - end] = self._text[end:held].copy()
                held -= end
        if held:
            self._text[held] = ord("\n")
            self.position = Position(read, done + held, digest.hexdigest())
            yield Block(self._text, 0, held + 1, cut=True)
        self.position = Position(read, done + held, digest.hexdigest())

    def _make_room(self, size: int) -> None:
        self._bytes = bytearray(size + 1)  # a byte for the line end of a cut last line
        self._text = np.frombuffer(self._bytes, dtype=np.uint8)

    def _add(self, held: int, piece: npt.NDArray[np.uint8]) -> int:
        if held + len(piece) >= len(self._text):
            if held + len(piece) > MOST_LINE_BYTES:
                raise UserError(f"{self.file}: a line over {MOST_LINE_BYTES >> 20} MiB, allowed: lines of text")
            before = self._text[:held]
            self._make_room(2 * (held + len(piece)))
            self._text[:held] = before
        self._text[held : held + len(piece)] = piece
        return held + len(piece)

    def _pieces(self) -> Iterator[tuple[memoryview, npt.NDArray[np.uint8]]]:
        """(bytes of the file, the text in them)."""
        compressed = self.file.name.endswith(".gz")
        buffer = bytearray(BLOCK_BYTES)
        inflate, whole = zlib.decompressobj(31), True
        try:
            with self.file.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    raw = memoryview(buffer)[:count]
                    if not compressed:
                        yield raw, np.frombuffer(raw, dtype=np.uint8)
                        continue
                    yield raw, np.empty(0, dtype=np.uint8)
                    rest, more = bytes(raw), False
                    if whole and stream.tell() > count:
                        rest = rest.lstrip(b"\0")  # of those that follow the last one
                    while rest or more:
                        text = inflate.decompress(rest, BLOCK_BYTES)
                        rest, whole = inflate.unconsumed_tail, inflate.eof
                        more = len(text) == BLOCK_BYTES and not whole
                        if whole:  # a gzip file may be several, one after another, and zeros
                            rest = inflate.unused_data.lstrip(b"\0")
                            inflate = zlib.decompressobj(31)
                        yield memoryview(b""), np.frombuffer(text, dtype=np.uint8)
        except zlib.error as error:
            raise UserError(f"{self.file}: not a whole gzip file ({error})") from None
        except OSError as error:
            raise UserError(f"{self.file}: {error.strerror or error}") from None
        if not whole:
            raise UserError(f"{self.file}: not a whole gzip file (it ends too early)")
