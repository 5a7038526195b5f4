"""The labels that a review can have for an aspect."""

import numpy as np
import numpy.typing as npt

SENTIMENTS = ("positive", "negative", "neutral")  # the order of alpha and of all that has three entries
NOT_MENTIONED, MENTIONED, UNKNOWN = -1, 3, -2  # labels beside the indices of SENTIMENTS

Labels = npt.NDArray[np.int8]


def labelled(labels: Labels) -> npt.NDArray[np.bool_]:
    """Cells with a polarity."""
    return (labels >= 0) & (labels < len(SENTIMENTS))
