"""Names of metrics, tags, params and files, and colours of arms."""

import itertools
from collections.abc import Sequence

# The first is the baseline's. Distinguishable with most colour vision deficiencies, on white and on black.
COLORS = ("#7f7f7f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b3fa0", "#8c510a", "#a6192e")
PREFIX_FILES = ("points.jsonl", "state.pt", "manifest.json")  # of a shared prefix; the manifest is written last
ORIGINAL = "original_run_id"  # tag: id of the run that was started on another server or offline
CALIBRATION = "calibration."  # prefix of params: fitted after the training
CALIBRATED = "_calibrated"  # suffix of metrics of calibrated probabilities
CANONICAL = "canonical."  # prefix of tags: canonical text of a param that was typed in another spelling
FORKED_FROM = "forked_from"  # tag: <run id>@<step> of the checkpoint that the run started from
LAUNCHED = "launches"  # tag of a launcher run: id of the run that it started
OWNER = "owner"  # tag: the writing process and a random number
THREADS = "threads"  # tag: number of CPU threads at the start
TEST_ROWS_FILE = "evaluation/test_rows.parquet"  # artifact: per-row values of the test split
CONTROLLED = " | "  # separates arms in a control's tag control_of
ROWS_PER_SECOND = "system/rows_per_second"  # MLflow shows system/ in its own tab
TRAIN_SECONDS = "system/train_seconds"
CHECKPOINT_SECONDS = "system/checkpoint_seconds"
CHECKPOINT_MEGABYTES = "system/checkpoint_megabytes"
# Prefixes of metrics that a repeated run does not reproduce; the last three are of older versions.
MEASURED = ("system/", "throughput/", "time/", "checkpoint/")
LAST_KEPT = "the weights of the last step are kept as the best"  # if evaluation.metric is undefined
NOTE_LENGTH = 8000  # characters of a tag in MLflow
LONGEST = 200  # of MLflow's 250 characters; the rest is for prefixes


def metric_names(names: Sequence[str]) -> dict[str, str]:
    """Map names to unique names that MLflow allows within a metric's name.

    Characters other than letters, digits, `_`, `-`, `.` and spaces become `_`: MLflow refuses most of them, and a slash
    would start another section of charts. Long names are cut. The second of two equal results gets ` 2` appended.
    """
    metrics: dict[str, str] = {}
    for name in names:
        plain = "".join(letter if letter.isalnum() or letter in "_-. " else "_" for letter in name)[:LONGEST]
        if not plain.strip("."):
            plain = "_" * max(1, len(plain))  # MLflow refuses `.` and `..`
        choices = itertools.chain([plain], (f"{plain} {number}" for number in itertools.count(2)))
        metrics.setdefault(name, next(choice for choice in choices if choice not in metrics.values()))
    return metrics
