"""Scores of aspect sentiment predictions, as pure functions of arrays. N = reviews, A = aspects."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from pipeline.tasks.visobert.reviews.sentiments import (
    MENTIONED,
    NOT_MENTIONED,
    SENTIMENTS,
    UNKNOWN,
    Labels,
    labelled,
)
from pipeline.tasks.visobert.scoring.predictions import Flags, Prediction

CLASSES = tuple(range(len(SENTIMENTS)))
PRIOR_MENTIONS = 30  # how many mentions outweigh the threshold 0.5


def score(labels: Labels, prediction: Prediction, names: Sequence[str], polar: Flags) -> dict[str, float]:
    """All scores of a split, by name. `names`: the aspects as metric names; `polar`: [A], those with sentiments.

    Sentiments are judged on labelled cells, whatever the detection says of them; macro averages are always over the
    three of them, a sentiment that neither occurs nor is predicted counting 0. Aspects are detected on all cells but
    the unknown; `aspect_f1_macro` and `aspect_f1_micro` are over the aspects with sentiments, `aspect_f1_macro_all`
    is over detection-only ones too, where there are such. A pair is right when the aspect is mentioned with that
    sentiment; `pair_f1_macro` is over the (aspect, sentiment) pairs that occur.
    """
    cells = labelled(labels)
    found = _sentiment_scores(labels[cells], prediction.sentiment[cells])
    for aspect in np.flatnonzero(polar).tolist():
        of_aspect = cells[:, aspect]
        if of_aspect.any():
            truth, guess = labels[of_aspect, aspect], prediction.sentiment[of_aspect, aspect]
            found[f"f1/{names[aspect]}"] = _macro(truth, guess)
    if prediction.mentioned is not None:
        found |= _aspect_scores(labels, prediction.mentioned, names, polar)
        found |= _pair_scores(labels, prediction.sentiment, prediction.mentioned, polar)
    return found


def known_scores(labels: Labels | None, names: Sequence[str], polar: Flags, detection: bool) -> dict[str, str]:
    """Every score that `score` can give -> what it needs that the labels lack, "" where nothing.

    Which scores there are depends on labels alone: those of a perfect prediction. labels: None = there are none.
    """
    every = np.where(polar, np.array(CLASSES, dtype=np.int8)[:, None], np.int8(MENTIONED))  # all that may occur
    there = {} if labels is None else _perfect(labels, names, polar, detection)
    found = {}
    for name in _perfect(every, names, polar, detection):
        aspect = name.partition("/")[2]
        found[name] = "" if name in there else f"labels of {aspect}" if aspect in names else "labels"
    return found


def _perfect(labels: Labels, names: Sequence[str], polar: Flags, detection: bool) -> dict[str, float]:
    sentiment = np.where(labelled(labels), labels, np.int8(0))
    return score(labels, Prediction(sentiment, labels > NOT_MENTIONED if detection else None), names, polar)


def _sentiment_scores(truth: Labels, guess: npt.NDArray[np.int8]) -> dict[str, float]:
    if not len(truth):
        return {}
    _, _, f1, support = precision_recall_fscore_support(truth, guess, labels=CLASSES, zero_division=0)
    found = {"sentiment_f1_macro": float(f1.mean()), "sentiment_accuracy": float((truth == guess).mean())}
    found |= {f"sentiment_f1/{name}": float(value) for name, value in zip(SENTIMENTS, f1, strict=True)}
    return found | {f"support/{name}": float(count) for name, count in zip(SENTIMENTS, support, strict=True)}


def _aspect_scores(labels: Labels, mentioned: Flags, names: Sequence[str], polar: Flags) -> dict[str, float]:
    known = labels != UNKNOWN
    each = {aspect: _mention_f1(labels[:, aspect], mentioned[:, aspect])
            for aspect in range(len(names)) if known[:, aspect].any()}  # fmt: skip
    found = {f"aspect_f1/{names[aspect]}": value for aspect, value in each.items()}
    of_polar = [value for aspect, value in each.items() if polar[aspect]]
    if of_polar:
        found["aspect_f1_macro"] = float(np.mean(of_polar))
        found["aspect_f1_micro"] = _mention_f1(labels[:, polar].ravel(), mentioned[:, polar].ravel())
    if each and not polar.all():
        found["aspect_f1_macro_all"] = float(np.mean(list(each.values())))
    return found


def _mention_f1(labels: Labels, mentioned: Flags) -> float:
    """F1 of the mentions among the known cells, of which there is one at least. labels, mentioned: [N]"""
    known = labels != UNKNOWN
    return float(f1_score(labels[known] > NOT_MENTIONED, mentioned[known], zero_division=0))


def _pair_scores(labels: Labels, sentiment: npt.NDArray[np.int8], mentioned: Flags, polar: Flags) -> dict[str, float]:
    # a mention whose polarity is not known can make no pair right or wrong
    judged = ((labels == NOT_MENTIONED) | labelled(labels)) & polar
    classes = np.array(CLASSES)
    truth = (labels[..., None] == classes) & judged[..., None]  # [N, A, 3]
    guess = (sentiment[..., None] == classes) & (mentioned & judged)[..., None]
    hit, wanted, given = (truth & guess).sum(0), truth.sum(0), guess.sum(0)  # [A, 3]
    if not wanted.any():
        return {}
    occurring = wanted > 0
    each = 2 * hit[occurring] / (wanted + given)[occurring]
    right = ((truth == guess).all(2) | ~judged).all(1)
    return {
        "pair_f1_micro": float(2 * hit.sum() / (wanted.sum() + given.sum())),
        "pair_f1_macro": float(each.mean()),
        "pair_precision": float(hit.sum() / max(1, given.sum())),
        "pair_recall": float(hit.sum() / wanted.sum()),
        "exact_match": float(right.mean()),
    }


def _macro(truth: Labels, guess: npt.NDArray[np.int8]) -> float:
    return float(f1_score(truth, guess, labels=CLASSES, average="macro", zero_division=0))


def tuned_thresholds(labels: Labels, probability: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[A], the probability from which on an aspect counts as mentioned: near the one with the best F1 on these rows.

    The best one lies half-way between two neighbouring probabilities. With few mentions it is mostly chance, so it is
    drawn towards 0.5 by a weight of PRIOR_MENTIONS against the number of mentions. probability: [N, A].
    """
    thresholds = np.full(labels.shape[1], 0.5)
    for aspect in range(labels.shape[1]):
        rows = labels[:, aspect] != UNKNOWN
        truth, value = labels[rows, aspect] > NOT_MENTIONED, probability[rows, aspect]
        mentions = int(truth.sum())
        if mentions:
            best = _best_threshold(truth, value)
            thresholds[aspect] = (mentions * best + PRIOR_MENTIONS * 0.5) / (mentions + PRIOR_MENTIONS)
    return thresholds


def _best_threshold(truth: Flags, value: npt.NDArray[np.float64]) -> float:
    """The threshold with the best F1; of equally good ones the highest. At least one of `truth` is true."""
    order = np.argsort(-value, kind="stable")
    value, hits = value[order], np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(value) + 1) + truth.sum())
    f1[:-1][value[:-1] == value[1:]] = -1  # rows of one probability go together
    best = int(f1.argmax())
    below = value[best + 1] if best + 1 < len(value) else 0.0
    return float((value[best] + below) / 2)


def confusion(labels: Labels, sentiment: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """[3, 3] counts of labelled cells, truth by prediction. labels, sentiment: any shape, the same."""
    cells = labelled(labels)
    if not cells.any():
        return np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    counts: npt.NDArray[np.int64] = confusion_matrix(labels[cells], sentiment[cells], labels=CLASSES)
    return counts


def aspect_table(
    labels: Labels, prediction: Prediction, aspects: Sequence[str], polar: Flags
) -> list[Mapping[str, str | float]]:
    """A row an aspect: mentions, F1 of detection, F1 and support of each sentiment."""
    table: list[Mapping[str, str | float]] = []
    for index, aspect in enumerate(aspects):
        column = labels[:, index]
        row: dict[str, str | float] = {"aspect": aspect, "mentions": int((column > NOT_MENTIONED).sum())}
        if prediction.mentioned is not None and (column != UNKNOWN).any():
            row["aspect_f1"] = _mention_f1(column, prediction.mentioned[:, index])
        cells = labelled(column)
        if polar[index] and cells.any():
            truth, guess = column[cells], prediction.sentiment[cells, index]
            _, _, f1, support = precision_recall_fscore_support(truth, guess, labels=CLASSES, zero_division=0)
            row["sentiment_f1_macro"] = float(f1.mean())
            for name, value, count in zip(SENTIMENTS, f1, support, strict=True):
                row |= {f"f1_{name}": float(value), f"support_{name}": int(count)}
        table.append(row)
    return table
