"""Save and restore the random numbers that training draws: dropout and noise."""

from collections.abc import Mapping
from typing import Any

import torch


def random_state(device: str) -> dict[str, Any]:
    """The state of torch's random number generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if device == "cuda" else None}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore a state that `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():  # a state saved with CUDA may be loaded without it
        torch.cuda.set_rng_state(state["cuda"])
