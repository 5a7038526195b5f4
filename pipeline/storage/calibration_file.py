"""Calibration file of a logged model: a JSON object with an entry per head, empty if the model is not calibrated."""

import json
from pathlib import Path

from pipeline.maths.calibration import Fitted
from pipeline.storage.files import write_json

CALIBRATION_FILE = "calibration.json"


def write_calibration(folder: Path, fitted: Fitted) -> None:
    write_json(folder / CALIBRATION_FILE, fitted)


def read_calibration(folder: Path) -> Fitted:
    fitted: Fitted = json.loads((folder / CALIBRATION_FILE).read_text(encoding="utf-8"))
    return fitted
