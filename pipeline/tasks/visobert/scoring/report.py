"""What a finished model leaves beside its metrics: tables, pictures, predictions and its most confident errors."""

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.runtime.console import optional
from pipeline.storage.csv_table import write_csv
from pipeline.tasks.base import write_test_rows
from pipeline.tasks.visobert.prepare.review_statistics import ALL
from pipeline.tasks.visobert.reviews.reviews import Reviews
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, NOT_MENTIONED, SENTIMENTS, UNKNOWN, labelled
from pipeline.tasks.visobert.scoring.predictions import MENTIONED_TEXT, Answers
from pipeline.tasks.visobert.scoring.scores import aspect_table, confusion
from pipeline.tracking import plots

MOST_CONFIDENT = 200
PICTURED = 100  # confusions with the most labels, of which there is a picture; the tables hold all


def write_report(folder: Path, split: str, reviews: Reviews, answers: Answers) -> None:
    """Files of a split into `evaluation/` and `plots/` of the folder."""
    tables, pictures = folder / "evaluation", folder / "plots"
    for part in (tables, pictures):
        part.mkdir(parents=True, exist_ok=True)
    rows = aspect_table(reviews.labels, answers.prediction, reviews.aspects, answers.polar)
    write_csv(pd.DataFrame(rows), tables / f"{split}_aspects.csv")
    said = answers.prediction.sentiment
    matrices = {ALL: confusion(reviews.labels, said)}
    for column in np.flatnonzero(answers.polar).tolist():
        matrices[reviews.aspects[column]] = confusion(reviews.labels[:, column], said[:, column])
    named = {aspect: pd.DataFrame(counts, index=pd.Index(SENTIMENTS, name="truth"), columns=list(SENTIMENTS))
             for aspect, counts in matrices.items()}  # fmt: skip
    write_csv(pd.concat(named, names=["aspect"]).reset_index(), tables / f"{split}_confusion.csv")
    shown = sorted(matrices, key=lambda aspect: -int(matrices[aspect].sum()))[:PICTURED]
    pictured = {aspect.replace("$", r"\$"): counts  # else two of them would open a formula
                for aspect, counts in matrices.items() if aspect in shown}  # fmt: skip
    with optional(f"plots/{split}_confusion.png"):
        plots.confusion(pictured, SENTIMENTS, pictures / f"{split}_confusion.png")
    given = {"text": list(reviews.texts), "labels": [reviews.labels_text(row) for row in range(len(reviews))]}
    write_csv(pd.concat([pd.DataFrame(given), answers.frame()], axis=1), tables / f"{split}_predictions.csv")
    write_csv(confident_errors(reviews, answers), tables / f"{split}_errors.csv")


def write_pair_rows(folder: Path, reviews: Reviews, answers: Answers) -> None:
    """What `test/pair_f1_micro` is made of, a row a review: twice the right pairs, over the true and the said ones.

    Nothing where there is no such metric: without aspect detection, or without a labelled cell.
    """
    labels, said, polar = reviews.labels, answers.prediction, answers.polar
    if said.mentioned is None or not labelled(labels)[:, polar].any():
        return
    true = labelled(labels) & polar
    given = said.mentioned & polar & (true | (labels == NOT_MENTIONED))  # a mention of unknown polarity: no pair
    right = true & given & (said.sentiment == labels)
    write_test_rows(folder, {
        "numerator/pair_f1_micro": (2 * right.sum(1)).astype(np.int32),
        "denominator/pair_f1_micro": (true.sum(1) + given.sum(1)).astype(np.int32),
    })  # fmt: skip


def confident_errors(reviews: Reviews, answers: Answers) -> pd.DataFrame:
    """Cells where the model is wrong, the most certain first: sentiment of labelled cells, and detection.

    `probability` is that of what was predicted. At most MOST_CONFIDENT rows.
    """
    words = dict(enumerate(SENTIMENTS)) | {MENTIONED: MENTIONED_TEXT, NOT_MENTIONED: "-"}
    labels, said = reviews.labels, answers.prediction
    wrong = [(answers.sentiment.max(-1), labelled(labels) & (said.sentiment != labels), "sentiment")]
    if said.mentioned is not None and answers.mentioned is not None:
        sure = np.where(said.mentioned, answers.mentioned, 1 - answers.mentioned)
        wrong.append((sure, (labels != UNKNOWN) & ((labels > NOT_MENTIONED) != said.mentioned), "mention"))
    found = []
    for sure, cells, kind in wrong:
        for row, aspect in zip(*np.nonzero(cells), strict=True):
            if kind == "sentiment":
                guess = SENTIMENTS[said.sentiment[row, aspect]]
            else:
                guess = words[NOT_MENTIONED] if labels[row, aspect] > NOT_MENTIONED else MENTIONED_TEXT
            found.append((sure[row, aspect], kind, reviews.aspects[aspect], words[labels[row, aspect]], guess, row))
    found.sort(key=lambda error: -error[0])
    listed = [(*error[:5], reviews.texts[error[5]]) for error in found[:MOST_CONFIDENT]]
    return pd.DataFrame(listed, columns=["probability", "error", "aspect", "truth", "predicted", "text"])
