"""The YAML schema of the original Ali-CCP files (`format: aliccp`)."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.config.strict_config import Config, Positive
from pipeline.data.raw_schema import SplitSource, kind_alone
from pipeline.errors import UserError


class AliccpFiles(Config):
    skeleton: str = Field(min_length=1)
    """file with one line per sample: sample_id,click,buy,common_feature_index,feat_num,feat_list"""
    common_features: str = Field(min_length=1)
    """file with one line per user: index,feat_num,feat_list"""


TRAIN = AliccpFiles(skeleton="sample_skeleton_train.csv", common_features="common_features_train.csv")
TEST = AliccpFiles(skeleton="sample_skeleton_test.csv", common_features="common_features_test.csv")


class AliccpFeature(Config):
    kind: Literal["auto", "categorical", "multi", "ignore"] = "auto"
    """categorical: one id per row; multi: any number of ids per row; ignore: left out; auto: derived from the files"""
    weighted: bool = True
    """multi: the values are weights; false = the values are ignored"""
    min_count: Positive | None = None
    """minimum number of occurrences in the training split; null = as for all features"""
    hash_buckets: int | None = Field(None, ge=0)
    """number of hash buckets for rare and unseen ids; 0 = out of vocabulary; null = as for all features"""


class AliccpSplit(SplitSource):
    by: Literal["sample_id", "common_feature_index"] = "sample_id"
    """split by the hash of this cell; common_feature_index keeps the rows of a user together"""
    validation: float = Field(0.1, ge=0, lt=1)
    """share of the validation split"""
    test: float = Field(0.1, ge=0, lt=1)
    """share of the test split, if no test files are read"""


class AliccpSource(Config):
    """Files to read, their fields, and the treatment of irregular rows."""

    format: Literal["aliccp"]
    train: AliccpFiles = TRAIN
    test: Literal["auto"] | AliccpFiles | None = "auto"
    """files that form the test split; auto = files with the published names, if they exist; null = none"""
    features: dict[str, Annotated[AliccpFeature, BeforeValidator(kind_alone)]] = Field(default_factory=dict)
    """field -> kind, or a mapping with its settings"""
    other_fields: Literal["auto", "ignore"] = "auto"
    """fields that are not under features"""
    min_count: Positive = 1
    """default for features"""
    hash_buckets: int = Field(0, ge=0)
    """default for features"""
    conversion_without_click: Literal["drop", "no_conversion", "click"] = "drop"
    """row with click 0 and buy 1: drop the row, keep it without its conversion, or count it as clicked"""
    without_common_features: Literal["keep", "drop"] = "keep"
    """row without common features: keep it, with these features missing, or drop it"""
    malformed_lines: int = Field(0, ge=0)
    """number of malformed lines to tolerate per file, which are left out; a truncated last line is always left out"""
    split: AliccpSplit = AliccpSplit()

    @field_validator("test", mode="before")
    @classmethod
    def _names_two_files(cls, value: Any) -> Any:
        if isinstance(value, dict) and set(value) != set(AliccpFiles.model_fields):
            raise ValueError("a mapping has the keys skeleton and common_features")
        return value

    @model_validator(mode="after")
    def _names_are_ascii(self) -> Self:
        for name in self.features:
            if not name or not name.isascii() or not name.isprintable() or "," in name:
                raise ValueError(f"features.{name!r}: allowed: names of printable ASCII characters but a comma")
        return self

    def files(self, data: Path) -> list[tuple[Path, Path]]:
        """List (skeleton, common features) of the training files and, if there are any, of the test files.

        Raises:
            UserError: a file is missing, with and without the suffix `.gz`.
        """
        if not data.is_dir():
            raise UserError(
                f"{data}: no such folder, allowed: a folder that holds {', '.join(self.train.model_dump().values())}"
            )
        groups = []
        for files in (self.train, TEST if self.test == "auto" else self.test):
            names = list(files.model_dump().values()) if files else []
            paths = [path for name in names if (path := find(data, name))]
            optional = files is TEST and self.test == "auto" and not paths
            for name in names:
                if not optional and not find(data, name):
                    hint = "the schema's train and test name the files; test: null reads no test files"
                    raise UserError(f"{data}: no file {name} (nor {name}.gz); {hint}")
            groups += [(paths[0], paths[1])] if paths else []
        return groups


def find(data: Path, name: str) -> Path | None:
    """Find the file with this name, or with the suffix `.gz`; None if there is none."""
    return next((file for file in (data / name, data / f"{name}.gz") if file.is_file()), None)
