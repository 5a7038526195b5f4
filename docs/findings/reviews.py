"""Splits of UIT-ViSFD for the small encoder: 2,000 and 500 reviews of Train.csv, and all of Dev.csv as the test.

python docs/findings/reviews.py FOLDER_OF_VISFD data/visfd
"""

import sys
from pathlib import Path

import pandas as pd

source, output = Path(sys.argv[1]), Path(sys.argv[2])
output.mkdir(parents=True, exist_ok=True)
reviews = pd.read_csv(source / "Train.csv").drop_duplicates("comment").sample(frac=1, random_state=0)
splits = {"train": reviews[:2000], "validation": reviews[2000:2500], "test": pd.read_csv(source / "Dev.csv")}
for split, rows in splits.items():
    rows.to_csv(output / f"{split}.csv", index=False)
    print(split, len(rows), "reviews,", int(rows["label"].str.count("#Neutral").sum()), "neutral cells")
