"""Compiled loops: kept on disk, compiled anew when their file changes, and used where nothing can be kept."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

LOOP = "from pipeline.compute.compiled import compiled\n\n@compiled\ndef added(count):\n    return count + {}\n"
ASK = "import loop; print(loop.added(1), sum(loop.added.stats.cache_hits.values()))"


def ask(folder: Path, **environment: str) -> str:
    settings = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    done = subprocess.run([sys.executable, "-c", ASK], env=settings, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_machine_code_is_kept_until_its_file_changes(tmp_path: Path) -> None:
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    (tmp_path / "loop.py").write_text(LOOP.format(1))
    assert [ask(tmp_path, **cache), ask(tmp_path, **cache)] == ["2 0", "2 1"]
    (tmp_path / "loop.py").write_text(LOOP.format(20))
    assert ask(tmp_path, **cache) == "21 0"


def test_a_loop_runs_where_nothing_can_be_kept(tmp_path: Path) -> None:
    """The folder of the caches is a file, and so is that of the user's: even root cannot write there."""
    (tmp_path / "loop.py").write_text(LOOP.format(1))
    (tmp_path / "__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    nowhere = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")}
    assert ask(tmp_path, **nowhere) == "2 0"


def compiled_modules() -> list[Path]:
    return [file for file in sorted((ROOT / "pipeline").rglob("*.py")) if "\n@compiled\n" in file.read_text()]


@pytest.mark.parametrize("file", compiled_modules(), ids=lambda file: file.stem)
def test_compiled_functions_use_their_own_file_alone(file: Path) -> None:
    """numba does not see a change of another file, and would go on with the machine code that it has kept."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name.partition(".")[0]
        for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    } - {"np", "Any"}  # fmt: skip
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    compiled = [node for node in functions if any(getattr(one, "id", "") == "compiled" for one in node.decorator_list)]
    assert compiled
    for function in compiled:
        inside = [node for body in function.body for node in ast.walk(body)]
        assert not {node.id for node in inside if isinstance(node, ast.Name)} & imported, function.name
        assert not [node for node in inside if isinstance(node, ast.Import | ast.ImportFrom)], function.name
