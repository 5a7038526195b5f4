"""What a schema YAML with `format: aliccp` says of a folder with the original Ali-CCP files."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config import Config, Positive
from pipeline.errors import UserError
from pipeline.tasks.mmoe.schema import SplitSource, short_form

MOST_FIELDS, MOST_NAME_BYTES = 1024, 64


class RawFiles(Config):
    skeleton: str = Field(min_length=1)
    """file with a line a sample: sample_id,click,buy,common_feature_index,feat_num,feat_list"""
    common_features: str = Field(min_length=1)
    """file with a line a user: index,feat_num,feat_list"""


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


class RawSource(Config):
    """The original files: what is read, what the fields are, and what is done with rows that do not fit."""

    format: Literal["aliccp"]
    train: RawFiles = RawFiles(skeleton="sample_skeleton_train.csv", common_features="common_features_train.csv")
    test: RawFiles | None = None
    """files that are the test split; then split.test is 0. null = none, every split is of the files under train"""
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

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for name in self.features:
            if not (0 < len(name) <= MOST_NAME_BYTES and name.isascii() and name.isprintable()):
                raise ValueError(
                    f"features.{name!r}: allowed: names of up to {MOST_NAME_BYTES} printable ASCII characters"
                )
        if len(self.features) > MOST_FIELDS:
            raise ValueError(f"features: found {len(self.features)}, allowed: {MOST_FIELDS} at most")
        return self

    @model_validator(mode="after")
    def _one_test_split(self) -> Self:
        if self.test and self.split.test:
            raise ValueError(f"split.test is {self.split.test:g} and test names files, allowed: one of both")
        return self

    def files(self, data: Path) -> list[tuple[Path, Path]]:
        """(skeleton, common features) of the training files and, if any, of the test files.

        Raises:
            UserError: a file is not there; a `.gz` beside is taken.
        """
        if not data.is_dir():
            named = ", ".join((self.train.skeleton, self.train.common_features))
            raise UserError(f"{data}: no such folder, allowed: a folder that holds {named}")
        return [
            (_found(data, files.skeleton), _found(data, files.common_features))
            for files in (self.train, self.test) if files
        ]  # fmt: skip


def _found(data: Path, name: str) -> Path:
    for file in (data / name, data / f"{name}.gz"):
        if file.is_file():
            return file
    raise UserError(f"{data}: no file {name} (nor {name}.gz); the schema's train and test name the files")
