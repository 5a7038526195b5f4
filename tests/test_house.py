"""Rules of the house, held by tests: who imports whom, pins, entry points, and what help lists."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from conftest import ROOT, run_pipeline

from pipeline.__main__ import command
from pipeline.config.strict_config import keys
from pipeline.entries import OWN, find_entry
from pipeline.runtime.importing import import_reference
from pipeline.tasks.registry import SHIPPED

SHIPPED_ENTRIES = {name: find_entry(name) for name in (*OWN, *SHIPPED)}  # without those of installed packages
PACKAGE = ROOT / "pipeline"
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Every module a file imports, late imports too; `from a import b` as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_validating_needs_no_torch() -> None:
    """The modules that a config error passes through never import torch, mlflow or pandas at their top."""
    for entry in SHIPPED_ENTRIES.values():
        waiting, seen = ["pipeline.__main__", entry.config.split(":")[0]], set[str]()
        while waiting:
            module = waiting.pop()
            file = ROOT / Path(*module.split(".")).with_suffix(".py")
            if module in seen or not file.exists():
                continue
            seen.add(module)
            top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
            for node in top:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not {name.split(".")[0] for name in names} & {"torch", "mlflow", "pandas", "sklearn"}, module
                waiting += names
        assert entry.config.split(":")[0] in seen


def test_conda_and_pyproject_pin_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
    pip = next(item["pip"] for item in conda if isinstance(item, dict))
    assert sorted(pip) == sorted(project["dependencies"])
    assert all("==" in pin for pin in pip)
    assert "python=3.11" in conda


def test_mlproject_and_the_command_line_have_the_same_entries() -> None:
    project = yaml.safe_load((ROOT / "MLproject").read_text())
    assert set(project["entry_points"]) == set(OWN) | set(SHIPPED)
    for name, block in project["entry_points"].items():
        assert list(block["parameters"]) == ["config"]  # any other default would beat the YAML
        assert block["parameters"]["config"]["default"] == find_entry(name).file
        assert (ROOT / find_entry(name).file).is_file()
        assert block["command"] == f"python -m pipeline {name} --config {{config}}"


@pytest.mark.parametrize("name", SHIPPED_ENTRIES)
def test_help_lists_every_key_with_type_default_and_meaning(name: str) -> None:
    result = CliRunner().invoke(command(name, find_entry(name)), ["--help"], terminal_width=10_000)
    assert result.exit_code == 0
    model = import_reference(find_entry(name).config)
    options = {
        text.split(" VALUE ")[0].split(", --")[-1]: text for text in " ".join(result.output.split()).split(" --")
    }
    assert len({key.path for key in keys(model)}) == len(list(keys(model)))
    for key in keys(model):
        assert key.field.description, key.path
        if key.path == "config":  # --config names the file that holds this key
            continue
        text = options[f"{key.path}"] if key.path in options else options[f"training.{key.path}"]
        assert f"{key.field.description} [{key.allowed}; default: {key.default}]" in text
    for alias in model.short:
        assert f"--{alias}," in result.output


def test_entry_points_and_their_targets_exist() -> None:
    for entry in SHIPPED_ENTRIES.values():
        assert callable(import_reference(entry.config))
        assert callable(import_reference(entry.target))


def test_help_runs() -> None:
    result = run_pipeline("--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in SHIPPED_ENTRIES)


def test_no_paths_of_one_machine() -> None:
    for file in [*MODULES, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.yaml")]:
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", file.read_text(encoding="utf-8")), file
