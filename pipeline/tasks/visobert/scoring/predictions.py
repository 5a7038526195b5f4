"""From logits to what a user reads: aspects with sentiment and probability."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from pipeline.maths.calibration import Fitted
from pipeline.tasks.visobert.model import Output
from pipeline.tasks.visobert.reviews.sentiments import SENTIMENTS

Floats = npt.NDArray[np.float64]
MENTIONED_TEXT = "mentioned"
# of a logged model's folder
ASPECTS_FILE, TOKENIZER_FOLDER, ENCODER_FOLDER = "aspects.json", "tokenizer", "encoder"

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Prediction:
    """What a model says of every cell."""

    sentiment: npt.NDArray[np.int8]  # [N, A], index of SENTIMENTS, whether the aspect is mentioned or not
    mentioned: Flags | None  # [N, A]; None where the model does not detect aspects


@dataclass(frozen=True)
class Answers:
    """A model's answers for N reviews and A aspects."""

    output: Output  # logits [N, A, 3] and [N, A], on the CPU
    thresholds: npt.NDArray[np.float64]  # [A]
    aspects: Sequence[str]
    polar: Flags  # [A], aspects with sentiments
    calibration: Fitted = field(default_factory=dict)  # of probabilities; predictions do not depend on it

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
    def prediction(self) -> Prediction:
        """By the probabilities without calibration: those that the thresholds were tuned on."""
        probability = _mentioned(self.output)
        mentioned = None if probability is None else probability >= self.thresholds
        return Prediction(_sentiment(self.output).argmax(-1).astype(np.int8), mentioned)

    def frame(self) -> pd.DataFrame:
        """A row a review: a column an aspect (the sentiment, `mentioned`, or None), then the probabilities.

        Without aspect detection every aspect has a sentiment.
        """
        words = np.array(SENTIMENTS, dtype=object)
        found: dict[str, object] = {}
        for index, aspect in enumerate(self.aspects):
            said: npt.NDArray[np.object_] = words[self.prediction.sentiment[:, index]]
            if not self.polar[index]:
                said = np.full(len(said), MENTIONED_TEXT if self.mentioned is not None else None, dtype=object)
            if self.prediction.mentioned is not None:
                said = np.where(self.prediction.mentioned[:, index], said, np.array(None, dtype=object))
            found[aspect] = pd.Series(said, dtype=object)  # else pandas makes NaN of None
        for index, aspect in enumerate(self.aspects):
            if self.mentioned is not None:
                found[f"{aspect}/{MENTIONED_TEXT}"] = self.mentioned[:, index]
            if self.polar[index]:
                for position, name in enumerate(SENTIMENTS):
                    found[f"{aspect}/{name}"] = self.sentiment[:, index, position]
        return pd.DataFrame(found, columns=list(column_types(self.aspects, self.polar, self.mentioned is not None)))


def _sentiment(output: Output, temperature: float = 1.0) -> Floats:
    return torch.softmax(output.sentiment.double() / temperature, -1).numpy()


def _mentioned(output: Output, temperature: float = 1.0) -> Floats | None:
    return None if output.aspect is None else torch.sigmoid(output.aspect.double() / temperature).numpy()


def column_types(aspects: Sequence[str], polar: Flags, detection: bool) -> dict[str, str]:
    """The columns of `Answers.frame` with MLflow's types."""
    kinds = dict.fromkeys(aspects, "string")
    for aspect, has_sentiments in zip(aspects, polar, strict=True):
        parts = ([MENTIONED_TEXT] if detection else []) + (list(SENTIMENTS) if has_sentiments else [])
        kinds |= {f"{aspect}/{part}": "double" for part in parts}
    return kinds
