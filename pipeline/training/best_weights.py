"""The best weights of a training so far, by the validation metric."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.config.run_config import EvaluationConfig
from pipeline.runtime import process_rank
from pipeline.storage.files import replacing
from pipeline.storage.weights import load_weights, save_weights


class BestWeights:
    """Saves the weights with the best validation metric, and counts evaluations without improvement."""

    def __init__(self, config: EvaluationConfig, file: Path) -> None:
        self.metric, self.sign, self.patience = config.metric, 1 if config.mode == "max" else -1, config.patience
        self.file = file
        self.best, self.without_gain = -math.inf, 0
        self.step: int | None = None

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.without_gain >= self.patience

    def consider(self, metrics: Mapping[str, float], model: nn.Module, step: int) -> None:
        """Save the weights if the metric is the best so far."""
        if self.metric not in metrics:  # not defined on this data; a warning was printed before the training
            return
        score = self.sign * metrics[self.metric]
        if score > self.best:
            self.best, self.step, self.without_gain = score, step, 0
            if process_rank.is_main_process():
                save_weights(model.state_dict(), self.file)
        else:
            self.without_gain += 1

    def state(self) -> dict[str, Any]:
        """The state to save, without the weights."""
        return {"best": self.best, "without_gain": self.without_gain, "step": self.step,
                "metric": self.metric, "sign": self.sign}  # fmt: skip

    def load_state(self, state: Mapping[str, Any], weights: Path | None) -> None:
        """Load a saved state; ignore it if it has another metric. weights: the file of the best weights, if any."""
        if (state["metric"], state["sign"]) != (self.metric, self.sign):
            return
        self.best, self.without_gain, self.step = state["best"], state["without_gain"], state["step"]
        if self.step is not None and weights is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as work:
                shutil.copyfile(weights, work)

    def restore(self, model: nn.Module) -> None:
        """Load the best weights into the model; it keeps its last weights if the metric was never evaluated."""
        if self.step is not None:
            model.load_state_dict(load_weights(self.file))
