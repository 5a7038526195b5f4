"""Transactions: generated or read from a file, split, and encoded as tensors."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.data.digests import split_positions
from pipeline.errors import UserError

from .config import DataConfig

NUMERIC, CATEGORICAL, LABEL = ("amount", "hour", "account_days"), ("merchant", "country", "channel"), "fraud"
SHARES = {"train": 8, "valid": 1, "test": 1}
LARGEST = 5.0  # in standard deviations; larger numbers are limited to it
MERCHANTS = {"grocery": 0.0, "travel": 0.6, "electronics": 1.2, "clothing": 0.3, "games": 0.9, "fuel": -0.4}  # log odds
COUNTRIES, CHANNELS = ("DE", "FR", "NL", "PL", "US", "VN"), ("card", "online", "phone")


@dataclass(frozen=True)
class Transactions:
    """Encoded transactions: a micro-batch, or a whole split."""

    numeric: Tensor  # [B, 3], standardised
    ids: Tensor  # [B, 3], position in the vocabulary; 0 = a value that is not in it
    label: Tensor  # [B], 1 = fraud

    def to(self, device: str) -> Self:
        return type(self)(self.numeric.to(device), self.ids.to(device), self.label.to(device))

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, rows: Any) -> "Transactions":
        return Transactions(self.numeric[rows], self.ids[rows], self.label[rows])


@dataclass(frozen=True)
class Encoder:
    """Mean and standard deviation of the numeric columns, and vocabularies of the categorical ones."""

    scales: dict[str, tuple[float, float]]
    values: dict[str, list[str]]

    @classmethod
    def fit(cls, frame: pd.DataFrame) -> Self:
        scales = {name: (float(frame[name].mean()), float(frame[name].std()) or 1.0) for name in NUMERIC}
        return cls(scales, {name: sorted(frame[name].dropna().astype(str).unique()) for name in CATEGORICAL})

    @property
    def sizes(self) -> list[int]:
        """Number of values of each categorical column."""
        return [len(self.values[name]) for name in CATEGORICAL]

    @classmethod
    def load(cls, file: Path) -> Self:
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(vars(self), ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")

    def encode(self, frame: pd.DataFrame) -> Transactions:
        """Encode the columns of a frame; without a label column, as in prediction, the labels are 0.

        Raises:
            UserError: a column is missing.
        """
        for name in (*NUMERIC, *CATEGORICAL):
            if name not in frame:
                raise UserError(f"transactions: found no column {name}, allowed: {', '.join(NUMERIC + CATEGORICAL)}")
        numeric = np.empty((len(frame), len(NUMERIC)), dtype=np.float32)
        for column, name in enumerate(NUMERIC):
            mean, deviation = self.scales[name]
            scaled = (pd.to_numeric(frame[name], errors="coerce").astype(np.float64) - mean) / deviation
            numeric[:, column] = scaled.fillna(0.0).clip(-LARGEST, LARGEST)
        ids = np.empty((len(frame), len(CATEGORICAL)), dtype=np.int64)
        for column, name in enumerate(CATEGORICAL):
            positions = {value: position for position, value in enumerate(self.values[name], 1)}
            ids[:, column] = frame[name].astype(str).map(positions).fillna(0)
        label = frame[LABEL].to_numpy(np.float32) if LABEL in frame else np.zeros(len(frame), dtype=np.float32)
        return Transactions(torch.from_numpy(numeric), torch.from_numpy(ids), torch.from_numpy(label))


class FraudData:
    """The data of a run. `frames` and `splits` have the raw and the encoded rows of train, valid and test."""

    def __init__(self, config: DataConfig) -> None:
        """Read or generate the transactions.

        Raises:
            UserError: the file is missing or damaged, lacks a column, or leaves a split empty.
        """
        self.name = Path(config.path).name if config.path else "generated"
        frame = read(Path(config.path)) if config.path else generate(config.rows, config.seed)
        split = split_positions(np.arange(len(frame), dtype=np.uint64), config.seed, list(SHARES.values()))
        hashes = pd.util.hash_pandas_object(frame.assign(split=split), index=False)
        self.digest = hashlib.sha256(hashes.to_numpy().tobytes()).hexdigest()
        self.frames = {name: frame[split == position] for position, name in enumerate(SHARES)}
        for name, rows in self.frames.items():
            if rows.empty:
                raise UserError(f"data.path: found {len(frame)} rows and none for {name}, allowed: more rows")
        self.encoder = Encoder.fit(self.frames["train"])
        self.splits = {name: self.encoder.encode(rows) for name, rows in self.frames.items()}
        self.counts = {name: {"rows": len(rows), "frauds": int(rows.label.sum())} for name, rows in self.splits.items()}


def read(file: Path) -> pd.DataFrame:
    """Read a .csv or .parquet file."""
    try:
        if file.suffix == ".parquet":
            frame = pd.read_parquet(file)
        else:
            frame = pd.read_csv(file, dtype=dict.fromkeys(CATEGORICAL, str))
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: {file}: {error}") from None
    missing = [name for name in (*NUMERIC, *CATEGORICAL, LABEL) if name not in frame]
    if missing:
        raise UserError(f"data.path: {file}: found no column {missing[0]}")
    if not frame[LABEL].isin((0, 1)).all():
        raise UserError(f"data.path: {file}: column {LABEL}: found other values, allowed: 0, 1")
    return frame


def generate(rows: int, seed: int) -> pd.DataFrame:
    """Generate transactions, of which between 1% and 2% are fraud."""
    random = np.random.Generator(np.random.PCG64(seed))
    frame = pd.DataFrame({
        "amount": random.lognormal(3.5, 1.0, rows).round(2),
        "hour": random.integers(0, 24, rows),
        "account_days": random.exponential(500, rows).round(),
        "merchant": random.choice(list(MERCHANTS), rows),
        "country": random.choice(COUNTRIES, rows),
        "channel": random.choice(CHANNELS, rows),
    })  # fmt: skip
    log_odds = (
        -5.4 + 0.7 * (np.log(frame["amount"]) - 3.5) - 0.002 * frame["account_days"]
        + frame["merchant"].map(MERCHANTS) + 1.2 * (frame["channel"] == "online") + 1.0 * (frame["hour"] < 6)
        + 1.5 * ((frame["country"] == "US") & (frame["merchant"] == "electronics"))
    )  # fmt: skip
    frame[LABEL] = (random.random(rows) < 1 / (1 + np.exp(-log_odds))).astype(np.int8)
    return frame
