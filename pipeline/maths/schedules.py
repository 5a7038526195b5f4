"""Schedules: values that depend on the training step."""

import math


def gate_is_open(global_step: int, warmup_steps: int) -> bool:
    """Return whether the auxiliary loss acts at this optimizer step (from 0)."""
    return global_step >= warmup_steps


def clipped_pos_weight(raw: float, clip: float | None) -> float:
    """Effective weight of positives: the raw one, at most `clip`."""
    return raw if clip is None else min(raw, clip)


def learning_rate_factor(
    step: int, total_steps: int, *, warmup_steps: int, decay: str, final_ratio: float, warmup_ratio: float = 0.0
) -> float:
    """Factor of the peak learning rate at `step` (from 0).

    Rises linearly over the warm-up (1/warmup at step 0, 1 at step warmup - 1): `warmup_steps`, or `warmup_ratio` of
    `total_steps` if that is more. Then it follows half a cosine to `final_ratio` at `total_steps` (Loshchilov & Hutter
    2017, equation 5), or stays constant.
    """
    warmup_steps = max(warmup_steps, round(warmup_ratio * total_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
