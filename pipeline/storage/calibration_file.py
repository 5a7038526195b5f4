"""The calibration in a logged model's folder: a JSON object of the heads, empty where the model is not calibrated."""

import json
from pathlib import Path

from pipeline.maths.calibration import Fitted

CALIBRATION_FILE = "calibration.json"


def write_calibration(folder: Path, fitted: Fitted) -> None:
    (folder / CALIBRATION_FILE).write_text(json.dumps(fitted, indent=2) + "\n", encoding="utf-8")


def read_calibration(folder: Path) -> Fitted:
    """What was written; empty for a model of an earlier version, which has no such file."""
    file = folder / CALIBRATION_FILE
    fitted: Fitted = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return fitted
