"""The calibration in a logged model's folder: a JSON object by head, empty if the model is not calibrated."""

import json
from pathlib import Path

from pipeline.maths.calibration import Fitted

CALIBRATION_FILE = "calibration.json"


def write_calibration(folder: Path, fitted: Fitted) -> None:
    (folder / CALIBRATION_FILE).write_text(json.dumps(fitted, indent=2) + "\n", encoding="utf-8")


def read_calibration(folder: Path) -> Fitted:
    """Read the calibration; models of earlier versions have no such file, and no calibration."""
    file = folder / CALIBRATION_FILE
    fitted: Fitted = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return fitted
