"""Results of a comparison: the arms and their differences to the baseline."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from pipeline.comparison.families import Family
from pipeline.maths.row_covariance import NewRows
from pipeline.maths.sequential import Look
from pipeline.maths.statistics import Paired
from pipeline.names import CONTROLLED


@dataclass(frozen=True)
class ArmResult:
    """One arm: its runs, one per seed, and their differences to the baseline's runs."""

    name: str
    role: str  # baseline, arm or control
    control_of: str | None  # for a control: its arm, or the arms that share it, joined by CONTROLLED
    color: str
    runs: Mapping[int, str]  # seed -> run id
    values: Mapping[int, float]  # seed -> primary metric
    mean: float
    spread: float | None  # standard deviation over seeds; None with one seed
    best: float | None  # mean over seeds of the best value on the validation split
    best_spread: float | None
    difference: Paired | None  # arm - baseline over the seeds that both have; None for the baseline
    level: float | None  # two-sided level of the difference's interval; None like the difference
    looks: tuple[Look, ...]  # of a sequential design; the difference is that of the last one
    deciding_seeds: tuple[int, ...]  # without any one of them the verdict would be another
    p_adjusted: float | None  # times the number of arms; None in a sequential design, for controls and for one seed
    minimum_detectable: float | None  # minimum detectable difference; None like p_adjusted
    new_rows: NewRows | None  # the difference on new test rows; None if the runs kept no rows
    verdict: str  # "" for the baseline, "control" for a control
    against_control: Paired | None  # paired difference arm - control; None without a control
    side: Mapping[str, Paired]  # side metric -> arm - baseline
    differing: Mapping[str, str]  # dotted key -> value, for the keys that differ between arms

    def controls(self, arm: str) -> bool:
        """Whether this arm is the control of the named arm."""
        return self.control_of is not None and arm in self.control_of.split(CONTROLLED)


@dataclass(frozen=True)
class Comparison:
    """A comparison of arms. The baseline comes first; each arm is followed by its control."""

    title: str
    task: str
    metric: str
    mode: str  # max or min
    data_digest: str
    tracking_uri: str
    baseline: str
    seeds: tuple[int, ...]
    arms: tuple[ArmResult, ...]
    design: Literal["fixed", "sequential"]  # whether the seeds were listed, or added until the arms were decided
    families: tuple[Family, ...]  # arms whose error rates are held together; none if the runs are of no sweep
    other_families: int  # families of other sweeps that asked the same question
    margin: float | None  # differences below it do not matter
    side_metrics: tuple[str, ...]
    runs: pd.DataFrame  # the compared runs, as `load_runs` returns them
    notes: tuple[str, ...]
