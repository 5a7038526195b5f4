"""The script for a GPU, on the CPU and without the packages that it says it does not need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, only_full

from bench.wheels import UNUSED

pytestmark = [pytest.mark.faults, only_full]

HIDE = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name.split(".")[0] in {unused} else find(name, *more)
"""


def test_it_runs_on_a_cpu_without_what_the_machine_lacks(tmp_path: Path) -> None:
    for peer in ("torch_rechub", "accelerate"):
        pytest.importorskip(peer, reason="what it is compared to comes with the extra `bench`")
    unused = {name.replace("-", "_") for name in UNUSED} - {"click"}  # transformers needs it, so it is there
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(unused=unused), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--small", "--scratch", str(tmp_path / "scratch")]
    (tmp_path / "scratch").mkdir()
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    names = {json.loads(line)["name"] for line in result.stdout.splitlines()}
    explained = (ROOT / "docs/performance.md").read_text(encoding="utf-8").replace("_200_steps", "_10_steps")
    assert names - {"machine"} == {name for name in names if f"`{name}`" in explained}
    assert len(names) == 17
