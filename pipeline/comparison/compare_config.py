"""What the entry point `compare` takes."""

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from pipeline.config.strict_config import Config
from pipeline.errors import UserError


class CompareConfig(Config):
    """Which runs to compare, by what, and against which arm."""

    short: ClassVar[dict[str, str]] = {}

    sweep_id: str | None = Field(None, pattern=r"^[\w-]+$")  # names a folder
    """the runs of this sweep"""
    runs: tuple[str, ...] | None = Field(None, min_length=1)
    """the runs with these ids"""
    experiment: str | None = Field(None, min_length=1, coerce_numbers_to_str=True)
    """the runs of this MLflow experiment (name or id)"""
    filter: str | None = Field(None, min_length=1)
    """the runs that this MLflow filter finds, in all experiments or in the one that is named"""
    metric: str | None = Field(None, min_length=1)
    """what the verdict is about; null = the sweep's, or what the runs were evaluated by, on the test split"""
    mode: Literal["max", "min"] | None = None
    """whether higher or lower is better; null = as the runs say, else min for losses and errors"""
    baseline: str | None = Field(None, min_length=1)
    """the arm, by name or by the id of one of its runs, that others are compared with; null = role baseline"""
    bootstrap: bool = True
    """intervals over test rows within each seed, where the runs kept their per-row scores"""
    output_dir: str = Field("comparisons", min_length=1)
    """folder of the comparisons, one folder each"""

    @field_validator("runs", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(re.findall(r"[^\s,]+", value)) if isinstance(value, str) else value


def check_source(sweep_id: object, runs: object, experiment: object, filter_string: object) -> None:
    """Refuse anything but one source of runs.

    Raises:
        UserError: none is given, or more than one.
    """
    sources = {"sweep_id": sweep_id, "runs": runs, "experiment": experiment, "filter": filter_string}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1 and given != ["experiment", "filter"]:
        found = " and ".join(given) if given else "none"
        raise UserError(f"runs to compare: found {found}, allowed: one of sweep_id, runs, experiment, filter "
                        "(experiment and filter also together)")  # fmt: skip
