"""Measure the figures of docs/performance.md: `python -m bench [--scratch FOLDER] [NAME ...]`; all if none is named.

Prints one JSON object per figure: {"name", "value", "unit", "reference", "ratio", "spread"}. Turns alternate between
the measured code and its reference. `value` and `reference` are medians over turns, and `ratio` is the median of their
ratio. `spread` is a 95% interval of the median ratio (or value, if there is no reference), or with fewer than 6 turns
the lowest and highest. The exit code is 1 if a figure could not be measured; standard error names it. `--scratch`:
folder that keeps the generated data.
"""

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

from bench.catalogue import FIGURES
from bench.workshop import Workshop


def run(names: list[str], folder: Path) -> int:
    """Measure figures. Returns the exit code: 1 if a figure could not be measured."""
    torch.set_num_threads(1)
    begun, failed = time.perf_counter(), False
    with Workshop(folder) as shop:
        for measure in dict.fromkeys(FIGURES[name] for name in names):
            started, about = time.perf_counter(), ", ".join(name for name in FIGURES if FIGURES[name] is measure)
            try:
                measure(shop)
            except Exception as error:
                failed = True
                traceback.print_exc()
                print(f"not measured: {about}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
            print(f"{time.perf_counter() - started:.0f} s for {about}", file=sys.stderr, flush=True)
    print(f"{time.perf_counter() - begun:.0f} s in all", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    folder = None
    if arguments[:1] == ["--scratch"] and len(arguments) > 1:
        folder, arguments = Path(arguments[1]).resolve(), arguments[2:]
    unknown = [name for name in arguments if name not in FIGURES]
    if unknown:
        print(f"unknown figure {unknown[0]}; allowed: {', '.join(FIGURES)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="focal-bench-") as temporary:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        return run(arguments or list(FIGURES), folder or Path(temporary))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
