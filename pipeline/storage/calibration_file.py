"""Calibration file of a logged model: a JSON object with an entry per head, empty if the model is not calibrated."""

import json
from pathlib import Path

from pipeline.maths.calibration import Fitted

CALIBRATION_FILE = "calibration.json"


def write_calibration(folder: Path, fitted: Fitted) -> None:
    (folder / CALIBRATION_FILE).write_text(json.dumps(fitted, indent=2) + "\n", encoding="utf-8", newline="\n")


def read_calibration(folder: Path) -> Fitted:
    fitted: Fitted = json.loads((folder / CALIBRATION_FILE).read_text(encoding="utf-8"))
    return fitted
