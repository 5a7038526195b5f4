"""Names and colours of things as MLflow takes them."""

import itertools
from collections.abc import Sequence

# The first is the baseline's. Apart for most eyes, on white and on black.
COLORS = ("#7f7f7f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b3fa0", "#8c510a", "#a6192e")
PREFIX_FILES = ("points.jsonl", "state.pt", "manifest.json")  # history and state of what runs share, the last file last
ORIGINAL = "original_run_id"  # tag of a run that was made on this server for one that began elsewhere
CALIBRATION = "calibration."  # before a param's key: what was fitted after the training
CALIBRATED = "_calibrated"  # at the end of a metric's name: of calibrated probabilities
CANONICAL = "canonical."  # before a param's key: tag with the canonical text of one that was typed in another spelling
FORKED_FROM = "forked_from"  # tag of a run that started from another's state: <run id>@<step>
LAUNCHED = "launches"  # tag of a run that only started another one: its id
OWNER = "owner"  # tag: who writes the run: its process and a random number
THREADS = "threads"  # tag: the CPU threads that a run began with
TEST_ROWS_FILE = "evaluation/test_rows.parquet"  # artifact: what metrics of the test split are made of
CONTROLLED = " | "  # between the names of arms that share a control, in its tag control_of
ROWS_PER_SECOND = "system/rows_per_second"  # MLflow shows what begins with system/ in a tab of its own
TRAIN_SECONDS = "system/train_seconds"
CHECKPOINT_SECONDS = "system/checkpoint_seconds"
CHECKPOINT_MEGABYTES = "system/checkpoint_megabytes"
# Prefixes of machine measurements, which a repeated run does not reproduce; older runs have the last three.
MEASURED = ("system/", "throughput/", "time/", "checkpoint/")
LAST_KEPT = "the weights of the last step are kept as the best"  # where no metric chooses
NOTE_LENGTH = 8000  # characters of one of MLflow's tags
LONGEST = 200  # of MLflow's 250 characters; the rest is for what stands before a name


def metric_names(names: Sequence[str]) -> dict[str, str]:
    """Each name -> what stands for it within a metric's name.

    MLflow takes letters, digits, `_`, `-`, `.`, spaces and (not on Windows) colons; a slash would open another section
    of charts. Anything else becomes `_`, a colon too, so that a name is the same everywhere. A long name is cut, and
    the second of two that would be one gets ` 2` after it.
    """
    metrics: dict[str, str] = {}
    for name in names:
        plain = "".join(letter if letter.isalnum() or letter in "_-. " else "_" for letter in name)[:LONGEST]
        if not plain.strip("."):
            plain = "_" * max(1, len(plain))  # as parts of a path, `.` and `..` are refused
        choices = itertools.chain([plain], (f"{plain} {number}" for number in itertools.count(2)))
        metrics.setdefault(name, next(choice for choice in choices if choice not in metrics.values()))
    return metrics
