"""What a start imports: seconds lie in modules that nobody needs before the first step."""

import gc
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SHRUNK
from torch import nn

from pipeline.importing import uncollected
from pipeline.shapes import shapes_only

OF_IMPORT = re.compile(r"^import time: +\d+ \| +\d+ \| +(\S+)$", re.MULTILINE)


def imported_by(*arguments: str) -> tuple[set[str], str]:
    """Every module that `python -m pipeline ...` has imported when it ends, and its standard output."""
    command = [sys.executable, "-X", "importtime", "-m", "pipeline", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    modules = set(OF_IMPORT.findall(found.stderr))
    assert "pipeline.config" in modules  # else nothing was told, and nothing could be missed
    return modules, found.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train_mmoe", "--help"], ["train_visobert", "--help"]])
def test_help_needs_neither_torch_nor_pandas(arguments: list[str]) -> None:
    modules, shown = imported_by(*arguments)
    assert "Usage" in shown
    roots = {name.partition(".")[0] for name in modules}
    assert not roots & {"torch", "numpy", "pandas", "pyarrow", "mlflow", "numba", "sklearn", "scipy", "matplotlib"}


def test_a_training_needs_no_compiler_and_no_mlflow(impressions: Path, workplace: Path) -> None:
    """Of a whole run of two steps: torch's compiler, its algebra (sympy) and mlflow, which is the writer's."""
    shrunk = SHRUNK | {"training.max_steps": "2", "tracking.log_report": "false"}
    options = [part for name, value in shrunk.items() for part in (f"--{name}", value)]
    modules, shown = imported_by("train_mmoe", "--data", str(impressions), *options)
    assert shown.startswith("{")
    assert "torch" in modules
    assert not modules & {"torch._dynamo", "torch._inductor", "sympy"}
    assert not {name.partition(".")[0] for name in modules} & {"mlflow", "sklearn", "transformers", "matplotlib"}


def test_a_model_of_shapes_is_the_model_without_its_values() -> None:
    def make() -> nn.Module:
        weight = nn.Parameter(torch.zeros(3, 4))
        nn.init.normal_(weight[:, :2], std=0.1)
        layers = [nn.Linear(4, 5), nn.Embedding(7, 4), nn.LayerNorm(4), nn.GRU(4, 3), nn.ParameterList([weight])]
        return nn.ModuleList(layers)

    state = torch.get_rng_state()
    with shapes_only():
        shapes = make()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in shapes.parameters())
    whole = make()
    assert not torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.is_meta for parameter in whole.parameters())
    assert {name: value.shape for name, value in shapes.named_parameters()} == {
        name: value.shape for name, value in whole.named_parameters()
    }


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
