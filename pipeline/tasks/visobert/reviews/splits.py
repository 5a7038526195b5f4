"""The training, validation and test reviews of a run."""

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import EMBEDDED, ReviewFormatConfig, TrainDataConfig
from pipeline.tasks.visobert.reviews.embedded_reviews import embedded_reviews
from pipeline.tasks.visobert.reviews.reviews import Reviews, detection_only_aspects, folded, read_reviews


@dataclass(frozen=True)
class Splits:
    """Splits with the aspects of the training file; labels of detection-only aspects have no polarity in any split."""

    train: Reviews
    valid: Reviews
    test: Reviews | None
    detection_only: tuple[str, ...]

    @property
    def by_name(self) -> dict[str, Reviews]:
        """The splits that exist, by their names `train`, `valid` and `test`."""
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: reviews for name, reviews in splits.items() if reviews is not None}

    @property
    def polar(self) -> npt.NDArray[np.bool_]:
        """Flags of the aspects with sentiments, those that are not detection-only. [A]"""
        return ~np.isin(self.train.aspects, self.detection_only)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the digests and sizes of all splits."""
        parts = " ".join(f"{name} {reviews.digest} {len(reviews)}" for name, reviews in self.by_name.items())
        return hashlib.sha256(parts.encode()).hexdigest()


def read_splits(
    files: Mapping[str, str | None], form: ReviewFormatConfig
) -> tuple[dict[str, Reviews], tuple[str, ...]]:
    """Read the splits that have a file, and return them by name, with the detection-only aspects.

    `files`: paths of train, validation and test. The training file decides the aspects and which of them are
    detection-only. Without a training file, all three splits are the embedded reviews.

    Raises:
        UserError: a file cannot be read as reviews.
    """
    embedded = files["train"] is None
    if embedded:
        folder = embedded_reviews(form.embedded, Path(form.cache))
        files = {name: str(folder / f"{name}.csv") for name in files}
        form = form.model_copy(update={"labels": None, "delimiter": None})  # they are about the user's files
    train = read_reviews(Path(files["train"] or ""), form)
    only = detection_only_aspects(train, form.detection_only)
    splits = {"train": replace(train, source=EMBEDDED) if embedded else train}
    splits |= {name: read_reviews(Path(file), form, train.aspects)
               for name, file in files.items() if file and name != "train"}  # fmt: skip
    return {name: reviews.without_polarity(only) for name, reviews in splits.items()}, only


def load_splits(config: TrainDataConfig) -> Splits:
    """Read the files or the embedded reviews. Without a validation file, hold out a share of the training file.

    Raises:
        UserError: a file cannot be read as reviews, or a split would be empty.
    """
    files = {"train": config.train, "validation": config.validation, "test": config.test}
    splits, only = read_splits(files, config)
    splits = {name: reviews.with_text() for name, reviews in splits.items()}
    train, valid = splits["train"], splits.get("validation")
    if valid is None:
        held_out = _hash_fractions(train.texts) < config.validation_share
        if held_out.all() or not held_out.any():
            raise UserError(
                f"{train.source}: {len(train)} reviews cannot be split by data.validation_share "
                f"{config.validation_share:g}, allowed: enough for both splits, or data.validation"
            )
        # keep the warnings about the file with the training split only
        train, valid = train.select(~held_out), replace(train.select(held_out), dropped=(), notes=())
    return Splits(train, valid, splits.get("test"), only)


def _hash_fractions(texts: tuple[str, ...]) -> npt.NDArray[np.float64]:
    """Hash of each text, between 0 and 1. [N]

    Copies have the same hash, that of the first of them, so that they are in the same split.
    """
    first: dict[str, str] = {}
    originals = (first.setdefault(folded(text), unicodedata.normalize("NFC", text)) for text in texts)
    digests = (hashlib.sha256(" ".join(text.lower().split()).encode()).digest() for text in originals)
    return np.array([int.from_bytes(digest[:8]) / 2**64 for digest in digests])
