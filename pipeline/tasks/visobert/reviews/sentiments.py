"""Label codes of an aspect in a review."""

import numpy as np
import numpy.typing as npt

SENTIMENTS = ("positive", "negative", "neutral")  # the order of alpha and of every axis of three
NOT_MENTIONED, MENTIONED, UNKNOWN = -1, 3, -2  # labels besides the indices of SENTIMENTS

Labels = npt.NDArray[np.int8]


def labelled(labels: Labels) -> npt.NDArray[np.bool_]:
    """Cells with a sentiment."""
    return (labels >= 0) & (labels < len(SENTIMENTS))
