"""The data contract: what the user says of a raw file (`SourceSchema`), and what training reads (`DataSchema`).

A prepared folder holds `train.parquet`, `validation.parquet`, `test.parquet`, `vocabulary.parquet` and
`schema.json`. A split may also be a folder of Parquet files, read in the order of their names. In the splits stand
`click` and `conversion` (int8), one int32 column per categorical feature, one list<int32> column per multi-valued
feature (with `<name>.weights`, list<float>, where it is weighted) and one float column per numeric feature. Ids count
within a feature: 0 = out of vocabulary, 1 = missing, then the vocabulary, then the buckets that rare and unseen values
share by their hash.
"""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.strict_config import Config, Positive, validate
from pipeline.errors import UserError
from pipeline.storage.files import check_file

OUT_OF_VOCABULARY, MISSING, FIRST_ID = 0, 1, 2
MOST_IDS = 2**31 - 1  # of all features together: an id is a row of one table, in 32 bits
LABELS = ("click", "conversion")
SPLITS = ("train", "validation", "test")
SCHEMA_FILE = "schema.json"
VOCABULARY_FILE = "vocabulary.parquet"  # columns: feature (string), value (string), id (int32), count (int64)

# What pandas reads as missing, so that a raw frame means the same to `prepare_ctr` and to a logged model.
MISSING_TEXT = (
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
    "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
)  # fmt: skip


def _as_name(value: Any) -> Any:
    """A name as YAML gives it: whole numbers are text, and text is in Unicode's form NFC, as in `Source.names`."""
    if isinstance(value, bool):
        raise ValueError(f"YAML reads it as {str(value).lower()}: write the name in quotes")
    if isinstance(value, int):
        return str(value)
    return unicodedata.normalize("NFC", value) if isinstance(value, str) else value


Name = Annotated[str, BeforeValidator(_as_name), Field(min_length=1)]


class FeatureSource(Config):
    kind: Literal["categorical", "multi", "numeric"]
    """categorical: one id a row; multi: any number of ids a row; numeric: one number a row"""
    min_count: Positive = 1
    """ids seen less often than this in the training split are rare: out of vocabulary, or hashed"""
    hash_buckets: int = Field(0, ge=0)
    """rare and unseen ids share this many ids by their hash; 0 = they are out of vocabulary"""
    separator: str = Field("|", min_length=1)
    """multi: what stands between the ids of a text cell"""
    weight_separator: str | None = Field(None, min_length=1)
    """multi: what stands between an id and its weight (`sports:0.5`); null = no weight in the cell"""
    weights: Name | None = None
    """multi: the column that holds the weights, in the same order; null = none"""
    missing: Literal["error", "mean"] | float = "error"
    """numeric: what a missing value becomes: error = refuse it, mean = the training mean, or a number"""
    bins: Positive = 32
    """numeric: quantile bins of the piecewise-linear encoding"""

    @model_validator(mode="after")
    def _keys_fit_kind(self) -> "FeatureSource":
        fitting = {
            "categorical": {"min_count", "hash_buckets"},
            "multi": {"min_count", "hash_buckets", "separator", "weight_separator", "weights"},
            "numeric": {"missing", "bins"},
        }[self.kind]
        foreign = self.model_fields_set - fitting - {"kind"}
        if foreign:
            raise ValueError(f"{', '.join(sorted(foreign))} has no meaning for kind {self.kind}")
        if self.weights and self.weight_separator:
            raise ValueError("weights and weight_separator exclude each other")
        return self

    @property
    def weighted(self) -> bool:
        """Every id of a row has a weight."""
        return self.weights is not None or self.weight_separator is not None


def short_form(value: Any) -> Any:
    """A feature of which only the kind is written."""
    return {"kind": value} if isinstance(value, str) else value


class LabelSource(Config):
    click: Name
    """a column that holds 0/1 or true/false, or a condition such as `status != "new"`"""
    conversion: Name
    """likewise; a condition may name `click`: `click and income == "50000+."`"""


class Where(Config):
    where: str = Field(min_length=1)
    """condition, as for labels"""


class SplitSource(Config):
    by: Name | None = None
    """split by the hash of this column, so that its equal values stay together; null = every row at random"""
    seed: int = Field(0, ge=0)
    """another seed gives another split"""
    train: float = Field(0.8, gt=0, le=1)
    """share of the training split"""
    validation: Annotated[float, Field(ge=0, lt=1)] | Where = 0.1
    """share of the validation split; or `{where: 'day == 7'}`: its rows by a condition, as for labels"""
    test: Annotated[float, Field(ge=0, lt=1)] | Where = 0.1
    """share of the test split; or `{where: 'day >= 8'}`; the shares then divide the other rows"""

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> "SplitSource":
        shares = [share for share in (self.train, self.validation, self.test) if not isinstance(share, Where)]
        if len(shares) == len(SPLITS) and abs(sum(shares) - 1) > 1e-9:
            raise ValueError(f"train, validation and test sum to {sum(shares):g}, allowed: 1")
        return self


def _as_tab(value: Any) -> Any:
    return "\t" if value == r"\t" else value


class CsvSource(Config):
    delimiter: Annotated[str, BeforeValidator(_as_tab)] = ","
    r"""one character, which stands between the columns (a tab: "\t")"""
    escape: str | None = None
    r"""one character that takes its meaning from a quote within quotes (in files of Spark, Hive and MySQL, "\\"); null
    = quotes are doubled"""
    strip: bool = True
    """take blanks away around every value"""


class SourceSchema(Config):
    """What a raw CSV or Parquet file holds, said by its owner (the YAML that `prepare_ctr` takes)."""

    columns: tuple[Name, ...] | None = None
    """CSV without a header: the columns' names in file order; null = the first line names them"""
    csv: CsvSource = CsvSource()
    labels: LabelSource
    features: dict[Name, Annotated[FeatureSource, BeforeValidator(short_form)]] = Field(min_length=1)
    """column -> kind, or a mapping with `kind` and its settings"""
    missing_values: tuple[str, ...] = MISSING_TEXT
    """text that means "no value", as an empty cell always does (exact; in a numeric column any spelling); the default
    is what pandas reads so"""
    split: SplitSource = SplitSource()


class Feature(Config):
    """A feature as training reads it."""

    name: str
    kind: Literal["categorical", "multi", "numeric"]
    size: int = Field(0, ge=0, le=MOST_IDS)
    """categorical, multi: number of ids, 0 (out of vocabulary), 1 (missing) and hashed ones included"""
    hash_buckets: int = Field(0, ge=0, le=MOST_IDS)
    """categorical, multi: how many ids, the last ones, rare and unseen values share by their hash"""
    weighted: bool = False
    """multi: a column `<name>.weights` stands beside it"""
    separator: str = "|"
    weight_separator: str | None = None
    weights: str | None = None
    edges: tuple[float, ...] = ()
    """numeric: increasing edges of the bins, from training quantiles"""
    fill: float | None = None
    """numeric: what a missing value becomes; null = refuse it"""
    spelling: Literal["text", "whole", "truth"] = "text"
    """categorical, multi: what every value of the raw column is, and so how it is spelt: text as it stands; whole
    numbers without `.0`; truth values as `True` and `False`"""
    out_of_vocabulary: dict[str, float] = Field(default_factory=dict)
    """categorical, multi: share of the ids that are out of vocabulary, by split"""

    @model_validator(mode="after")
    def _edges_make_bins(self) -> "Feature":
        if self.kind == "numeric" and (len(self.edges) < 2 or any(b <= a for a, b in pairwise(self.edges))):
            raise ValueError("edges of a numeric feature: allowed: at least two, increasing")
        return self


class Split(Config):
    file: str = Field(pattern=r"^\w[\w.-]*$")
    """its name within the folder, or that of a folder of parts: no path, which could lead out of it"""
    rows: int = Field(ge=0)
    clicks: int = Field(ge=0)
    conversions: int = Field(ge=0)
    sha256: str
    """of the file's bytes; of a folder, of the parts' digests one after another"""


class BaseRates(Config):
    """Of the training split."""

    ctr: float
    """clicks per impression"""
    cvr: float
    """conversions per click"""


class DataSchema(Config):
    """`schema.json`: all that training needs to know of a prepared folder."""

    format: Literal[1] = 1
    features: tuple[Feature, ...]
    splits: dict[str, Split]
    base_rates: BaseRates
    vocabulary_sha256: str
    missing_values: tuple[str, ...] = MISSING_TEXT
    strip: bool = True
    truth: bool = False
    """the splits hold the true probabilities as `p_ctr` and `p_cvr` (double): generated data"""
    source: str = ""
    """file name and SHA-256 of what it was made from, or the generator's settings"""
    counts: dict[str, int] = Field(default_factory=dict)
    """raw Ali-CCP files: what was met while they were read"""

    @model_validator(mode="after")
    def _ids_fit(self) -> "DataSchema":
        ids = sum(feature.size for feature in self.features)
        if ids > MOST_IDS:
            raise ValueError(f"features: found sizes that sum to {ids}, allowed: {MOST_IDS} at most")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the data: of the splits' and the vocabulary's digests and the features."""
        kept = self.model_dump(mode="json", include={"format", "features", "splits", "vocabulary_sha256", "truth"})
        for feature in kept["features"]:
            if feature["spelling"] == "text":
                del feature["spelling"]  # folders that were written before there was another keep their digest
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    @property
    def raw_columns(self) -> list[str]:
        """The raw columns that the features are made of."""
        return [name for feature in self.features for name in (feature.name, feature.weights) if name]

    @classmethod
    def read(cls, folder: Path) -> "DataSchema":
        """`folder/schema.json`.

        Raises:
            UserError: it is missing, unreadable or not a schema.
        """
        file = folder / SCHEMA_FILE
        try:
            check_file(file)
            tree = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{folder}: no {SCHEMA_FILE}; allowed: a folder that prepare_ctr wrote"
                if folder.is_dir() else f"{folder}: no such folder; allowed: a folder that prepare_ctr wrote"
            ) from None  # fmt: skip
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: not valid JSON: {error}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{file}: found a {type(tree).__name__}, allowed: an object of keys")
        return validate(cls, tree, file)

    def write(self, folder: Path) -> None:
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        (folder / SCHEMA_FILE).write_text(text + "\n", encoding="utf-8")


def sha256_of(file: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_parts(digests: Sequence[str]) -> str:
    """Of files that are one thing together: of their digests (hex) one after another."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def parts(split: Path) -> list[Path]:
    """The Parquet files of a split, in their order: the file itself, or those of a folder, by name.

    Raises:
        OSError: one of them is not a file, or is not there.
    """
    found = [split]
    if split.is_dir():
        found = sorted(file for file in split.glob("*.parquet") if file.name[0] not in "._") or found
    for file in found:
        check_file(file)
    return found
