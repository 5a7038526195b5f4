"""Prints one JSON object a figure: {"name", "value", "unit", "reference", "ratio", "spread"}.

`ratio` is value over reference, `spread` the quartiles of the ratio over interleaved pairs. Training runs on one
thread; the tracking writer is a process of its own and needs a second core. `python -m bench visobert` runs one alone.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAYON_NUM_THREADS"] = "1"

import torch

from bench import mmoe, visobert

BENCHES = {"mmoe": mmoe.main, "visobert": visobert.main}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(scratch) / 'mlflow.db'}"
        for name in sys.argv[1:] or BENCHES:
            BENCHES[name](Path(scratch))


if __name__ == "__main__":
    main()
