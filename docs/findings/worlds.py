"""Impressions whose truth is known: the embedded features with labels redrawn at another rate, some of them wrong.

    python docs/findings/worlds.py data/worlds

writes a prepared folder for each rate of CTCVR and share of swapped conversions: data/worlds/4-0, data/worlds/4-30, ...
Of a share of the training conversions each swaps its labels with a row that did not convert, so rates stay as they are.
Labels of the validation and test rows are clean.
"""

import sys
from pathlib import Path
from shutil import copyfile

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, logit

from pipeline.data.contract import describe
from pipeline.data.schema import VOCABULARY_FILE, DataSchema
from pipeline.tasks.mmoe.config import EmbeddedDataConfig
from pipeline.tasks.mmoe.impressions.embedded_impressions import embedded_data

ROWS = 500_000
ENDS = {"train": 310_000, "validation": 350_000, "test": ROWS}
RATES = {"4": (0.2, 0.2), "0.4": (0.08, 0.05)}  # CTCVR in percent: CTR, CVR of clicks
SWAPPED = {"0": 0.0, "30": 0.3}  # percent: share of the training conversions


def shifted(p: pd.Series, rate: float, weights: pd.Series) -> np.ndarray:
    """The probabilities with one shift of their logits, such that their weighted mean is `rate`."""
    z = logit(p.to_numpy())
    return expit(z + brentq(lambda shift: np.average(expit(z + shift), weights=weights) - rate, -20, 20))


def world(rows: pd.DataFrame, ctr: float, cvr: float, swapped: float) -> pd.DataFrame:
    """The rows with new labels; among the training rows a share of the conversions is swapped."""
    random = np.random.default_rng(0)
    p_ctr = shifted(rows["p_ctr"], ctr, np.ones(len(rows)))
    p_cvr = shifted(rows["p_cvr"], cvr, p_ctr)
    click = random.random(len(rows)) < p_ctr
    conversion = click & (random.random(len(rows)) < p_cvr)
    train = conversion[: ENDS["train"]]
    right = random.choice(np.flatnonzero(train), round(swapped * train.sum()), replace=False)
    wrong = random.choice(np.flatnonzero(~train), len(right), replace=False)
    for label in (click, conversion):
        label[right], label[wrong] = label[wrong], label[right].copy()
    labels = {"click": click.astype(np.int8), "conversion": conversion.astype(np.int8)}
    return rows.assign(**labels, p_ctr=p_ctr, p_cvr=p_cvr)


def main(output: Path) -> None:
    source = embedded_data(EmbeddedDataConfig(rows=ROWS))
    rows = pd.concat([pd.read_parquet(source / f"{split}.parquet") for split in ENDS], ignore_index=True)
    for name, (ctr, cvr) in RATES.items():
        for percent, swapped in SWAPPED.items():
            folder = output / f"{name}-{percent}"
            folder.mkdir(parents=True, exist_ok=True)
            labelled, start = world(rows, ctr, cvr, swapped), 0
            for split, end in ENDS.items():
                labelled[start:end].to_parquet(folder / f"{split}.parquet", index=False)
                start = end
            copyfile(source / VOCABULARY_FILE, folder / VOCABULARY_FILE)
            features = DataSchema.read(source).features
            schema = describe(folder, features, f"CTCVR {name}%, {percent}% of the training conversions swapped")
            schema.model_copy(update={"truth": True}).write(folder)  # so that runs log the Bayes AUC
            print(folder, {split: part.conversions for split, part in schema.splits.items()}, "conversions")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
