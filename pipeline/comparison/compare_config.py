"""Config of the entry point `compare`."""

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from pipeline.config.strict_config import Config
from pipeline.errors import UserError


class CompareConfig(Config):
    """The runs, metric and baseline of a comparison."""

    short: ClassVar[dict[str, str]] = {}

    sweep_id: str | None = Field(None, pattern=r"^[\w-]+$")  # also a folder name
    """the runs of this sweep"""
    runs: tuple[str, ...] | None = Field(None, min_length=1)
    """the runs with these ids"""
    experiment: str | None = Field(None, min_length=1, coerce_numbers_to_str=True)
    """the runs of this MLflow experiment (name or id)"""
    filter: str | None = Field(None, min_length=1)
    """the runs that match this MLflow filter, in all experiments or in `experiment`"""
    metric: str | None = Field(None, min_length=1)
    """metric of the verdict; null = the sweep's, else the runs' evaluation.metric on the test split"""
    mode: Literal["max", "min"] | None = None
    """whether a higher or a lower metric is better; null = as in the runs' configs, else min for losses and errors"""
    baseline: str | None = Field(None, min_length=1)
    """arm with which the others are compared: its name, or the id of one of its runs; null = arm with role baseline"""
    new_rows: bool = True
    """show intervals that hold for new test rows, for runs that stored their per-row scores"""
    output_dir: str = Field("comparisons", min_length=1)
    """folder in which each comparison gets its own subfolder"""

    @field_validator("runs", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(re.findall(r"[^\s,]+", value)) if isinstance(value, str) else value


def check_source(sweep_id: object, runs: object, experiment: object, filter_string: object) -> None:
    """Check that exactly one source of runs is given.

    Raises:
        UserError: no source is given, or more than one.
    """
    sources = {"sweep_id": sweep_id, "runs": runs, "experiment": experiment, "filter": filter_string}
    names = [name for name, value in sources.items() if value is not None]
    if len(names) != 1 and names != ["experiment", "filter"]:
        found = " and ".join(names) or "none"
        raise UserError(f"runs to compare: found {found}, allowed: one of sweep_id, runs, experiment, filter "
                        "(experiment and filter also together)")  # fmt: skip
