"""Schedules: values that depend on the training step."""

import math


def gate_is_open(global_step: int, warmup_steps: int) -> bool:
    """Return True if the auxiliary loss is active at this optimizer step (from 0)."""
    return global_step >= warmup_steps


def clipped_pos_weight(raw: float, clip: float | None) -> float:
    """Effective weight of positives: `raw`, limited to `clip` unless that is None."""
    return raw if clip is None else min(raw, clip)


def learning_rate_factor(
    step: int, total_steps: int, *, warmup_steps: int, decay: str, final_ratio: float, warmup_ratio: float = 0.0
) -> float:
    """Learning rate at `step` (from 0), as a share of the peak.

    The warm-up lasts `warmup_steps`, or `warmup_ratio` of `total_steps` if that is more. The factor rises linearly from
    1 / warmup at step 0 to 1 at step warmup - 1. Then it follows half a cosine to `final_ratio` at `total_steps`
    (Loshchilov & Hutter 2017, equation 5), or stays constant.
    """
    warmup_steps = max(warmup_steps, round(warmup_ratio * total_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
