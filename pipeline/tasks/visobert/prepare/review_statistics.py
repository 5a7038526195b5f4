"""Statistics of reviews: sentiments, mentions and lengths in tokens."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.storage.csv_table import cell
from pipeline.storage.files import write_json
from pipeline.tasks.visobert.reviews.alpha import count_sentiments
from pipeline.tasks.visobert.reviews.reviews import Reviews
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, SENTIMENTS, UNKNOWN

PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)
ALL = "all aspects"


def distribution(reviews: Reviews) -> dict[str, Any]:
    """Counts of a split, overall and per aspect. Shares are shares of labelled cells, or None if there are none.

    `mentions` counts cells with or without a sentiment, `without_polarity` those without, `dropped` bad labels.
    """
    counts = count_sentiments(reviews.labels)
    without = (reviews.labels == MENTIONED).sum(axis=0)
    dropped = (reviews.labels == UNKNOWN).sum(axis=0)
    rows = zip(reviews.aspects, counts.tolist(), without.tolist(), dropped.tolist(), strict=True)
    return {
        "reviews": len(reviews),
        "reviews_without_a_mention": int((reviews.labels < 0).all(axis=1).sum()),
        "overall": _row(counts.sum(axis=0).tolist(), int(without.sum()), int(dropped.sum())),
        "aspects": {aspect: _row(*row) for aspect, *row in rows},
    }


def _row(counts: list[int], without: int, dropped: int) -> dict[str, Any]:
    total = sum(counts)
    return {
        "counts": dict(zip(SENTIMENTS, counts, strict=True)),
        "shares": {name: count / total if total else None for name, count in zip(SENTIMENTS, counts, strict=True)},
        "labelled_cells": total,
        "mentions": total + without,
        "without_polarity": without,
        "dropped": dropped,
    }


def write_distribution(
    splits: Mapping[str, Mapping[str, Any]], more: Mapping[str, Any], json_file: Path, csv_file: Path
) -> None:
    """Write the distributions of the splits as JSON, together with `more`, and as CSV, a line per split and aspect."""
    write_json(json_file, {"splits": splits, **more})
    with csv_file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        others = ["labelled_cells", "mentions", "without_polarity", "dropped"]
        writer.writerow(["split", "aspect", *SENTIMENTS, *(f"{name}_share" for name in SENTIMENTS), *others])
        for split, counts in splits.items():
            for aspect, row in [(ALL, counts["overall"]), *counts["aspects"].items()]:
                values = [*row["counts"].values(), *row["shares"].values(), *(row[name] for name in others)]
                writer.writerow([split, cell(aspect), *values])


def token_lengths(lengths: npt.NDArray[np.int64]) -> dict[str, float]:
    """Mean, minimum, percentiles (`p5`: the 5th percentile) and maximum of token counts. lengths: [N]"""
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf").tolist()
    percentiles = {f"p{percent}": int(value) for percent, value in zip(PERCENTILES, values, strict=True)}
    return {"mean": float(lengths.mean()), "min": int(lengths.min()), **percentiles, "max": int(lengths.max())}
