"""The built package: a page is rendered from what a wheel holds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from conftest import ROOT

RENDER = """
import pandas as pd
from pipeline.comparison.page import view
from pipeline.comparison.results import ArmResult, Comparison

arm = ArmResult(
    "alone", "baseline", None, "#000000", {0: "r"}, {0: 0.5}, mean=0.5, spread=None, best=None, best_spread=None,
    difference=None, level=None, looks=(), deciding_seeds=(), p_adjusted=None, minimum_detectable=None, new_rows=None,
    verdict="", against_control=None, side={}, differing={},
)
facts = {"run_id": "r", "name": "r", "status": "FINISHED", "arm": "alone", "seed": 0, "sweep_id": None}
runs = pd.DataFrame([facts | {"metrics.test/auc": 0.5}])
history = pd.DataFrame({"run": [], "metric": [], "step": [], "value": []})
print(view.__file__)
comparison = Comparison(
    "t", "mmoe", "test/auc", "max", data_digest="", tracking_uri="", baseline="alone", seeds=(0,), arms=(arm,),
    design="fixed", families=(), other_families=0, margin=None, side_metrics=(), runs=runs, notes=(),
)
print(view.page(comparison, history))
"""


def test_a_wheel_renders_the_page(tmp_path: Path) -> None:
    source, installed, elsewhere = (tmp_path / name for name in ("source", "installed", "elsewhere"))
    elsewhere.mkdir()
    shutil.copytree(ROOT / "pipeline", source / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(installed)
    folder = Path("pipeline/comparison/page")
    files = {file.name for file in (ROOT / folder).iterdir() if file.suffix in (".html", ".css", ".js")}
    assert {"page.html", "style.css", "script.js"} <= files <= {file.name for file in (installed / folder).iterdir()}

    environment = os.environ | {"PYTHONPATH": str(installed)}
    output = subprocess.check_output([sys.executable, "-c", RENDER], cwd=elsewhere, env=environment, text=True)
    module, page = output.split("\n", 1)
    assert Path(module).is_relative_to(installed)
    for name in ("style.css", "script.js"):  # inlined as they are
        assert (ROOT / folder / name).read_text(encoding="utf-8") in page
