"""The training, validation and test reviews of a run."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import EMBEDDED, ReviewFormatConfig, TrainDataConfig
from pipeline.tasks.visobert.reviews.embedded_reviews import embedded_reviews
from pipeline.tasks.visobert.reviews.reviews import Reviews, detection_only, read_reviews, without_polarity


@dataclass(frozen=True)
class Splits:
    """All with the training file's aspects; a detection-only aspect's labels are mentions in every split."""

    train: Reviews
    valid: Reviews
    test: Reviews | None
    detection_only: tuple[str, ...]

    @property
    def named(self) -> dict[str, Reviews]:
        """Those that there are, as `train`, `valid` and `test`."""
        named = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: reviews for name, reviews in named.items() if reviews is not None}

    @property
    def digest(self) -> str:
        """SHA-256 of all files together, hex."""
        told = " ".join(f"{name} {reviews.digest} {len(reviews)}" for name, reviews in self.named.items())
        return hashlib.sha256(told.encode()).hexdigest()


def read_splits(
    files: Mapping[str, str | None], form: ReviewFormatConfig
) -> tuple[dict[str, Reviews], tuple[str, ...]]:
    """The splits that have a file, by name, and the detection-only aspects.

    `files`: train, validation and test. The training file decides which aspects there are and which are
    detection-only; without one all three are the embedded reviews.

    Raises:
        UserError: a file cannot be read as reviews.
    """
    embedded = files["train"] is None
    if embedded:
        folder = embedded_reviews(form.embedded, Path(form.cache))
        files = {name: str(folder / f"{name}.csv") for name in files}
    train = read_reviews(Path(files["train"] or ""), form)
    only = detection_only(train, form.detection_only)
    found = {name: read_reviews(Path(file), form, train.aspects)
             for name, file in files.items() if file and name != "train"}  # fmt: skip
    found = {"train": replace(train, source=EMBEDDED) if embedded else train} | found
    return {name: without_polarity(reviews, only) for name, reviews in found.items()}, only


def load_splits(config: TrainDataConfig) -> Splits:
    """Read the files, or the embedded reviews; without a validation file, a share of the training file validates.

    Raises:
        UserError: a file cannot be read as reviews, or a split would be empty.
    """
    files = {"train": config.train, "validation": config.validation, "test": config.test}
    found, only = read_splits(files, config)
    found = {name: reviews.with_text() for name, reviews in found.items()}
    train, valid = found["train"], found.get("validation")
    if valid is None:
        drawn = _drawn(train.texts, config.validation_share)
        if drawn.all() or not drawn.any():
            raise UserError(
                f"{train.source}: {len(train)} reviews cannot be split by data.validation_share "
                f"{config.validation_share:g}, allowed: enough for both splits, or data.validation"
            )
        # what there is to say of the file is said of the training split
        train, valid = train.part(~drawn), replace(train.part(drawn), dropped=(), notes=())
    return Splits(train, valid, found.get("test"), only)


def _drawn(texts: tuple[str, ...], share: float) -> npt.NDArray[np.bool_]:
    """[N], whether a review validates: by the hash of its text, so that copies of it stay together."""
    folded = (" ".join(text.lower().split()) for text in texts)
    values = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64 for text in folded]
    return np.array(values) < share
