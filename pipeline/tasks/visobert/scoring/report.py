"""Report files about the predictions of a finished model: tables, pictures, and its most confident errors."""

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.runtime.console import optional
from pipeline.storage.csv_table import write_csv
from pipeline.tasks.base import write_test_rows
from pipeline.tasks.visobert.prepare.review_statistics import ALL
from pipeline.tasks.visobert.reviews.reviews import Reviews
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, NOT_MENTIONED, SENTIMENTS, UNKNOWN, labelled
from pipeline.tasks.visobert.scoring.predictions import MENTIONED_TEXT, Predictions
from pipeline.tasks.visobert.scoring.scores import aspect_table, confusion
from pipeline.tracking import plots

MAX_ERRORS = 200


def write_report(folder: Path, split: str, reviews: Reviews, predictions: Predictions) -> None:
    """Write the report files of a split into `evaluation/` and `plots/` in the folder."""
    tables, pictures = folder / "evaluation", folder / "plots"
    tables.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    rows = aspect_table(reviews.labels, predictions.labels, reviews.aspects, predictions.polar)
    write_csv(pd.DataFrame(rows), tables / f"{split}_aspects.csv")
    sentiment = predictions.labels.sentiment
    matrices = {ALL: confusion(reviews.labels, sentiment)}
    for column in np.flatnonzero(predictions.polar).tolist():
        matrices[reviews.aspects[column]] = confusion(reviews.labels[:, column], sentiment[:, column])
    frames = {aspect: pd.DataFrame(counts, index=pd.Index(SENTIMENTS, name="truth"), columns=list(SENTIMENTS))
              for aspect, counts in matrices.items()}  # fmt: skip
    write_csv(pd.concat(frames, names=["aspect"]).reset_index(), tables / f"{split}_confusion.csv")
    with optional(f"plots/{split}_confusion.png"):
        plots.confusion(matrices, SENTIMENTS, pictures / f"{split}_confusion.png")
    texts = {"text": list(reviews.texts), "labels": [reviews.labels_text(row) for row in range(len(reviews))]}
    write_csv(pd.concat([pd.DataFrame(texts), predictions.frame()], axis=1), tables / f"{split}_predictions.csv")
    write_csv(confident_errors(reviews, predictions), tables / f"{split}_errors.csv")


def write_pair_rows(folder: Path, reviews: Reviews, predictions: Predictions) -> None:
    """Write each review's terms of the numerator (2 * hits) and denominator (true + predicted) of `test/pair_f1_micro`.

    Nothing is written if the metric is undefined: without aspect detection, or without labelled cells.
    """
    labels, predicted, polar = reviews.labels, predictions.labels, predictions.polar
    if predicted.mentioned is None or not labelled(labels)[:, polar].any():
        return
    true_pairs = labelled(labels) & polar
    judged = true_pairs | (labels == NOT_MENTIONED)  # pairs with a mention of unknown polarity are not scored
    predicted_pairs = predicted.mentioned & polar & judged
    hits = true_pairs & predicted_pairs & (predicted.sentiment == labels)
    write_test_rows(folder, {
        "numerator/pair_f1_micro": (2 * hits.sum(1)).astype(np.int32),
        "denominator/pair_f1_micro": (true_pairs.sum(1) + predicted_pairs.sum(1)).astype(np.int32),
    })  # fmt: skip


def confident_errors(reviews: Reviews, predictions: Predictions) -> pd.DataFrame:
    """Misclassified cells by descending confidence: sentiments of labelled cells, and mentions.

    At most MAX_ERRORS rows. The column `probability` is the probability of the prediction.
    """
    words = dict(enumerate(SENTIMENTS)) | {MENTIONED: MENTIONED_TEXT, NOT_MENTIONED: "-"}
    labels, predicted = reviews.labels, predictions.labels
    kinds = [("sentiment", predictions.sentiment.max(-1), labelled(labels) & (predicted.sentiment != labels))]
    if predicted.mentioned is not None and predictions.mentioned is not None:
        confidence = np.where(predicted.mentioned, predictions.mentioned, 1 - predictions.mentioned)
        wrong = (labels != UNKNOWN) & ((labels > NOT_MENTIONED) != predicted.mentioned)
        kinds.append(("mention", confidence, wrong))
    errors = []
    for kind, confidence, wrong in kinds:
        for row, aspect in zip(*np.nonzero(wrong), strict=True):
            if kind == "sentiment":
                guess = SENTIMENTS[predicted.sentiment[row, aspect]]
            else:
                guess = words[NOT_MENTIONED] if labels[row, aspect] > NOT_MENTIONED else MENTIONED_TEXT
            truth = words[labels[row, aspect]]
            errors.append((confidence[row, aspect], kind, reviews.aspects[aspect], truth, guess, reviews.texts[row]))
    errors.sort(key=lambda error: -error[0])
    return pd.DataFrame(errors[:MAX_ERRORS], columns=["probability", "error", "aspect", "truth", "predicted", "text"])
