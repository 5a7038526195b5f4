"""Alpha, the weight of each sentiment in the focal loss, and the counts from which it is computed.

Auto alpha is `total / (3 * count)` over the labelled cells of the training split, in the order of SENTIMENTS. A
sentiment with a third of the cells has weight 1; rarer sentiments have larger weights.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from annotated_types import Ge
from pydantic import TypeAdapter

from pipeline.errors import UserError
from pipeline.maths.arrays import Floats, Ints
from pipeline.storage.files import replacing, write_json
from pipeline.tasks.visobert.reviews.columns import quoted
from pipeline.tasks.visobert.reviews.reviews import Reviews
from pipeline.tasks.visobert.reviews.sentiments import SENTIMENTS

ALPHA_FILE = "alpha.json"
FORMULA = "alpha[s] = labelled_cells / (3 * counts[s]), s in the order positive, negative, neutral"

Count = Annotated[int, Ge(0)]
Weight = Annotated[float, Ge(0)]
Mode = Literal["auto", "custom", "ones"]


@dataclass(frozen=True)
class Alpha:
    """Weights of positive, negative, neutral, with their counts and source."""

    mode: Mode
    vector: tuple[Weight, Weight, Weight]
    counts: tuple[Count, Count, Count]
    per_aspect_counts: tuple[tuple[Count, Count, Count], ...]  # [A], in the order of aspects
    aspects: tuple[str, ...]
    detection_only: tuple[str, ...]
    labelled_cells: int  # sum of `counts`
    digest: str  # SHA-256 of the training file, hex
    source: str  # path of the training file, or "embedded"
    dialect: str = ""  # data.labels in canonical text; empty if it is null

    @property
    def text(self) -> str:
        """The weights as text, for an MLflow param; auto alpha is rounded to four decimals."""
        return json.dumps([round(weight, 4) for weight in self.vector] if self.mode == "auto" else list(self.vector))

    def metrics(self) -> dict[str, float]:
        """The weights in full precision, by metric name."""
        return {f"alpha/{name}": weight for name, weight in zip(SENTIMENTS, self.vector, strict=True)}

    def write(self, file: Path) -> None:
        """Write alpha.json atomically."""
        tree: dict[str, Any] = {"formula": FORMULA if self.mode == "auto" else None, "order": SENTIMENTS}
        tree |= asdict(self)
        tree["per_aspect_alpha"] = {
            aspect: [sum(counts) / (3 * count) if count else None for count in counts]
            for aspect, counts in zip(self.aspects, self.per_aspect_counts, strict=True)
        }
        with replacing(file, str(os.getpid())) as work:
            write_json(work, tree)

    @classmethod
    def read(cls, file: Path) -> "Alpha":
        """Read a file that `write` wrote.

        Raises:
            UserError: the file cannot be read, or is not an alpha.json.
        """
        try:
            return TypeAdapter(cls).validate_python(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:  # errors of pydantic and json are ValueErrors
            raise UserError(f"{file}: not an alpha.json of data_prep ({' '.join(str(error).split())[:200]})") from None


def check_same_data(alpha: Alpha, train: Reviews, detection_only: Sequence[str], run: str) -> None:
    """Check that alpha was computed from the same file, with the same meaning of labels and the same aspects.

    `run`: the source of alpha, for the error message.

    Raises:
        UserError: the file, `data.labels`, the aspects or the detection-only aspects differ.
    """
    if alpha.digest != train.digest:
        raise UserError(
            f"{run}: its alpha is of {alpha.source} (SHA-256 {alpha.digest[:12]}...), but the training file is "
            f"{train.source} ({train.digest[:12]}...); allowed: a data_prep run of the same file"
        )
    if alpha.dialect != train.dialect:
        raise UserError(
            f"{run}: its data.labels is {alpha.dialect or 'null'}, here {train.dialect or 'null'}; allowed: the same"
        )
    if alpha.aspects != train.aspects or set(alpha.detection_only) != set(detection_only):
        raise UserError(
            f"{run}: it counted {', '.join(alpha.aspects)} with detection-only {list(alpha.detection_only)}, "
            f"this run {', '.join(train.aspects)} with {list(detection_only)}; allowed: the same"
        )


def count_sentiments(labels: npt.NDArray[np.int8], repeats: Floats | None = None) -> Ints:
    """Count the labelled cells of each aspect and sentiment. labels [N, A] -> [A, 3]

    `repeats`: [N], how often each review counts; the sums are rounded.
    """
    weights = np.ones(len(labels)) if repeats is None else repeats
    counts = np.stack([weights @ (labels == code) for code in range(len(SENTIMENTS))], axis=1)
    rounded: Ints = np.rint(counts).astype(np.int64)
    return rounded


def auto_alpha(counts: Sequence[int] | Ints, dropped: str = "") -> tuple[float, float, float]:
    """total / (3 * count) for each sentiment. counts: [3]; dropped: text about dropped cells, for the error message

    Raises:
        UserError: a sentiment has no example.
    """
    positive, negative, neutral = (int(count) for count in counts)
    total = positive + negative + neutral
    cells = f"{total} labelled cells ({dropped})" if dropped else f"{total} labelled cells"
    for name, count in zip(SENTIMENTS, (positive, negative, neutral), strict=True):
        if not count:
            raise UserError(
                f"alpha: no {name} label among {cells}, so auto alpha has no weight for it; give "
                f"training data with {name} labels, or multi_label.focal_alpha as a list of 3 numbers or null"
            )
    return total / (3 * positive), total / (3 * negative), total / (3 * neutral)


def compute_alpha(
    reviews: Reviews,
    detection_only: Sequence[str],
    focal_alpha: Literal["auto"] | tuple[float, float, float] | None,
    repeats: Floats | None = None,
) -> Alpha:
    """Compute alpha of a training split, ignoring the sentiments of its `detection_only` aspects.

    `focal_alpha`: as in the config; None = ones. `repeats`: [N], how often each review counts; None = once.

    Raises:
        UserError: there is no labelled cell, or alpha is auto and a sentiment has no labelled cell.
    """
    per_aspect = count_sentiments(reviews.without_polarity(detection_only).labels, repeats)
    counts = per_aspect.sum(axis=0)
    dropped = _dropped_cells(reviews)
    if not counts.sum():
        reason = f"no labelled cell at all: {dropped}" if dropped else "no labelled cell at all"
        raise UserError(f"{reviews.source}: {reason}; allowed: reviews with sentiments to learn from")
    mode: Mode = "auto" if focal_alpha == "auto" else "ones" if focal_alpha is None else "custom"
    vector = auto_alpha(counts, dropped) if focal_alpha == "auto" else focal_alpha or (1.0, 1.0, 1.0)
    return Alpha(
        mode=mode,
        vector=vector,
        counts=_triple(counts),
        per_aspect_counts=tuple(map(_triple, per_aspect)),
        aspects=reviews.aspects,
        detection_only=tuple(detection_only),
        labelled_cells=int(counts.sum()),
        digest=reviews.digest,
        source=reviews.source,
        dialect=reviews.dialect,
    )


def _dropped_cells(reviews: Reviews) -> str:
    """Text with the number of dropped label cells and the first of them; empty if there are none."""
    if not reviews.dropped:
        return ""
    first = reviews.dropped[0]
    count = len({(label.row, label.column) for label in reviews.dropped})
    where = f"row {first.row}, column {first.column}: {quoted(first.value)}"
    return f"{count} of {reviews.cells} cells are no labels (first: {where})"


def _triple(counts: Ints) -> tuple[int, int, int]:
    positive, negative, neutral = counts.tolist()
    return positive, negative, neutral
