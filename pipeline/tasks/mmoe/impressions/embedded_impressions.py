"""Generated impressions whose true click and conversion probabilities are known.

Users and items have skewed popularity and latent tastes, determined by their features (age, city, interests; category,
tags) and a little noise. A click is more likely if the tastes match. A conversion given a click depends on the same
match, on the price and on the user's activity. The true probabilities give the Bayes AUC, the best that a model can be
expected to reach.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.layout import consecutive
from pipeline.data.schema import (
    FIRST_ID,
    LABELS,
    SCHEMA_FILE,
    VOCABULARY_FILE,
    DataSchema,
    Feature,
    Split,
)
from pipeline.maths.arrays import Floats, Ints
from pipeline.storage.files import file_sha256
from pipeline.storage.folders import made_once
from pipeline.tasks.mmoe.config import EmbeddedDataConfig

GENERATOR_VERSION = 1  # change this whenever the generated data change
CHUNK_ROWS = 100_000
CTR, CVR = 0.04, 0.03
SHARES = {"train": 0.8, "validation": 0.1}
USERS, ITEMS, TASTES = 2_000, 500, 2
SIZES = {"user": USERS, "item": ITEMS, "age": 8, "city": 40, "interests": 30, "category": 20, "tags": 60,
         "hour": 24, "device": 4, "slot": 6}  # fmt: skip
MULTI = ("interests", "tags")
NUMERIC_EDGES = 33


class Bags(NamedTuple):
    """A bag of weighted ids for each user or item."""

    offsets: Ints  # [n + 1]
    ids: Ints
    weights: Floats  # sum to 1 within each bag

    def mean(self, vectors: Floats) -> Floats:
        """Weighted mean of the bag's vectors; 0 for an empty bag. vectors [ids, K] -> [n, K]."""
        owner = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        result = np.zeros((len(self.offsets) - 1, vectors.shape[1]))
        np.add.at(result, owner, vectors[self.ids] * self.weights[:, None])
        return result

    def take(self, rows: Ints) -> "Bags":
        size = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(size)])
        flat = consecutive(self.offsets[rows], size)
        return Bags(offsets, self.ids[flat], self.weights[flat])


class World:
    """Properties of users, items and contexts, determined by the seed alone."""

    def __init__(self, seed: int) -> None:
        random = _stream(seed, 1, GENERATOR_VERSION)
        self.popularity = {name: _popularity(SIZES[name], random) for name in ("user", "item")}
        self.user = {name: _skewed(random, SIZES[name], USERS) for name in ("age", "city")}
        self.item = {"category": _skewed(random, SIZES["category"], ITEMS)}
        self.interests = _bags(random, USERS, SIZES["interests"], least=1, most=4)
        self.tags = _bags(random, ITEMS, SIZES["tags"], least=0, most=4)
        self.activity = random.gamma(2.0, 1.0, USERS)
        self.price = np.exp(random.normal(3, 0.8, ITEMS) + 0.02 * self.item["category"])

        def normal(size: int, scale: float, columns: int = 1) -> Floats:
            return random.normal(0, scale, (size, columns))

        self.user_taste = normal(SIZES["age"], 0.4, TASTES)[self.user["age"]] + self.interests.mean(
            normal(SIZES["interests"], 0.4, TASTES)
        )
        self.item_taste = normal(SIZES["category"], 0.7, TASTES)[self.item["category"]]
        self.user_bias = (
            normal(SIZES["city"], 0.4)[self.user["city"]] + self.interests.mean(normal(SIZES["interests"], 0.6))
            + normal(USERS, 0.05)
        )[:, 0]  # fmt: skip
        self.item_bias = (
            normal(SIZES["category"], 0.5)[self.item["category"]] + self.tags.mean(normal(SIZES["tags"], 0.5))
            + normal(ITEMS, 0.1)
        )[:, 0]  # fmt: skip
        self.hour_bias = 0.5 * np.sin(2 * np.pi * (np.arange(24) - 14) / 24)
        self.device_bias = random.normal(0, 0.5, SIZES["device"])
        self.slot_bias = -0.3 * np.arange(SIZES["slot"])
        self.age_bias = np.linspace(-0.6, 0.6, SIZES["age"])
        self.intercept = np.zeros(2)
        p_ctr, p_cvr = self._rows(_stream(seed, 2), 200_000)[1:3]
        logits = [np.log(p / (1 - p)) for p in (p_ctr, p_cvr)]
        first = _intercept(logits[0], np.ones(len(p_ctr)), CTR)
        weights = 1 / (1 + np.exp(-(logits[0] + first)))  # weight rows by p_ctr, because CVR is defined on clicks
        self.intercept = np.array([first, _intercept(logits[1], weights, CVR)])

    def _rows(self, random: np.random.Generator, count: int) -> tuple[dict[str, Ints], Floats, Floats]:
        ids = {name: np.searchsorted(self.popularity[name], random.random(count)) for name in ("user", "item")}
        ids |= {name: random.integers(0, SIZES[name], count) for name in ("hour", "device", "slot")}
        user, item = ids["user"], ids["item"]
        ids |= {name: values[user] for name, values in self.user.items()}
        ids |= {name: values[item] for name, values in self.item.items()}
        match = np.einsum("nk,nk->n", self.user_taste[user], self.item_taste[item])
        dear = np.log(self.price[item]) - 3.3
        ctr = (
            self.intercept[0] + match + self.user_bias[user] + self.item_bias[item] - 0.2 * dear**2
            + self.hour_bias[ids["hour"]] + self.device_bias[ids["device"]] + self.slot_bias[ids["slot"]]
        )  # fmt: skip
        cvr = (
            self.intercept[1] + 0.5 * match - 0.8 * dear + 0.25 * (self.activity[user] - 2)
            + self.age_bias[ids["age"]] + self.hour_bias[ids["hour"]]
        )  # fmt: skip
        return ids, 1 / (1 + np.exp(-ctr)), 1 / (1 + np.exp(-cvr))

    def chunk(self, seed: int, number: int, count: int) -> pa.Table:
        """Generate chunk `number` of `count` impressions: columns of a Parquet split, with the true probabilities."""
        random = _stream(seed, 3, number)
        ids, p_ctr, p_cvr = self._rows(random, count)
        click = random.random(count) < p_ctr
        conversion = click & (random.random(count) < p_cvr)
        columns: dict[str, pa.Array] = {
            "click": pa.array(click.astype(np.int8)),
            "conversion": pa.array(conversion.astype(np.int8)),
        }
        bags = {"interests": self.interests.take(ids["user"]), "tags": self.tags.take(ids["item"])}
        for name in SIZES:
            if name in MULTI:
                offsets = pa.array(bags[name].offsets.astype(np.int32))
                values = pa.array((bags[name].ids + FIRST_ID).astype(np.int32))
                columns[name] = pa.ListArray.from_arrays(offsets, values)
                if name == "interests":
                    weights = pa.array(bags[name].weights.astype(np.float32))
                    columns["interests.weights"] = pa.ListArray.from_arrays(offsets, weights)
            else:
                columns[name] = pa.array((ids[name] + FIRST_ID).astype(np.int32))
        columns["price"] = pa.array(self.price[ids["item"]].astype(np.float32))
        columns["activity"] = pa.array(self.activity[ids["user"]].astype(np.float32))
        return pa.table(columns | {"p_ctr": pa.array(p_ctr), "p_cvr": pa.array(p_cvr)})


def embedded_data(config: EmbeddedDataConfig) -> Path:
    """Folder of the generated data, which are created at first use and kept in the cache.

    Raises:
        UserError: the cache folder cannot be written.
    """
    settings = {"generator": GENERATOR_VERSION, "rows": config.rows, "seed": config.seed}
    name = "impressions-" + hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    folder = Path(config.cache) / name
    return made_once(
        folder, [SCHEMA_FILE], lambda work: generate(work, config.rows, config.seed), "data.embedded.cache"
    )


def generate(folder: Path, rows: int, seed: int) -> DataSchema:
    """Write `rows` impressions into the folder, one chunk at a time."""
    world = World(seed)
    train_end = int(rows * SHARES["train"])
    ends = {"train": train_end, "validation": train_end + int(rows * SHARES["validation"]), "test": rows}
    splits, start, number = {}, 0, 0
    for split, end in ends.items():
        file, first, sums = folder / f"{split}.parquet", start, dict.fromkeys(LABELS, 0)
        writer = None
        while start < end:
            count = min(CHUNK_ROWS, end - start)
            table = world.chunk(seed, number, count)
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
            for label in LABELS:
                sums[label] += int(table[label].to_numpy().sum())
            start, number = start + count, number + 1
        if writer:
            writer.close()
        splits[split] = Split(
            file=file.name, rows=start - first, clicks=sums["click"], conversions=sums["conversion"],
            sha256=file_sha256(file),
        )  # fmt: skip
    _write_vocabulary(folder / VOCABULARY_FILE)
    features = [
        Feature(name=name, kind="multi" if name in MULTI else "categorical", size=size + FIRST_ID,
                weighted=name == "interests", weight_separator=":" if name == "interests" else None)
        for name, size in SIZES.items()
    ]  # fmt: skip
    features += [
        Feature(
            name=name, kind="numeric", edges=tuple(np.unique(np.quantile(values, np.linspace(0, 1, NUMERIC_EDGES))))
        )
        for name, values in (("price", world.price), ("activity", world.activity))
    ]
    schema = DataSchema(
        features=tuple(features),
        splits=splits,
        base_rates=splits["train"].base_rates,
        vocabulary_sha256=file_sha256(folder / VOCABULARY_FILE),
        truth=True,
        source=f"generator {GENERATOR_VERSION}, {rows} rows, seed {seed}",
    )
    schema.write(folder)
    return schema


def _write_vocabulary(file: Path) -> None:
    names = [name for name, size in SIZES.items() for _ in range(size)]
    numbers = np.concatenate([np.arange(size) for size in SIZES.values()])
    table = pa.table({
        "feature": pa.array(names),
        "value": pa.array([str(number) for number in numbers]),
        "id": pa.array((numbers + FIRST_ID).astype(np.int32)),
        "count": pa.array(np.zeros(len(numbers), dtype=np.int64)),  # generated, not counted
    })  # fmt: skip
    pq.write_table(table, file)


def _stream(seed: int, kind: int, number: int = 0) -> np.random.Generator:
    """Independent random stream for each (kind, number). NumPy pads seeds with zeros, so the last word is not 0."""
    return np.random.Generator(np.random.PCG64([seed, kind, number + 1]))


def _popularity(size: int, random: np.random.Generator) -> Floats:
    """Cumulative popularity of ids in random order, Zipf-like with exponent 0.8."""
    shares = random.permutation(1 / np.arange(1, size + 1) ** 0.8)
    cumulative = np.cumsum(shares / shares.sum())
    cumulative[-1] = 1.0
    return cumulative


def _skewed(random: np.random.Generator, size: int, count: int) -> Ints:
    return np.searchsorted(_popularity(size, random), random.random(count))


def _bags(random: np.random.Generator, count: int, size: int, least: int, most: int) -> Bags:
    lengths = random.integers(least, most + 1, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    weights = random.uniform(0.2, 1.0, offsets[-1])
    owner = np.repeat(np.arange(count), lengths)
    total = np.bincount(owner, weights=weights, minlength=count)
    return Bags(offsets, random.integers(0, size, offsets[-1]), weights / total[owner])


def _intercept(logits: Floats, weights: Floats, rate: float) -> float:
    """Shift of the logits for which the weighted mean probability is `rate`, found by bisection."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = np.average(1 / (1 + np.exp(-(logits + middle))), weights=weights)
        low, high = (middle, high) if mean < rate else (low, middle)
    return (low + high) / 2
