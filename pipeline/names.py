"""Names of metrics, tags, params and files; colours of arms in charts."""

import itertools
from collections.abc import Sequence

# The first is for the baseline. Distinguishable on white and on black, and with most colour vision deficiencies.
COLORS = ("#7f7f7f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b3fa0", "#8c510a", "#a6192e")
PREFIX_FILES = ("points.jsonl", "state.pt", "manifest.json")  # of a shared prefix; the manifest is written last
ORIGINAL = "original_run_id"  # tag: id under which the run was started, on another server or offline
CALIBRATION = "calibration."  # prefix of the params of the calibration, which is fitted after training
CALIBRATED = "_calibrated"  # suffix of metrics computed from calibrated probabilities
CANONICAL = "canonical."  # prefix of tags: canonical text of a param that the store has in another spelling
FORKED_FROM = "forked_from"  # tag: the checkpoint that the run started from, <run id>@<step>
LAUNCHED = "launches"  # tag of a launcher run: id of the run that it started
OWNER = "owner"  # tag: identifies the process that writes the run, with a random number
SWEEP = "sweep."  # prefix of tags: sweep.<sweep id> is the run's place in that sweep, as JSON
QUESTION = "question"  # tag of a summary run: hash of what the sweep asks (baseline, data, metric), not of its arms
WEIGHTS_DIGEST = "weights_digest"  # tag: SHA-256 of the last weights
GIT_COMMIT = "mlflow.source.git.commit"  # tag set by MLflow
GIT_DIRTY = "git_dirty"  # tag: whether the repository had changes that are not committed
CODE_CHANGES = "code_changes"  # tag: hash of those of Python files
THREADS = "threads"  # tag: number of CPU threads at the run's first start
TEST_ROWS_FILE = "evaluation/test_rows.parquet"  # artifact: per-row values of the test split
CONTROLLED = " | "  # separator of arm names in the tag control_of of a control
ROWS_PER_SECOND = "system/rows_per_second"  # MLflow shows metrics that start with system/ in a separate tab
TRAIN_SECONDS = "system/train_seconds"
CHECKPOINT_SECONDS = "system/checkpoint_seconds"
CHECKPOINT_MEGABYTES = "system/checkpoint_megabytes"
MEASURED = "system/"  # prefix of metrics that a repeated run does not reproduce
LAST_KEPT = "the weights of the last step are kept as the best"  # message if evaluation.metric is undefined
NOTE_LENGTH = 8000  # MLflow's limit for a tag, in characters
LONGEST = 200  # characters of a name within a metric's name; MLflow allows 250, the rest is left for prefixes


def metric_names(names: Sequence[str]) -> dict[str, str]:
    """Map names to unique names that MLflow accepts as part of a metric's name.

    Characters other than letters, digits, `_`, `-`, `.` and spaces are replaced with `_`: MLflow refuses most of them,
    and a slash would start another chart section. Long names are truncated. If two names give the same result, ` 2` is
    appended to the second.
    """
    metrics: dict[str, str] = {}
    for name in names:
        plain = "".join(letter if letter.isalnum() or letter in "_-. " else "_" for letter in name)[:LONGEST]
        if not plain.strip("."):
            plain = "_" * max(1, len(plain))  # MLflow refuses `.` and `..`
        choices = itertools.chain([plain], (f"{plain} {number}" for number in itertools.count(2)))
        metrics.setdefault(name, next(choice for choice in choices if choice not in metrics.values()))
    return metrics
