"""The results of a comparison: arms, their differences to the baseline, and what was compared."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from pipeline.maths.statistics import Paired
from pipeline.names import CONTROLLED


@dataclass(frozen=True)
class Arm:
    """The runs of one setting, a seed each, and what sets them apart from the baseline's."""

    name: str
    role: str  # baseline, arm or control
    control_of: str | None  # of a control: the arm, or several that share it, joined by CONTROLLED
    color: str
    runs: Mapping[int, str]  # seed -> run id
    values: Mapping[int, float]  # seed -> primary metric
    mean: float
    spread: float | None  # standard deviation over seeds; None with one seed
    best: float | None  # mean over seeds of the best value on the validation split
    best_spread: float | None
    difference: Paired | None  # arm - baseline over the seeds that both have; None for the baseline
    p_adjusted: float | None  # None for the baseline, controls and fewer than two seeds; so is the next
    minimum_detectable: float | None
    rows: Mapping[int, tuple[float, float, float]]  # seed -> (difference, low, high) over test rows within the seed
    verdict: str  # "" for the baseline, "control" for a control
    against_control: Paired | None  # arm - its control
    side: Mapping[str, Paired]  # side metric -> arm - baseline
    differing: Mapping[str, str]  # dotted key -> value, of the keys that differ between arms

    def controls(self, arm: str) -> bool:
        """It is the control of this arm."""
        return self.control_of is not None and arm in self.control_of.split(CONTROLLED)


@dataclass(frozen=True)
class Comparison:
    """Arms side by side, the baseline first, each followed by its control."""

    title: str
    task: str
    metric: str
    mode: str  # max or min
    data_digest: str
    tracking_uri: str
    baseline: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    side_metrics: tuple[str, ...]
    runs: pd.DataFrame  # of load_runs: the runs that are compared
    notes: tuple[str, ...]
