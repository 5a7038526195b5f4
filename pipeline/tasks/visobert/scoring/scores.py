"""Scores of predicted labels, as pure functions of arrays. N = reviews, A = aspects."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from pipeline.maths.arrays import Flags, Floats, Ints
from pipeline.tasks.visobert.reviews.sentiments import (
    MENTIONED,
    NOT_MENTIONED,
    SENTIMENTS,
    UNKNOWN,
    Labels,
    labelled,
)
from pipeline.tasks.visobert.scoring.predictions import PredictedLabels

CLASSES = tuple(range(len(SENTIMENTS)))
PRIOR_MENTIONS = 30  # the prior threshold 0.5 has the weight of this many mentions


def score(labels: Labels, predicted: PredictedLabels, names: Sequence[str], polar: Flags) -> dict[str, float]:
    """All scores of a split, by name. `names`: aspects as metric names; `polar`: [A], flags of those with sentiments.

    Sentiments are scored on labelled cells, whether or not the aspect is detected. Macro averages are over all three
    sentiments; a sentiment that neither occurs nor is predicted has F1 0. `sentiment_f1_macro_present` is over those
    that occur. Mentions are scored on all cells that are not
    unknown. `aspect_f1_macro` and `aspect_f1_micro` are over the aspects with sentiments; `aspect_f1_macro_all`, which
    exists only if there are detection-only aspects, is over all aspects. A pair is correct if the aspect is detected
    and its sentiment is correct; `pair_f1_macro` is over the (aspect, sentiment) pairs that occur.
    """
    cells = labelled(labels)
    scores = _sentiment_scores(labels[cells], predicted.sentiment[cells])
    for aspect in np.flatnonzero(polar).tolist():
        rows = cells[:, aspect]
        if rows.any():
            truth, guess = labels[rows, aspect], predicted.sentiment[rows, aspect]
            scores[f"f1/{names[aspect]}"] = float(
                f1_score(truth, guess, labels=CLASSES, average="macro", zero_division=0)
            )
    if predicted.mentioned is not None:
        scores |= _mention_scores(labels, predicted.mentioned, names, polar)
        scores |= _pair_scores(labels, predicted.sentiment, predicted.mentioned, polar)
    return scores


def known_scores(labels: Labels | None, names: Sequence[str], polar: Flags, detection: bool) -> dict[str, str]:
    """Map every score that `score` can return to the labels that are missing for it; "" if it is defined.

    labels: None = the split does not exist. The defined scores depend only on the labels, so they are found by scoring
    a perfect prediction.
    """
    all_labels = np.where(polar, np.array(CLASSES, dtype=np.int8)[:, None], np.int8(MENTIONED))
    defined = {} if labels is None else _perfect_scores(labels, names, polar, detection)
    missing = {}
    for name in _perfect_scores(all_labels, names, polar, detection):
        aspect = name.partition("/")[2]
        missing[name] = "" if name in defined else f"labels of {aspect}" if aspect in names else "labels"
    return missing


def _perfect_scores(labels: Labels, names: Sequence[str], polar: Flags, detection: bool) -> dict[str, float]:
    sentiment = np.where(labelled(labels), labels, np.int8(0))
    return score(labels, PredictedLabels(sentiment, labels > NOT_MENTIONED if detection else None), names, polar)


def _sentiment_scores(truth: Labels, guess: npt.NDArray[np.int8]) -> dict[str, float]:
    if not len(truth):
        return {}
    _, _, f1, support = precision_recall_fscore_support(truth, guess, labels=CLASSES, zero_division=0)
    scores = {
        "sentiment_f1_macro": float(f1.mean()),
        "sentiment_f1_macro_present": float(f1[support > 0].mean()),
        "sentiment_accuracy": float((truth == guess).mean()),
    }
    scores |= {f"sentiment_f1/{name}": float(value) for name, value in zip(SENTIMENTS, f1, strict=True)}
    return scores | {f"support/{name}": float(count) for name, count in zip(SENTIMENTS, support, strict=True)}


def _mention_scores(labels: Labels, mentioned: Flags, names: Sequence[str], polar: Flags) -> dict[str, float]:
    known = (labels != UNKNOWN).any(axis=0)
    f1 = {aspect: _mention_f1(labels[:, aspect], mentioned[:, aspect]) for aspect in np.flatnonzero(known).tolist()}
    scores = {f"aspect_f1/{names[aspect]}": value for aspect, value in f1.items()}
    polar_f1 = [value for aspect, value in f1.items() if polar[aspect]]
    if polar_f1:
        scores["aspect_f1_macro"] = float(np.mean(polar_f1))
        scores["aspect_f1_micro"] = _mention_f1(labels[:, polar].ravel(), mentioned[:, polar].ravel())
    if f1 and not polar.all():
        scores["aspect_f1_macro_all"] = float(np.mean(list(f1.values())))
    return scores


def _mention_f1(labels: Labels, mentioned: Flags) -> float:
    """F1 of mentions over the cells that are not unknown; at least one is required. labels, mentioned: [N]"""
    known = labels != UNKNOWN
    return float(f1_score(labels[known] > NOT_MENTIONED, mentioned[known], zero_division=0))


def _pair_scores(labels: Labels, sentiment: npt.NDArray[np.int8], mentioned: Flags, polar: Flags) -> dict[str, float]:
    # pairs with a mention of unknown polarity are not scored
    judged = ((labels == NOT_MENTIONED) | labelled(labels)) & polar
    classes = np.array(CLASSES)
    truth = (labels[..., None] == classes) & judged[..., None]  # [N, A, 3]
    guess = (sentiment[..., None] == classes) & (mentioned & judged)[..., None]
    hits, true, predicted = (truth & guess).sum(0), truth.sum(0), guess.sum(0)  # [A, 3]
    if not true.any():
        return {}
    occurring = true > 0
    f1 = 2 * hits[occurring] / (true + predicted)[occurring]
    right = ((truth == guess).all(2) | ~judged).all(1)
    return {
        "pair_f1_micro": float(2 * hits.sum() / (true.sum() + predicted.sum())),
        "pair_f1_macro": float(f1.mean()),
        "pair_precision": float(hits.sum() / max(1, predicted.sum())),
        "pair_recall": float(hits.sum() / true.sum()),
        "exact_match": float(right.mean()),
    }


def tuned_thresholds(labels: Labels, probability: Floats) -> Floats:
    """Threshold of each aspect on the probability of a mention, tuned for F1 on these rows. probability: [N, A] -> [A]

    The threshold with the best F1 is the midpoint of two neighbouring probabilities. As it is uncertain if there are
    few mentions, it is averaged with 0.5, with weights of the number of mentions and PRIOR_MENTIONS.
    """
    thresholds = np.full(labels.shape[1], 0.5)
    for aspect in range(labels.shape[1]):
        rows = labels[:, aspect] != UNKNOWN
        truth, values = labels[rows, aspect] > NOT_MENTIONED, probability[rows, aspect]
        mentions = int(truth.sum())
        if mentions:
            best = _best_threshold(truth, values)
            thresholds[aspect] = (mentions * best + PRIOR_MENTIONS * 0.5) / (mentions + PRIOR_MENTIONS)
    return thresholds


def _best_threshold(truth: Flags, values: Floats) -> float:
    """The threshold with the best F1; the highest one if several are equal. At least one `truth` must be true."""
    order = np.argsort(-values, kind="stable")
    values, hits = values[order], np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(values) + 1) + truth.sum())
    f1[:-1][values[:-1] == values[1:]] = -1  # no threshold separates equal probabilities
    best = int(f1.argmax())
    below = values[best + 1] if best + 1 < len(values) else 0.0
    return float((values[best] + below) / 2)


def confusion(labels: Labels, sentiment: npt.NDArray[np.int8]) -> Ints:
    """Confusion matrix [3, 3] of labelled cells, truth by prediction. labels and sentiment have the same shape."""
    cells = labelled(labels)
    if not cells.any():
        return np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    counts: Ints = confusion_matrix(labels[cells], sentiment[cells], labels=CLASSES)
    return counts


def aspect_table(
    labels: Labels, predicted: PredictedLabels, aspects: Sequence[str], polar: Flags
) -> list[Mapping[str, str | float]]:
    """One row per aspect: number of mentions, F1 of detection, F1 and support of each sentiment."""
    table: list[Mapping[str, str | float]] = []
    for index, aspect in enumerate(aspects):
        column = labels[:, index]
        row: dict[str, str | float] = {"aspect": aspect, "mentions": int((column > NOT_MENTIONED).sum())}
        if predicted.mentioned is not None and (column != UNKNOWN).any():
            row["aspect_f1"] = _mention_f1(column, predicted.mentioned[:, index])
        cells = labelled(column)
        if polar[index] and cells.any():
            truth, guess = column[cells], predicted.sentiment[cells, index]
            _, _, f1, support = precision_recall_fscore_support(truth, guess, labels=CLASSES, zero_division=0)
            row["sentiment_f1_macro"] = float(f1.mean())
            for name, value, count in zip(SENTIMENTS, f1, support, strict=True):
                row |= {f"f1_{name}": float(value), f"support_{name}": int(count)}
        table.append(row)
    return table
