"""Generate impressions shaped like Ali-CCP: `python -m bench.impressions FOLDER ROWS` writes a folder for `train_mmoe`.

23 single-valued and 5 weighted multi-valued features, 48 ids per row, 2.27 million table rows in total. The popularity
of ids follows Zipf's law, and ids are numbered by popularity, as in `prepare_ctr`.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.schema import (
    FIRST_ID,
    SCHEMA_FILE,
    VOCABULARY_FILE,
    BaseRates,
    DataSchema,
    Feature,
    Split,
)
from pipeline.storage.files import file_sha256
from pipeline.storage.folders import made_once

SINGLE = {
    "user": 240_000, "age": 8, "gender": 3, "city_level": 5, "spending": 4, "student": 3, "group": 98, "segment": 14,
    "geography": 5, "item": 460_000, "category": 6_900, "shop": 260_000, "brand": 106_000, "scenario": 4,
    "user_category": 5_900, "user_brand": 105_000, "user_shop": 51_000, "user_item": 37_000, "page": 1_200,
    "slot": 40, "hour": 24, "weekday": 7, "device": 9_785,
}  # fmt: skip
MULTI = {  # name -> (number of distinct ids, mean number of ids per row)
    "past_categories": (6_000, 9), "past_shops": (560_000, 7), "past_brands": (190_000, 5), "past_words": (60_000, 3),
    "item_words": (170_000, 2),
}  # fmt: skip
LONGEST = 3  # longest bag, as a multiple of the mean
HELD_OUT_ROWS, CHUNK_ROWS = 20_000, 100_000
CTR, CVR = 0.04, 0.015
VERSION = 1


class Column(NamedTuple):
    """An id feature of some rows. For a single-valued feature, each row has a bag of one id with weight 1."""

    size: int  # rows of its embedding table
    offsets: npt.NDArray[np.int64]  # [rows + 1]
    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]


class Columns(NamedTuple):
    click: npt.NDArray[np.float32]
    conversion: npt.NDArray[np.float32]
    ids: dict[str, Column]


def prepared(folder: Path, rows: int) -> Path:
    """Folder of impressions with this number of training rows, created at first use."""
    return made_once(folder / f"impressions-{VERSION}-{rows}", [SCHEMA_FILE], lambda work: write(work, rows), "FOLDER")


def write(folder: Path, rows: int) -> None:
    """Write `rows` training impressions, and some for validation and test."""
    splits = {
        name: _write_split(folder / f"{name}.parquet", count, number)
        for number, (name, count) in enumerate(
            {"train": rows, "validation": HELD_OUT_ROWS, "test": HELD_OUT_ROWS}.items()
        )
    }
    sizes = SINGLE | {name: size for name, (size, _) in MULTI.items()}
    _write_vocabulary(folder / VOCABULARY_FILE, sizes)
    DataSchema(
        features=tuple(
            Feature(name=name, kind="multi", size=size + FIRST_ID, weighted=True, weight_separator=":")
            if name in MULTI else Feature(name=name, kind="categorical", size=size + FIRST_ID)
            for name, size in sizes.items()
        ),
        splits=splits,
        base_rates=BaseRates(ctr=CTR, cvr=CVR),
        vocabulary_sha256=file_sha256(folder / VOCABULARY_FILE),
        source=f"bench impressions {VERSION}, {rows} rows",
    ).write(folder)  # fmt: skip


def read(folder: Path, rows: int) -> Columns:
    """Read the first rows of the training split."""
    file = pq.ParquetFile(folder / "train.parquet")
    table = file.read_row_groups(range(min(-(-rows // CHUNK_ROWS), file.num_row_groups))).slice(0, rows)
    table = table.combine_chunks()
    ids_by_name = {}
    for name, size in SINGLE.items():
        ids = table[name].to_numpy().astype(np.int64)
        ids_by_name[name] = Column(size + FIRST_ID, np.arange(len(ids) + 1), ids, np.ones(len(ids), dtype=np.float32))
    for name, (size, _) in MULTI.items():
        lists, weights = (table[key].combine_chunks() for key in (name, f"{name}.weights"))
        offsets = lists.offsets.to_numpy().astype(np.int64)
        ids = lists.flatten().to_numpy().astype(np.int64)
        ids_by_name[name] = Column(size + FIRST_ID, offsets - offsets[0], ids, weights.flatten().to_numpy())
    labels = [table[name].to_numpy().astype(np.float32) for name in ("click", "conversion")]
    return Columns(labels[0], labels[1], ids_by_name)


def _write_split(file: Path, rows: int, number: int) -> Split:
    random = np.random.Generator(np.random.SFC64(number))
    clicks, conversions, writer = 0, 0, None
    for first in range(0, rows, CHUNK_ROWS):
        table = _chunk(random, min(CHUNK_ROWS, rows - first))
        writer = writer or pq.ParquetWriter(file, table.schema, compression="none", use_dictionary=False)
        writer.write_table(table)
        clicks += int(table["click"].to_numpy().sum())
        conversions += int(table["conversion"].to_numpy().sum())
    assert writer is not None
    writer.close()
    return Split(file=file.name, rows=rows, clicks=clicks, conversions=conversions, sha256=file_sha256(file))


def _chunk(random: np.random.Generator, rows: int) -> pa.Table:
    click = random.random(rows) < CTR
    conversion = click & (random.random(rows) < CVR)
    columns = {"click": pa.array(click.astype(np.int8)), "conversion": pa.array(conversion.astype(np.int8))}
    columns |= {name: pa.array(_skewed(random, size, rows)) for name, size in SINGLE.items()}
    for name, (size, mean) in MULTI.items():
        lengths = np.minimum(random.geometric(1 / mean, rows), LONGEST * mean)
        offsets = np.concatenate([[0], lengths.cumsum()])
        ids = _skewed(random, size, int(offsets[-1]))
        weights = random.random(len(ids), dtype=np.float32) + np.float32(0.1)
        bounds = pa.array(offsets.astype(np.int32))
        columns[name] = pa.ListArray.from_arrays(bounds, pa.array(ids))
        columns[f"{name}.weights"] = pa.ListArray.from_arrays(bounds, pa.array(weights))
    return pa.table(columns)


def _skewed(random: np.random.Generator, size: int, count: int) -> npt.NDArray[np.int32]:
    """Draw ids with frequencies proportional to about 1 / rank: the logarithm of the rank is uniform."""
    ranks = np.exp(random.random(count, dtype=np.float32) * np.float32(np.log(size + 1)))
    return np.minimum(ranks.astype(np.int32) - 1, size - 1) + np.int32(FIRST_ID)


def _write_vocabulary(file: Path, sizes: dict[str, int]) -> None:
    numbers = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes.values()])
    names = pa.DictionaryArray.from_arrays(np.repeat(np.arange(len(sizes)), list(sizes.values())), list(sizes))
    table = pa.table({
        "feature": names.cast(pa.string()),
        "value": pa.array(numbers).cast(pa.string()),
        "id": pa.array(numbers + np.int32(FIRST_ID)),
        "count": pa.array(np.zeros(len(numbers), dtype=np.int64)),  # generated, not counted
    })  # fmt: skip
    pq.write_table(table, file)


if __name__ == "__main__":
    print(prepared(Path(sys.argv[1]), int(sys.argv[2])))
