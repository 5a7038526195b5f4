"""The first pass over raw Ali-CCP files: users and rows to spills of codes, and how often each id comes."""

import codecs
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.tasks.mmoe.aliccp import kernels
from pipeline.tasks.mmoe.aliccp.config import MOST_FIELDS, MOST_NAME_BYTES, RawSource
from pipeline.tasks.mmoe.aliccp.lines import Block, Lines, Position
from pipeline.tasks.mmoe.aliccp.work import Kept, Work
from pipeline.tasks.mmoe.encoding import splitmix64
from pipeline.tasks.mmoe.schema import MISSING_TEXT, SPLITS

SLOTS = 1 << 23  # of the table of ids at the start; memory is taken as it is filled
KEEP_SECONDS = 30.0  # progress is kept so often
HEADERS = {
    True: b"index,feat_num,feat_list",
    False: b"sample_id,click,buy,common_feature_index,feat_num,feat_list",
}  # common features, skeleton
_ALLOWED = {
    True: "index,feat_num,feat_list",
    False: "sample_id,click (0 or 1),buy (0 or 1),common_feature_index,feat_num,feat_list",
}
_KINDS = {"auto": kernels.AUTO, "categorical": kernels.CATEGORICAL, "multi": kernels.MULTI, "ignore": kernels.IGNORED}
_ORPHANS = {"drop": kernels.DROP, "no_conversion": kernels.NO_CONVERSION, "click": kernels.CLICK}

Progress = Callable[[str, int, float], None]  # what is being done, rows of it so far, the share that is done


class Input(NamedTuple):
    """A raw file in the order in which they are read."""

    file: Path
    common: bool  # common features, else the skeleton
    group: int  # 0 = training files, 1 = test files


def users_file(group: int) -> str:
    return f"users-{group}.words"


def rows_file(split: str) -> str:
    return f"{split}.words"


class Scan:
    """The ids, fields, users and counts of raw files; `run` reads the files, and goes on with what `work` holds."""

    def __init__(self, source: RawSource, inputs: list[Input]) -> None:
        self.source, self.inputs = source, inputs
        self.table = _empty_table(SLOTS)
        self.fields = kernels.Fields(
            np.zeros((MOST_FIELDS, MOST_NAME_BYTES), dtype=np.uint8),
            np.zeros(MOST_FIELDS, dtype=np.int64),
            np.zeros(MOST_FIELDS, dtype=np.uint64),
            np.zeros((MOST_FIELDS, 6), dtype=np.int64),
            np.zeros(MOST_FIELDS, dtype=np.int64),
            np.array([0, _KINDS[source.other_fields]], dtype=np.int64),
        )
        self.counters = np.zeros((len(inputs), kernels.COUNTERS), dtype=np.int64)
        self.user_rows = np.zeros(0, dtype=np.int32)  # training rows of each user of the training files
        self.malformed = [0] * len(inputs)
        self.cut = [0] * len(inputs)
        self.split_rows = np.zeros(len(SPLITS), dtype=np.int64)
        self.digests = [""] * len(inputs)
        self.spills: dict[str, int] = {}  # name -> bytes
        self._words: list[list[npt.NDArray[np.int32]]] = [[], []]
        self._rules = [_rules(source, input_.group) for input_ in inputs]
        for name, feature in source.features.items():
            text = np.frombuffer(name.encode(), dtype=np.uint8)
            number = self.fields.used[0]
            self.fields.names[number, : len(text)] = text
            self.fields.lengths[number] = len(text)
            self.fields.packed[number] = kernels.packed(text, 0, len(text))
            self.fields.facts[number, kernels.KIND] = _KINDS[feature.kind]
            self.fields.used[0] += 1
        self._room_for(1 << 16)

    def names(self) -> list[str]:
        """Of the fields, by their number."""
        return [
            self.fields.names[number, : self.fields.lengths[number]].tobytes().decode()
            for number in range(self.fields.used[0])
        ]

    def user_words(self, group: int) -> npt.NDArray[np.int32]:
        """[users] words of each user of a group in its spill."""
        self._words[group] = [np.concatenate([np.zeros(0, dtype=np.int32), *self._words[group]])]
        return self._words[group][0]

    def run(
        self, work: Work, identity: str, kept: Kept, progress: Progress, keep_seconds: float = KEEP_SECONDS
    ) -> None:
        """Read what is not read yet."""
        first, position = self._restore(kept) if kept.facts else (0, Position())
        for number in range(first, len(self.inputs)):
            taken = self.inputs[number]
            if not taken.common:
                rows = np.zeros(len(self.user_words(taken.group)), dtype=np.int32)
                if taken.group == 0 and not len(self.user_rows):
                    self.user_rows = rows
                self._counted_rows = self.user_rows if taken.group == 0 else rows
            lines = Lines(taken.file, position)
            due = time.monotonic() + keep_seconds
            with Spills(work.folder, self._spill_names(number), self.spills) as spills:
                for block in lines.blocks():
                    self._block(number, block, spills)
                    done = int(self.counters[number, kernels.LINES])
                    progress(taken.file.name, done, lines.position.read / max(1, lines.bytes))
                    if time.monotonic() >= due:
                        self._keep(work, identity, number, lines.position)
                        due = time.monotonic() + keep_seconds
            self.digests[number] = lines.position.digest
            position = Position()
            self._keep(work, identity, number + 1, position)

    def _spill_names(self, number: int) -> list[str]:
        taken = self.inputs[number]
        return [users_file(taken.group)] if taken.common else [rows_file(split) for split in SPLITS]

    def _block(self, number: int, block: Block, spills: "Spills") -> None:
        taken, counters = self.inputs[number], self.counters[number]
        if len(block.text) > self._bytes:
            self._room_for(len(block.text))
        self._spill.used[:] = 0
        self._spill.rows[:] = 0
        at = block.start
        if counters[kernels.LINES] == 0:
            at = _after_header(block, taken.common)
            counters[kernels.LINES] += at > 0
        end = _before_cut_line(block, at)
        self._lines(number, block, at, end)
        if end < block.end:
            counters[kernels.LINES] += 1
            self.cut[number] = 1
        if not taken.common:
            self.split_rows += self._spill.rows
        else:
            self._words[taken.group].append(self._spill.lengths[: self._spill.rows[0]].copy())
        for spill, (words, used) in enumerate(zip(self._spill.words, self._spill.used, strict=True)):
            if used:
                spills.write(spill, words[:used])

    def _lines(self, number: int, block: Block, at: int, end: int) -> None:
        taken, rules = self.inputs[number], self._rules[number]
        while True:
            state: tuple[Any, ...] = (self.table, self.fields, self.counters[number])
            if taken.common:
                ended, at = kernels.scan_common((block.text, at, end), self._parsed, state, self._spill, rules)
            else:
                state = (*state, self._counted_rows)
                ended, at = kernels.scan_skeleton((block.text, at, end), self._parsed, state, self._spill, rules)
            if ended == kernels.DONE:
                return
            if ended == kernels.GROW:
                self._grow(len(block.text))
            elif ended == kernels.TOO_MANY_FIELDS:
                raise UserError(f"{taken.file}: over {MOST_FIELDS} fields, allowed: as many at most")
            else:
                at = self._pass_over(number, block, at)

    def _pass_over(self, number: int, block: Block, at: int) -> int:
        """Leave out a malformed line, if that is allowed; where the next one begins."""
        taken, counters = self.inputs[number], self.counters[number]
        end = at + int(np.argmax(block.text[at : block.end] == ord("\n")))
        counters[kernels.LINES] += 1
        if block.cut and end + 1 == block.end:
            self.cut[number] = 1
            return end + 1
        self.malformed[number] += 1
        if self.malformed[number] > self.source.malformed_lines:
            found = bytes(block.text[at : min(end, at + 60)]).decode(errors="backslashreplace")
            raise UserError(
                f"{taken.file}: line {counters[kernels.LINES]}: found {found!r}{'...' if end > at + 60 else ''}, "
                f"allowed: {_ALLOWED[taken.common]}, the features as field\\x02id\\x03number joined by \\x01"
            )
        return end + 1

    def _grow(self, line: int) -> None:
        """Twice as much room for codes or texts, and what a line of so many bytes may need."""
        codes, letters = (int(number) for number in self.table.used)
        slots = len(self.table.slots)
        while (codes + line // 5 + 2) * 5 > slots * 3:
            slots *= 2
        old = self.table[1:5]
        self.table = self.table._replace(slots=old[0][:0])  # before there are others: they are large
        new = _empty_table(slots, max(len(old[3]), 2 * (letters + 2 * line)))
        for source, copy, used in zip(old, new[1:5], (codes, codes, codes, letters), strict=True):
            copy[:used] = source[:used]
        new.used[:] = codes, letters
        kernels.rehash(new)
        self.table = new

    def finish(self) -> None:
        """Let go of what only reading needs."""
        self.table = self.table._replace(slots=self.table.slots[:1].copy())
        self._room_for(0)

    def _keep(self, work: Work, identity: str, number: int, position: Position) -> None:
        facts = {
            "identity": identity, "stage": "scan", "spills": self.spills, "input": number, "position": position,
            "malformed": self.malformed, "cut": self.cut, "digests": self.digests,
        }  # fmt: skip
        codes, letters = self.table.used
        arrays = {"texts": self.table.texts[:letters]}
        arrays |= {name: getattr(self.table, name)[:codes] for name in ("keys", "owners", "values")}
        arrays |= {f"field_{name}": array for name, array in self.fields._asdict().items()}
        arrays |= {name: getattr(self, name) for name in ("counters", "user_rows", "split_rows")}
        work.save(facts, arrays | {f"user_words_{group}": self.user_words(group) for group in range(2)})

    def _restore(self, kept: Kept) -> tuple[int, Position]:
        facts, arrays = kept
        self.malformed, self.cut, self.digests = facts["malformed"], facts["cut"], facts["digests"]
        self.spills = facts["spills"]
        codes, letters = len(arrays["keys"]), len(arrays["texts"])
        slots = max(SLOTS, 1 << (5 * codes // 3).bit_length())
        self.table = _empty_table(slots, letters)
        self.table.keys[:codes], self.table.owners[:codes] = arrays["keys"], arrays["owners"]
        self.table.values[:codes], self.table.texts[:letters] = arrays["values"], arrays["texts"]
        self.table.used[:] = codes, letters
        kernels.rehash(self.table)
        self.fields = kernels.Fields(**{name: arrays[f"field_{name}"] for name in kernels.Fields._fields})
        for name in ("counters", "user_rows", "split_rows"):
            setattr(self, name, arrays[name])
        self._words = [[arrays["user_words_0"]], [arrays["user_words_1"]]]
        return facts["input"], Position(*facts["position"])

    def _room_for(self, size: int) -> None:
        """Buffers for what a block of `size` bytes may hold: a feature has 5 bytes at least, a line without one 3."""
        features = size // 5 + 1
        self._bytes = size
        self._parsed = kernels.Parsed(
            np.empty((features, 4), dtype=np.int64),
            np.empty(features, dtype=np.uint64),
            np.empty(features, dtype=np.bool_),
            np.empty(features, dtype=np.float64),
            np.empty(features, dtype=np.uint64),
            np.empty(features, dtype=np.int64),
            np.empty(features, dtype=np.int64),
        )
        words = np.empty((len(SPLITS), 2 * features + 64), dtype=np.int32)
        self._spill = kernels.Spill(
            words,
            words.view(np.float32),
            np.zeros(len(SPLITS), dtype=np.int64),
            np.zeros(len(SPLITS), dtype=np.int64),
            np.empty(size // 4 + 1, dtype=np.int32),
        )


class Spills:
    """Files of words that grow; `sizes` (name -> valid bytes) is kept up to date, and what is beyond is cut off."""

    def __init__(self, folder: Path, names: list[str], sizes: dict[str, int]) -> None:
        self.folder, self.names, self.sizes = folder, names, sizes

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._files = []
            for name in self.names:
                file = stack.enter_context((self.folder / name).open("ab", buffering=0))
                file.truncate(self.sizes.setdefault(name, 0))
                self._files.append(file)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, number: int, words: npt.NDArray[np.int32]) -> None:
        rest = words.view(np.uint8).data
        while rest:
            rest = rest[self._files[number].write(rest) :]
        self.sizes[self.names[number]] += words.nbytes


def _rules(source: RawSource, group: int) -> kernels.Rules:
    split = source.split
    texts = [text.encode() for text in MISSING_TEXT if text]
    return kernels.Rules(
        orphans=_ORPHANS[source.conversion_without_click],
        drop_without_common=source.without_common_features == "drop",
        by_index=split.by == "common_feature_index",
        seed=splitmix64(np.array([split.seed % 2**64], dtype=np.uint64))[0],
        borders=np.array([split.train, split.train + split.validation]),
        fixed_split=-1 if group == 0 else SPLITS.index("test"),
        index_space=group,
        missing=np.frombuffer(b"".join(texts), dtype=np.uint8),
        missing_ends=np.cumsum([len(text) for text in texts]),
    )


def _empty_table(slots: int, letters: int = 1 << 20) -> kernels.Table:
    """Without codes. Of zeros, memory is taken where they are written over."""
    codes = slots * 3 // 5
    return kernels.Table(
        np.zeros((slots, 2), dtype=np.uint64),
        np.zeros(codes, dtype=np.uint64),
        np.zeros(codes, dtype=np.int32),
        np.zeros(codes, dtype=np.int64),
        np.zeros(letters, dtype=np.uint8),
        np.zeros(2, dtype=np.int64),
    )


def _after_header(block: Block, common: bool) -> int:
    """Where the first line of data begins: some put the columns' names before it."""
    start = bytes(block.text[: min(block.end, 200)])
    skipped = 3 if start.startswith(codecs.BOM_UTF8) else 0
    line = start[skipped:].split(b"\n", 1)[0]
    return skipped + len(line) + 1 if line.strip() == HEADERS[common] else skipped


def _before_cut_line(block: Block, at: int) -> int:
    """Where the whole lines end: a last line without a line end that has fewer features than it says is cut."""
    if not block.cut:
        return block.end
    line = bytes(block.text[at : block.end - 1]).rsplit(b"\n", 1)[-1]
    _, _, rest = line.rpartition(b",")
    claimed = line[: -len(rest) - 1].rpartition(b",")[2]
    features = rest.count(b"\x01") + 1 if rest else 0
    whole = claimed.isdigit() and int(claimed) <= features
    return block.end if whole else block.end - 1 - len(line)
