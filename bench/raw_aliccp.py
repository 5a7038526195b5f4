"""Generate raw impressions in the format of the original Ali-CCP files, to measure `prepare_ctr`.

23 single-valued and 5 weighted multi-valued fields, with about 48 ids per row in the user's common features and the
row's own features. Popularity follows Zipf's law. Some ids are above 2^24, where float32 cannot distinguish them.
"""

from pathlib import Path

import numba
import numpy as np

SKELETON_FILE, COMMON_FILE = "sample_skeleton_train.csv", "common_features_train.csv"
CLICK_RATE, CONVERSION_RATE, ORPHAN_RATE = 0.04, 0.02, 2e-5  # orphan: a conversion without a click
CHUNK_ROWS = 100_000
MOST_BYTES = 2_000  # maximum length of a line

# name, distinct ids, first id, mean number of ids per row (0: exactly one, with value 1.0)
USER_FIELDS = [
    ("101", 0, 100_000, 0),  # one id per user
    ("121", 98, 0, 0), ("122", 14, 0, 0), ("124", 3, 0, 0), ("125", 8, 0, 0), ("126", 4, 0, 0), ("127", 4, 0, 0),
    ("128", 4, 0, 0), ("129", 5, 0, 0), ("130", 400, 500, 0), ("131", 3_000, 1_000, 0), ("132", 40, 0, 0),
    ("133", 12, 0, 0),
    ("109_14", 12_000, 450_000, 6), ("110_14", 450_000, 1 << 25, 6), ("127_14", 150_000, 3_000_000, 5),
    ("150_14", 60_000, 9_000_000, 4),
]  # fmt: skip
ITEM_FIELDS = [
    ("205", 800_000, (1 << 24) - 1_000, 0), ("206", 9_000, 8_000_000, 0), ("207", 350_000, 1 << 33, 0),
    ("216", 100_000, 9_000_000, 0), ("301", 3, 0, 0), ("302", 20, 0, 0), ("303", 200, 0, 0), ("304", 2_000, 0, 0),
    ("305", 24, 0, 0), ("306", 7, 0, 0),
    ("210", 90_000, 9_500_000, 4),
]  # fmt: skip


def write_raw(folder: Path, rows: int, users: int, seed: int = 0) -> None:
    """Write `sample_skeleton_train.csv` (`rows` lines) and `common_features_train.csv` (`users` lines)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines, fields in ((COMMON_FILE, users, USER_FIELDS), (SKELETON_FILE, rows, ITEM_FIELDS)):
        names = np.frombuffer(b"".join(field[0].encode().ljust(8) for field in fields), dtype=np.uint8).reshape(-1, 8)
        widths = np.array([len(field[0]) for field in fields])
        numbers = np.array([field[1:] for field in fields], dtype=np.int64)
        buffer = np.empty(CHUNK_ROWS * MOST_BYTES, dtype=np.uint8)
        with (folder / name).open("wb") as file:
            for start in range(0, lines, CHUNK_ROWS):
                stop = min(start + CHUNK_ROWS, lines)
                end = _lines(buffer, (start, stop), (users, seed, name == COMMON_FILE), (names, widths, numbers))
                file.write(memoryview(buffer)[:end])


@numba.njit(cache=True)
def _mixed(value):
    value = np.uint64(value) + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True)
def _uniform(state):
    return (state >> np.uint64(11)) * 2.0**-53


@numba.njit(cache=True)
def _decimal(buffer, at, value):
    digits = 1
    rest = value // 10
    while rest:
        digits += 1
        rest //= 10
    for position in range(at + digits - 1, at - 1, -1):
        buffer[position] = 48 + value % 10
        value //= 10
    return at + digits


@numba.njit(cache=True)
def _hex(buffer, at, value):
    for position in range(16):
        digit = (value >> np.uint64(60 - 4 * position)) & np.uint64(15)
        buffer[at + position] = np.uint8(digit + np.uint64(48 if digit < 10 else 87))
    return at + 16


@numba.njit(cache=True)
def _lines(buffer, span, source, columns):
    """Write the lines `span` to `buffer`; returns the bytes written. A line depends only on its number and the seed."""
    users, seed, is_user = source
    names, widths, fields = columns
    counts = np.empty(len(fields), dtype=np.int64)
    at = 0
    for line in range(span[0], span[1]):
        state = _mixed(np.uint64(2 * line + is_user) ^ _mixed(np.uint64(seed)))
        if is_user:
            at = _hex(buffer, at, _mixed(np.uint64(line)))
        else:
            at = _decimal(buffer, at, line + 1)
            state = _mixed(state)
            click = _uniform(state) < CLICK_RATE
            state = _mixed(state)
            buy = _uniform(state) < (CONVERSION_RATE if click else ORPHAN_RATE)
            buffer[at : at + 5] = (44, 48 + click, 44, 48 + buy, 44)
            state = _mixed(state)
            at = _hex(buffer, at + 5, _mixed(np.uint64(_uniform(state) * users)))
        total = 0
        for field in range(len(fields)):
            state = _mixed(state)
            mean = fields[field, 2]
            counts[field] = 1 if mean == 0 else np.int64(_uniform(state) * (2 * mean + 1))
            total += counts[field]
        buffer[at] = 44
        at = _decimal(buffer, at + 1, total)
        buffer[at] = 44
        at += 1
        for field in range(len(fields)):
            for _ in range(counts[field]):
                for position in range(widths[field]):
                    buffer[at + position] = names[field, position]
                at += widths[field]
                buffer[at] = 2
                state = _mixed(state)
                rank = line
                if fields[field, 0]:  # log-uniform: the probability of rank r is about proportional to 1 / r
                    rank = np.int64(np.exp(_uniform(state) * np.log(fields[field, 0] + 1.0))) - 1
                at = _decimal(buffer, at + 1, fields[field, 1] + rank)
                buffer[at] = 3
                at += 1
                if fields[field, 2]:
                    state = _mixed(state)
                    weight = np.int64(_uniform(state) * 400_000)
                    at = _decimal(buffer, at, weight // 100_000)
                    buffer[at] = 46
                    for position in range(5):
                        buffer[at + 1 + position] = 48 + (weight // 10 ** (4 - position)) % 10
                    at += 6
                else:
                    buffer[at : at + 3] = (49, 46, 48)
                    at += 3
                buffer[at] = 1
                at += 1
        buffer[at - 1 if total else at] = 10  # overwrites the last separator
        at += 0 if total else 1
    return at
