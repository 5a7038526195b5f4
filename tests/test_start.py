"""What a start imports: seconds lie in modules that nobody needs before the first step."""

import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHRUNK, only_full

from pipeline.runtime.importing import uncollected

PROGRAM = """
import atexit, sys
atexit.register(lambda: print("modules:", *sys.modules, file=sys.stderr))
from pipeline.__main__ import main
main()
"""


def imported_by(*arguments: str) -> tuple[set[str], str]:
    """Every module that `python -m pipeline ...` has imported when it ends, and its standard output."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = (line for line in found.stderr.splitlines() if line.startswith("modules:"))
    modules = set(line.split())
    assert "pipeline.config.strict_config" in modules  # else nothing was listed, and nothing could be missed
    return modules, found.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train_mmoe", "--help"], ["train_visobert", "--help"]])
def test_help_needs_neither_torch_nor_pandas(arguments: list[str]) -> None:
    modules, shown = imported_by(*arguments)
    assert "Usage" in shown
    roots = {name.partition(".")[0] for name in modules}
    assert not roots & {"torch", "numpy", "pandas", "pyarrow", "mlflow", "numba", "sklearn", "scipy", "matplotlib"}


@pytest.mark.parametrize("tracked", ["false", pytest.param("true", marks=[pytest.mark.faults, only_full])])
def test_a_training_does_not_import_mlflow(impressions: Path, workplace: Path, tracked: str) -> None:
    """A whole run of two steps: MLflow is the writer process' to import, beside the trainer.

    That a trainer with a writer does not import it, test_delivery sees of one that it kills.
    """
    shrunk = SHRUNK | {"training.max_steps": "2", "tracking.log_report": "false", "tracking.enabled": tracked}
    options = [part for name, value in shrunk.items() for part in (f"--{name}", value)]
    modules, shown = imported_by("train_mmoe", "--data", str(impressions), *options)
    assert shown.startswith("{")
    assert "torch" in modules
    assert not {name.partition(".")[0] for name in modules} & {"mlflow", "sklearn", "transformers", "matplotlib"}


def test_nothing_is_collected_during_an_import() -> None:
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), uncollected():
        importlib.import_module("pipeline.no_such_module")
    assert gc.isenabled()
