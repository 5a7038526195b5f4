"""Evaluation: the exact AUC of one million scores."""

import statistics
import time

import numpy as np

from bench.figures import figure
from pipeline.maths.metrics import auc

ROWS, TURNS = 1_000_000, 15


def auc_1m(_: object) -> None:
    """CPU time compared with scikit-learn. Like a model's scores, these are log probabilities computed in fp32."""
    from sklearn.metrics import roc_auc_score

    random = np.random.Generator(np.random.SFC64(0))
    logit = random.normal(-3.5, 1.2, ROWS)
    label = (random.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(np.float64)
    noisy = (logit + random.normal(0, 1, ROWS)).astype(np.float32)
    score = -np.logaddexp(np.float32(0), -noisy).astype(np.float64)
    milliseconds: dict[str, list[float]] = {"own": [], "library": []}
    values = {}
    for turn in range(TURNS + 1):
        for name, way in (("own", auc), ("library", roc_auc_score)):
            started = time.process_time()
            values[name] = float(way(label, score))
            if turn:
                milliseconds[name].append(1000 * (time.process_time() - started))
    if abs(values["own"] - values["library"]) > 1e-12:
        raise ValueError(f"the AUCs differ: {values}")
    ours, reference = milliseconds["own"], milliseconds["library"]
    ratios = [own / library for own, library in zip(ours, reference, strict=True)]
    figure("auc_1m_ms", statistics.median(ours), "CPU ms", statistics.median(reference), ratios)
