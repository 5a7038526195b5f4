"""Blocks of a YAML schema for raw columns: features, CSV dialect and splits."""

import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from pipeline.config.strict_config import Config, Positive
from pipeline.data.schema import SPLITS


def _as_name(value: Any) -> Any:
    """Column name in YAML: an integer becomes text, and text is normalised to Unicode NFC, as in `RawTable.names`."""
    if isinstance(value, bool):
        raise ValueError(f"YAML reads it as {str(value).lower()}: write the name in quotes")
    if isinstance(value, int):
        return str(value)
    return unicodedata.normalize("NFC", value) if isinstance(value, str) else value


Name = Annotated[str, BeforeValidator(_as_name), Field(min_length=1)]
Condition = Annotated[str, AfterValidator(lambda text: unicodedata.normalize("NFC", text)), Field(min_length=1)]


class FeatureSource(Config):
    kind: Literal["categorical", "multi", "numeric"]
    """categorical: one id per row; multi: any number of ids per row; numeric: one number per row"""
    min_count: Positive = 1
    """minimum number of occurrences in the training split; rarer ids are out of vocabulary, or hashed"""
    hash_buckets: int = Field(0, ge=0)
    """number of hash buckets for rare and unseen values; 0 = these values are out of vocabulary"""
    separator: str = Field("|", min_length=1)
    """multi: separates the ids of a text cell"""
    weight_separator: str | None = Field(None, min_length=1)
    """multi: separates an id from its weight (`sports:0.5`); null = no weight in the cell"""
    weights: Name | None = None
    """multi: column with the weights of the ids, in the same order; null = none"""
    missing: Literal["error", "mean"] | float = "error"
    """numeric: replacement of missing values: a number, or mean = the training mean; error = refuse them"""
    bins: Positive = 32
    """numeric: quantile bins of the piecewise-linear encoding"""

    @model_validator(mode="after")
    def _keys_fit_kind(self) -> "FeatureSource":
        allowed = {
            "categorical": {"min_count", "hash_buckets"},
            "multi": {"min_count", "hash_buckets", "separator", "weight_separator", "weights"},
            "numeric": {"missing", "bins"},
        }[self.kind]
        foreign = self.model_fields_set - allowed - {"kind"}
        if foreign:
            raise ValueError(f"{', '.join(sorted(foreign))} has no meaning for kind {self.kind}")
        if self.weights and self.weight_separator:
            raise ValueError("weights and weight_separator exclude each other")
        return self

    @property
    def weighted(self) -> bool:
        """Whether every id of a row has a weight."""
        return self.weights is not None or self.weight_separator is not None


def kind_alone(value: Any) -> Any:
    """Accept `city: categorical` as short for `city: {kind: categorical}`."""
    return {"kind": value} if isinstance(value, str) else value


class Where(Config):
    where: Condition
    """condition, as for labels"""


def _refuse_text(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, str):
        name = info.field_name
        raise ValueError(f"a condition is written {{where: 'day >= 8'}}; a file is named by data.{name}")
    return value


ShareOrWhere = Annotated[Annotated[float, Field(ge=0, lt=1)] | Where, BeforeValidator(_refuse_text)]


class SplitSource(Config):
    by: Name | None = None
    """split by the hash of this column, so that equal values stay together; null = every row at random"""
    seed: int = Field(0, ge=0)
    """seed of the random split"""
    train: float = Field(0.8, gt=0, le=1)
    """share of the training split"""
    validation: ShareOrWhere = 0.1
    """share of the validation split, or a condition for its rows, as for labels: `{where: 'day == 7'}`"""
    test: ShareOrWhere = 0.1
    """share of the test split, or a condition: `{where: 'day >= 8'}`; shares divide the rows that meet no condition"""

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> "SplitSource":
        shares = [share for share in (self.train, self.validation, self.test) if not isinstance(share, Where)]
        if len(shares) == len(SPLITS) and abs(sum(shares) - 1) > 1e-9:
            raise ValueError(f"train, validation and test sum to {sum(shares):g}, allowed: 1")
        return self


class CsvSource(Config):
    delimiter: Annotated[str, BeforeValidator(lambda value: "\t" if value == r"\t" else value)] = ","
    r"""one character that separates the columns (a tab: "\t")"""
    quote: str | None = '"'
    """character around values that contain the delimiter or a line end; null = no value is quoted"""
    escape: str | None = None
    r"""character that escapes a quote within quotes (for Spark, Hive and MySQL, "\\"); null = quotes are doubled"""
    encoding: str = Field("utf-8", min_length=1)
    """encoding of the text, as Python calls it: cp1252, cp1258, latin-1, shift_jis, utf-16"""
    decimal: Literal[".", ","] = "."
    """decimal mark of numbers written as text"""
    thousands: Literal[".", ",", "'", " ", "_"] | None = None
    """mark between groups of three digits of numbers written as text; a space stands for any of its widths"""
    strip: bool = True
    """strip whitespace around every value"""

    @model_validator(mode="after")
    def _marks_differ(self) -> "CsvSource":
        if self.decimal == self.thousands:
            raise ValueError(f"decimal and thousands are both {self.decimal!r}, allowed: different marks")
        return self
