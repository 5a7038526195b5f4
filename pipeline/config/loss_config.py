"""Config blocks of losses that several tasks can have."""

from collections.abc import Set as AbstractSet

from pydantic import Field

from pipeline.config.strict_config import Config
from pipeline.maths.schedules import gate_is_open


class FocalConfig(Config):
    """A focal term that is added to the cross-entropy of an event from an optimizer step on."""

    enabled: bool = False
    """add the focal loss"""
    warmup_steps: int = Field(2000, ge=0)
    """first optimizer step with the focal term"""
    lambda_: float = Field(0.1, alias="lambda", ge=0)
    """weight of the focal term; usual: 0.05-0.2, a habit that no finding supports (docs/findings.md)"""
    gamma: float = Field(1.0, ge=0, le=100)
    """focusing exponent; usual: 1-2, a habit that no finding supports (docs/findings.md)"""
    use_alpha: bool = False
    """weigh positives by alpha and negatives by 1 - alpha in the focal term"""
    alpha: float = Field(0.25, ge=0, le=1)
    """weight of positives, with use_alpha"""
    detach_p_for_weight: bool = True
    """no gradient through the factor (1 - p_t)^gamma"""
    compute_fp32: bool = True
    """compute the focal term in fp32 even under mixed precision"""
    log_components: bool = True
    """log every loss term; false: only the total"""

    @property
    def class_weight(self) -> float | None:
        """Weight of positives in the focal term; None = positives and negatives weigh the same."""
        return self.alpha if self.use_alpha else None

    def is_on(self, step: int) -> bool:
        """Return True if the focal term is part of the loss at an optimizer step."""
        return self.enabled and gate_is_open(step, self.warmup_steps)

    def warnings(self, block: str, given: AbstractSet[str]) -> list[str]:
        """Return warnings about unusual values, and about keys that the user set but that have no effect.

        block: dotted path of this block. given: dotted keys that the user set.
        """
        warnings = []
        if self.lambda_ > 0.2:
            warnings.append(f"{block}.lambda is {self.lambda_:g}; usual: 0.05-0.2, by habit (docs/findings.md)")
        if not 1 <= self.gamma <= 2:
            warnings.append(f"{block}.gamma is {self.gamma:g}; usual: 1-2, by habit (docs/findings.md)")
        if not self.enabled:
            acting = {f"{block}.{key}" for key in ("enabled", "log_components")}
            idle = sorted({key for key in given if key.startswith(f"{block}.")} - acting)
            warnings += [f"{key} has no effect while {block}.enabled is false" for key in idle]
        elif f"{block}.alpha" in given and not self.use_alpha:
            warnings.append(f"{block}.alpha has no effect while {block}.use_alpha is false")
        return warnings

    def run_warnings(self, block: str, total_steps: int, amp: str) -> list[str]:
        """Return warnings about settings without effect in a run of `total_steps` steps with `training.amp`."""
        warnings = never_starts(f"{block}.warmup_steps", self.warmup_steps, total_steps,
                                "the focal term will never switch on") if self.enabled else []  # fmt: skip
        if not self.compute_fp32 and amp == "no":
            warnings.append(f"{block}.compute_fp32: false has no effect with training.amp: no")
        return warnings


def never_starts(key: str, warmup_steps: int, total_steps: int, effect: str) -> list[str]:
    """Return a warning if a schedule's first step comes after the last step of the run."""
    if warmup_steps < total_steps:
        return []
    return [f"{key} is {warmup_steps}, the last of {total_steps} steps is {total_steps - 1}: {effect}"]
