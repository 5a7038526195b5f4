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
from pipeline.comparison.results import Arm, Comparison

arm = Arm("alone", "baseline", None, "#000000", {0: "r"}, {0: 0.5}, 0.5, *[None] * 6, {}, "", None, {}, {})
runs, history = pd.DataFrame({"run_id": ["r"]}), pd.DataFrame({"run": [], "metric": [], "step": [], "value": []})
print(view.__file__)
print(view.page(Comparison("", "mmoe", "test/auc", "max", "", "", "alone", (0,), (arm,), (), runs, ()), history))
"""


def test_a_wheel_renders_the_page(tmp_path: Path) -> None:
    source, installed, elsewhere = (tmp_path / name for name in ("source", "installed", "elsewhere"))
    elsewhere.mkdir()
    shutil.copytree(ROOT / "pipeline", source / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    build = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path), str(source)]
    made = subprocess.run(build, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(installed)
    page = Path("pipeline/comparison/page")
    files = {file.name for file in (ROOT / page).iterdir() if file.suffix in (".html", ".css", ".js")}
    assert {"page.html", "style.css", "script.js"} <= files
    assert files <= {file.name for file in (installed / page).iterdir()}

    rendered = subprocess.run(
        [sys.executable, "-c", RENDER],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert rendered.returncode == 0, rendered.stderr
    place, source_of_page = rendered.stdout.split("\n", 1)
    assert Path(place).is_relative_to(installed)
    for name in ("style.css", "script.js"):  # inlined as they are
        assert (ROOT / page / name).read_text(encoding="utf-8") in source_of_page
