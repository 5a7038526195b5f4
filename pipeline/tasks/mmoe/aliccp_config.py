"""What a schema YAML with `format: aliccp` says of a folder with the original Ali-CCP files."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.config.strict_config import Config, Positive
from pipeline.errors import UserError
from pipeline.tasks.mmoe.schema import SplitSource, short_form


class RawFiles(Config):
    skeleton: str = Field(min_length=1)
    """file with a line a sample: sample_id,click,buy,common_feature_index,feat_num,feat_list"""
    common_features: str = Field(min_length=1)
    """file with a line a user: index,feat_num,feat_list"""


TRAIN = RawFiles(skeleton="sample_skeleton_train.csv", common_features="common_features_train.csv")
TEST = RawFiles(skeleton="sample_skeleton_test.csv", common_features="common_features_test.csv")


class RawFeature(Config):
    kind: Literal["auto", "categorical", "multi", "ignore"] = "auto"
    """categorical: one id a row; multi: any number of ids a row; ignore: left out; auto: what the files show"""
    weighted: bool = True
    """multi: the values are weights; false = a bag of ids, whatever the values"""
    min_count: Positive | None = None
    """ids seen less often than this in the training split are rare; null = as for all features"""
    hash_buckets: int | None = Field(None, ge=0)
    """rare and unseen ids share this many ids by their hash; 0 = they are out of vocabulary; null = as for all"""


class RawSplit(SplitSource):
    by: Literal["sample_id", "common_feature_index"] = "sample_id"
    """split by the hash of this cell; common_feature_index keeps the rows of a user together"""
    validation: float = Field(0.1, ge=0, lt=1)
    """share of the validation split"""
    test: float = Field(0.1, ge=0, lt=1)
    """share of the test split, where no test files are read"""


class RawSource(Config):
    """The original files: what is read, what the fields are, and what is done with rows that do not fit."""

    format: Literal["aliccp"]
    train: RawFiles = TRAIN
    test: Literal["auto"] | RawFiles | None = "auto"
    """files that are the test split as a whole, and then `split` divides the others without its share for test;
    auto = sample_skeleton_test.csv and common_features_test.csv where they are there; null = none"""
    features: dict[str, Annotated[RawFeature, BeforeValidator(short_form)]] = Field(default_factory=dict)
    """field -> kind, or a mapping with its settings"""
    other_fields: Literal["auto", "ignore"] = "auto"
    """fields that are not under features"""
    min_count: Positive = 1
    """for features that do not say"""
    hash_buckets: int = Field(0, ge=0)
    """for features that do not say"""
    conversion_without_click: Literal["drop", "no_conversion", "click"] = "drop"
    """a row with click 0 and buy 1: leave it out, take it without its conversion, or as clicked"""
    without_common_features: Literal["keep", "drop"] = "keep"
    """a row whose common features are not there: take it with these missing, or leave it out"""
    malformed_lines: int = Field(0, ge=0)
    """as many lines of a file may be malformed and are left out; a cut last line is left out in any case"""
    split: RawSplit = RawSplit()

    @field_validator("test", mode="before")
    @classmethod
    def _names_two_files(cls, value: Any) -> Any:
        if isinstance(value, dict) and set(value) != set(RawFiles.model_fields):
            raise ValueError("a mapping has the keys skeleton and common_features")
        return value

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for name in self.features:
            if not name or not name.isascii() or not name.isprintable() or "," in name:
                raise ValueError(f"features.{name!r}: allowed: names of printable ASCII characters but a comma")
        return self

    def files(self, data: Path) -> list[tuple[Path, Path]]:
        """(skeleton, common features) of the training files and, where test files are used, of those.

        Raises:
            UserError: a file is not there; a `.gz` beside is taken.
        """
        if not data.is_dir():
            named = ", ".join((self.train.skeleton, self.train.common_features))
            raise UserError(f"{data}: no such folder, allowed: a folder that holds {named}")
        groups = []
        for files in (self.train, TEST if self.test == "auto" else self.test):
            names = files.model_dump().values() if files else ()
            found = [file for name in names if (file := find(data, name))]
            for name in names if found or files is self.train or self.test != "auto" else ():
                if not find(data, name):
                    end = "the schema's train and test name the files; test: null reads no test files"
                    raise UserError(f"{data}: no file {name} (nor {name}.gz); {end}")
            groups += [(found[0], found[1])] if found else []
        return groups


def find(data: Path, name: str) -> Path | None:
    """The file of that name, or the one with `.gz` after it."""
    return next((file for file in (data / name, data / f"{name}.gz") if file.is_file()), None)
