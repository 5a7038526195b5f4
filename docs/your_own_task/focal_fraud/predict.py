"""Predictor of a logged model: raw columns to the probability of fraud."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from pipeline.config.strict_config import load as load_config
from pipeline.storage.weights import load_weights

from .config import FraudConfig
from .data import Encoder
from .model import FraudModel

ENCODER_FILE = "encoder.json"


def load(folder: Path) -> Callable[..., pd.DataFrame]:
    """Load a model that `FraudTask.export` wrote. Returns predict(frame, raw=False); it has no calibration to skip."""
    config, encoder = load_config(FraudConfig, folder / "config.yaml"), Encoder.load(folder / ENCODER_FILE)
    model = FraudModel(config.model, encoder.sizes)
    model.load_state_dict(load_weights(folder / "model.safetensors"))
    model.eval()

    def predict(frame: pd.DataFrame, raw: bool = False) -> pd.DataFrame:  # noqa: ARG001
        with torch.inference_mode():
            p_fraud = torch.sigmoid(model(encoder.encode(frame)).double()).numpy()
        return pd.DataFrame({"p_fraud": p_fraud}, index=frame.index)

    return predict
