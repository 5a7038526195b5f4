"""Codes of the labels: the sentiment about an aspect in a review."""

import numpy as np
import numpy.typing as npt

from pipeline.maths.arrays import Flags

SENTIMENTS = ("positive", "negative", "neutral")  # the order of alpha and of array axes of size 3
NOT_MENTIONED, MENTIONED, UNKNOWN = -1, 3, -2  # codes in addition to the indices of SENTIMENTS
CODES = {"positive": 0, "negative": 1, "neutral": 2, "not_mentioned": NOT_MENTIONED, "mentioned": MENTIONED}

Labels = npt.NDArray[np.int8]


def labelled(labels: Labels) -> Flags:
    """Flags of the cells with a sentiment, in the shape of `labels`."""
    return (labels >= 0) & (labels < len(SENTIMENTS))
