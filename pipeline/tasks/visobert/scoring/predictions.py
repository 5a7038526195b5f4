"""Predicted labels and probabilities, from the logits of a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from pipeline.maths.arrays import Flags, Floats
from pipeline.maths.calibration import Fitted
from pipeline.tasks.visobert.model import Output
from pipeline.tasks.visobert.reviews.sentiments import SENTIMENTS

MENTIONED_TEXT = "mentioned"


@dataclass(frozen=True)
class PredictedLabels:
    """Predicted labels of N reviews and A aspects."""

    sentiment: npt.NDArray[np.int8]  # [N, A], index of SENTIMENTS, also for aspects that are not mentioned
    mentioned: Flags | None  # [N, A]; None without aspect detection


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for N reviews and A aspects."""

    output: Output  # logits [N, A, 3] and [N, A], on the CPU
    thresholds: Floats  # [A]
    aspects: Sequence[str]
    polar: Flags  # [A], aspects with sentiments
    calibration: Fitted = field(default_factory=dict)  # changes probabilities, but not labels

    @cached_property
    def sentiment(self) -> Floats:
        """Probability of each sentiment, given that the aspect is mentioned. [N, A, 3]"""
        return _sentiment(self.output, self._temperature("sentiment"))

    @cached_property
    def mentioned(self) -> Floats | None:
        """Probability that the aspect is mentioned. [N, A]; None without aspect detection."""
        return _mentioned(self.output, self._temperature("aspect"))

    def _temperature(self, head: str) -> float:
        return self.calibration[head]["temperature"] if head in self.calibration else 1.0

    @cached_property
    def labels(self) -> PredictedLabels:
        """Labels, from the uncalibrated probabilities, for which the thresholds were tuned."""
        probability = _mentioned(self.output)
        mentioned = None if probability is None else probability >= self.thresholds
        return PredictedLabels(_sentiment(self.output).argmax(-1).astype(np.int8), mentioned)

    def frame(self) -> pd.DataFrame:
        """One row per review. For each aspect, one column with its sentiment, `mentioned` or None, then probabilities.

        Without aspect detection, aspects with sentiments have one in every review, and the others are None.
        """
        words = np.array(SENTIMENTS, dtype=object)
        columns: dict[str, object] = {}
        for index, aspect in enumerate(self.aspects):
            cells: npt.NDArray[np.object_] = words[self.labels.sentiment[:, index]]
            if not self.polar[index]:
                cells = np.full(len(cells), MENTIONED_TEXT if self.mentioned is not None else None, dtype=object)
            if self.labels.mentioned is not None:
                cells = np.where(self.labels.mentioned[:, index], cells, np.array(None, dtype=object))
            columns[aspect] = pd.Series(cells, dtype=object)  # otherwise pandas would turn None into NaN
            if self.mentioned is not None:
                columns[f"{aspect}/{MENTIONED_TEXT}"] = self.mentioned[:, index]
            if self.polar[index]:
                for position, name in enumerate(SENTIMENTS):
                    columns[f"{aspect}/{name}"] = self.sentiment[:, index, position]
        return pd.DataFrame(columns, columns=list(column_types(self.aspects, self.polar, self.mentioned is not None)))


def column_types(aspects: Sequence[str], polar: Flags, detection: bool) -> dict[str, str]:
    """Map the columns of `Predictions.frame` to their MLflow types."""
    types = dict.fromkeys(aspects, "string")
    for aspect, has_sentiments in zip(aspects, polar, strict=True):
        parts = ([MENTIONED_TEXT] if detection else []) + (list(SENTIMENTS) if has_sentiments else [])
        types |= {f"{aspect}/{part}": "double" for part in parts}
    return types


def _sentiment(output: Output, temperature: float = 1.0) -> Floats:
    return torch.softmax(output.sentiment.double() / temperature, -1).numpy()


def _mentioned(output: Output, temperature: float = 1.0) -> Floats | None:
    return None if output.aspect is None else torch.sigmoid(output.aspect.double() / temperature).numpy()
