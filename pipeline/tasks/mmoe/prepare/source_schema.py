"""The YAML schema of raw impressions in CSV, JSON Lines or Parquet files."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from pipeline.config.strict_config import Config
from pipeline.data.raw_schema import CsvSource, FeatureSource, Name, SplitSource, kind_alone
from pipeline.data.schema import MISSING_TEXT


class LabelSource(Config):
    click: Name
    """a column that holds 0/1 or true/false, or a condition such as `status != "new"`"""
    conversion: Name | None = None
    """like click; a condition may refer to the label `click`: `click and income == "50000+."`; null = only clicks"""


class SourceSchema(Config):
    """Description of the raw files: columns, labels, features and splits."""

    columns: tuple[Name, ...] | None = None
    """for CSV files without a header: the column names in file order; null = the first line holds them"""
    csv: CsvSource = CsvSource()
    labels: LabelSource
    sample_weight: Name | None = None
    """column with the weight of each row in the training losses, above 0; null = every row weighs the same"""
    features: dict[Name, Annotated[FeatureSource, BeforeValidator(kind_alone)]] = Field(min_length=1)
    """column -> kind, or a mapping with `kind` and its settings"""
    missing_values: tuple[str, ...] = MISSING_TEXT
    """texts that mean "no value", besides empty cells (exact match; in a numeric column any spelling)"""
    split: SplitSource = SplitSource()
