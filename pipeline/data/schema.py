"""The schema of a prepared folder (`schema.json`): everything that training needs to know about the data.

A prepared folder holds `train.parquet`, `validation.parquet`, `test.parquet`, `vocabulary.parquet` and
`schema.json`. A split may also be a folder of Parquet files, read in the order of their names. The columns of a split
are `click` and `conversion` (int8), one int32 column per categorical feature, one list<int32> column per multi-valued
feature (with `<name>.weights`, list<float>, if it is weighted), one float column per numeric feature, and a float
column `sample_weight` if rows have weights. Each feature numbers its ids: 0 = out of vocabulary, 1 = missing, then the
vocabulary, then the hash buckets shared by rare and unseen values.
"""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.strict_config import Config, validate
from pipeline.errors import UserError
from pipeline.storage.files import check_file, write_json

OUT_OF_VOCABULARY, MISSING, FIRST_ID = 0, 1, 2
MOST_IDS = 2**31 - 1  # limit for all features together: ids are 32-bit row numbers of one table
LABELS = ("click", "conversion")
SAMPLE_WEIGHT = "sample_weight"  # column of the splits, if rows have weights
SPLITS = ("train", "validation", "test")
SCHEMA_FILE = "schema.json"
ADDED = ("decimal", "thousands", "click_only", "sample_weight")  # only written if set: earlier versions refuse them
VOCABULARY_FILE = "vocabulary.parquet"  # columns: feature (string), value (string), id (int32), count (int64)

# Texts that pandas reads as missing values, so that `prepare_ctr` and a logged model treat them alike.
MISSING_TEXT = (
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
    "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
)  # fmt: skip


class Feature(Config):
    """A feature of the prepared data."""

    name: str
    kind: Literal["categorical", "multi", "numeric"]
    size: int = Field(0, ge=0, le=MOST_IDS)
    """categorical, multi: number of ids, including 0 (out of vocabulary), 1 (missing) and the hash buckets"""
    hash_buckets: int = Field(0, ge=0, le=MOST_IDS)
    """categorical, multi: number of hash buckets for rare and unseen values; they have the last ids"""
    weighted: bool = False
    """multi: the split has a column `<name>.weights`"""
    separator: str = "|"
    weight_separator: str | None = None
    weights: str | None = None
    edges: tuple[float, ...] = ()
    """numeric: increasing edges of the bins, from training quantiles"""
    fill: float | None = None
    """numeric: replaces a missing value; null = a missing value is an error"""
    spelling: Literal["text", "whole", "truth"] = "text"
    """categorical, multi: form of all raw values: any text; whole numbers, without `.0`; `True` and `False`"""
    out_of_vocabulary: dict[str, float] = Field(default_factory=dict)
    """categorical, multi: share of out-of-vocabulary ids, by split"""

    @model_validator(mode="after")
    def _edges_make_bins(self) -> "Feature":
        if self.kind == "numeric" and (len(self.edges) < 2 or any(b <= a for a, b in pairwise(self.edges))):
            raise ValueError("edges of a numeric feature: allowed: at least two, increasing")
        return self


class Split(Config):
    file: str = Field(pattern=r"^\w[\w.-]*$")
    """name of a file, or of a folder of parts, in the prepared folder; not a path, which could lead elsewhere"""
    rows: int = Field(ge=0)
    clicks: int = Field(ge=0)
    conversions: int = Field(ge=0)
    sha256: str
    """hash of the file's bytes, or of the concatenated digests of a folder's parts"""

    @property
    def base_rates(self) -> "BaseRates":
        """Rates that count rows, without weights."""
        return BaseRates.of_counts(self.rows, self.clicks, self.conversions)


class BaseRates(Config):
    """Click and conversion rates of the training split, weighted if its rows have weights."""

    ctr: float
    """clicks per impression"""
    cvr: float
    """conversions per click"""

    @classmethod
    def of_counts(cls, rows: float, clicks: float, conversions: float) -> "BaseRates":
        """Rates from numbers of rows, or from sums of their weights."""
        return cls(ctr=clicks / rows if rows else 0.0, cvr=conversions / clicks if clicks else 0.0)


class DataSchema(Config):
    """Content of `schema.json`: everything that training needs to know about a prepared folder."""

    format: Literal[1] = 1
    features: tuple[Feature, ...]
    splits: dict[str, Split]
    base_rates: BaseRates
    vocabulary_sha256: str
    missing_values: tuple[str, ...] = MISSING_TEXT
    strip: bool = True
    decimal: Literal[".", ","] = "."
    """decimal mark of numbers written as text"""
    thousands: str | None = None
    """mark between groups of three digits of numbers written as text"""
    click_only: bool = False
    """the data have no conversion labels; the column `conversion` is 0"""
    sample_weight: bool = False
    """the splits have a column `sample_weight` with the weight of each row in the training losses"""
    truth: bool = False
    """generated data: the splits hold the true probabilities as `p_ctr` and `p_cvr` (double)"""
    source: str = ""
    """name and SHA-256 of the raw files, or the generator's settings"""
    counts: dict[str, int] = Field(default_factory=dict)
    """raw Ali-CCP files: irregularities counted while they were read"""

    @model_validator(mode="after")
    def _ids_fit(self) -> "DataSchema":
        ids = sum(feature.size for feature in self.features)
        if ids > MOST_IDS:
            raise ValueError(f"features: found sizes that sum to {ids}, allowed: {MOST_IDS} at most")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the features and of the digests of the splits and the vocabulary."""
        content = self.model_dump(mode="json", include={"format", "features", "splits", "vocabulary_sha256", "truth"})
        for feature in content["features"]:
            if feature["spelling"] == "text":
                del feature["spelling"]  # keeps the digest of folders written before this key was added
        content |= {key: True for key in ("click_only", "sample_weight") if getattr(self, key)}  # as above
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def warnings(self) -> list[str]:
        """Warnings about splits with rows in which no row has a click, or a conversion."""
        warnings = []
        for name, split in self.splits.items():
            counts = {"click": split.clicks} | ({} if self.click_only else {"conversion": split.conversions})
            effect = "there is none to learn from" if name == "train" else "metrics of {}s are undefined there"
            warnings += [f"{name} has no {event}: {effect.format(event)}"
                         for event, count in counts.items() if split.rows and not count]  # fmt: skip
        return warnings

    @property
    def row_columns(self) -> list[str]:
        """Columns of a split that do not belong to a feature."""
        return [*LABELS, *([SAMPLE_WEIGHT] if self.sample_weight else [])]

    @property
    def raw_columns(self) -> list[str]:
        """Raw columns from which the features are read."""
        return [name for feature in self.features for name in (feature.name, feature.weights) if name]

    @classmethod
    def read(cls, folder: Path) -> "DataSchema":
        """Read `folder/schema.json`.

        Raises:
            UserError: the file is missing, unreadable or not a valid schema.
        """
        file = folder / SCHEMA_FILE
        try:
            check_file(file)
            tree = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            problem = f"no {SCHEMA_FILE}" if folder.is_dir() else "no such folder"
            raise UserError(f"{folder}: {problem}; allowed: a folder that prepare_ctr wrote") from None
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: not valid JSON: {error}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{file}: found a {type(tree).__name__}, allowed: an object of keys")
        return validate(cls, tree, file)

    def write(self, folder: Path) -> None:
        tree = self.model_dump(mode="json")
        for key in ADDED:
            if tree[key] == type(self).model_fields[key].default:
                del tree[key]
        write_json(folder / SCHEMA_FILE, tree, indent=1)


def split_parts(split: Path) -> list[Path]:
    """The Parquet files of a split: the file itself, or the files of a folder, sorted by name.

    Raises:
        OSError: a file is missing or not a regular file.
    """
    files = [split]
    if split.is_dir():
        files = sorted(file for file in split.glob("*.parquet") if file.name[0] not in "._") or files
    for file in files:
        check_file(file)
    return files
