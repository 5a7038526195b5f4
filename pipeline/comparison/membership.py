"""A run's place in a sweep. A run may belong to several sweeps."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pipeline.names import SWEEP


@dataclass(frozen=True)
class Membership:
    """A run's place in one sweep."""

    arm: str
    role: str  # baseline, arm or control
    control_of: str  # of a control: its arms, joined by CONTROLLED; otherwise empty
    arm_number: int  # the arm's position in the sweep

    def to_tags(self, sweep_id: str) -> dict[str, str]:
        return {SWEEP + sweep_id: json.dumps(asdict(self), ensure_ascii=False)}

    @classmethod
    def of(cls, tags: Mapping[str, str], sweep_id: str) -> "Membership | None":
        """The place of a run with these tags; None if no tag names this sweep, as in runs of older versions."""
        text = tags.get(SWEEP + sweep_id)
        return cls(**json.loads(text)) if text else None
