"""Who may import whom: one table of floors, no circles, and names that say where a thing is."""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = (
    ("errors", "names", "serving"), ("runtime",), ("maths",), ("config",), ("compute", "storage"), ("tracking",),
    ("data",), ("tasks",), ("training",), ("runs",), ("comparison",), ("sweeps",),
    ("conformance", "entries", "demo"), ("__main__",),
)  # fmt: skip
LEVEL = {folder: level for level, floor in enumerate(FLOORS) for folder in floor}
NAME_TASKS = {"tasks", "demo", "entries"}  # folders and files that may name the modules of a task
REPEATED = {"config", "task", "objective", "evaluation", "model", "predict"}  # in every task's folder
LIBRARIES = {"mlflow": "tracking", "ray": "sweeps", "optuna": "sweeps"}  # library -> the one folder that imports it
MATHS = {"math", "typing", "collections", "dataclasses", "itertools", "functools", "torch", "numpy", "sklearn", "scipy",
         "pipeline"}  # fmt: skip
Imports = Mapping[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Each module of the package below root."""
    return {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted((root / "pipeline").rglob("*.py"))
    }


@cache
def statements(source: str) -> list[tuple[str, set[str]]]:
    """Each import of a module's text: `import a` as (a, {}), `from a import b, c` as (a, {a.b, a.c})."""
    nodes = list(ast.walk(ast.parse(source)))
    whole = [(alias.name, set[str]()) for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return whole + [(node.module, {f"{node.module}.{alias.name}" for alias in node.names})
                    for node in nodes if isinstance(node, ast.ImportFrom) and node.module]  # fmt: skip


def imports(root: Path) -> Imports:
    """What each module imports, late imports too: modules of the package, and other packages by their first name."""
    known = modules(root)
    found: dict[str, set[str]] = {}
    for module, file in known.items():
        names = set[str]()
        for source, inside in statements(file.read_text(encoding="utf-8")):
            names |= inside & known.keys() or {source}
        found[module] = {name if name in known else name.split(".")[0] for name in names} - {module}
    return found


def folder_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def tasks_named_elsewhere(root: Path) -> Iterator[str]:
    """Each module that names a module of a task, by an import or as text, where that is not allowed."""
    folders = [file.parent.name for file in sorted((root / "pipeline" / "tasks").glob("*/__init__.py"))]
    for module, file in modules(root).items():
        named = re.search(rf"\btasks[./]({'|'.join(folders)})\b", file.read_text(encoding="utf-8"))
        if named and folder_of(module) not in NAME_TASKS:
            yield f"{module} names {named[0]}, allowed in {', '.join(sorted(NAME_TASKS))}"


def broken(root: Path) -> Iterator[str]:
    """Each rule that is broken, in a line."""
    graph = imports(root)
    own = {module: {name for name in names if name in graph and name != "pipeline"} for module, names in graph.items()}
    for module, names in own.items():
        here = folder_of(module)
        for name in names if here else ():
            there = folder_of(name)
            if here != there and LEVEL[there] >= LEVEL[here]:
                yield f"{module} imports {name}, which is not on a floor below"
            parts, others = module.split("."), name.split(".")
            if here == there == "tasks" and len(others) > 3 and parts[2] != others[2]:
                yield f"{module} imports {name}, which is of another task"
    yield from tasks_named_elsewhere(root)
    for module, names in graph.items():
        for library, folder in LIBRARIES.items():
            if library in names and folder_of(module) != folder:
                yield f"{module} imports {library}, allowed in {folder}"
        if folder_of(module) == "maths" and names - MATHS - own[module]:
            yield f"{module} imports {', '.join(sorted(names - MATHS - own[module]))}, which is no mathematics"
    try:
        tuple(TopologicalSorter(own).static_order())
    except CycleError as error:
        yield f"a circle: {' -> '.join(error.args[1])}"
    between = {folder: {folder_of(name) for module in own if folder_of(module) == folder for name in own[module]}
               - {folder} for folder in LEVEL}  # fmt: skip
    try:
        tuple(TopologicalSorter(between).static_order())
    except CycleError as error:
        yield f"a circle of folders: {' -> '.join(error.args[1])}"
    stems = [
        module.split(".")[-1]
        for module, file in modules(root).items()
        if file.name not in ("__init__.py", "__main__.py")
    ]
    tasks = {module.split(".")[-1] for module in own if module.count(".") == 3 and folder_of(module) == "tasks"}
    for stem, times in Counter(stems).items():
        if times > 1 and stem not in REPEATED & tasks:
            yield f"{times} files are called {stem}.py"


def test_the_package_keeps_the_rules() -> None:
    assert list(broken(ROOT)) == []


@pytest.mark.parametrize(("file", "line", "says"), [
    ("storage/files.py", "from pipeline.training import loop", "is not on a floor below"),
    ("runs/launch.py", "def late():\n    import mlflow", "imports mlflow, allowed in tracking"),
    ("tasks/mmoe/model.py", "from pipeline.tasks.visobert import config", "which is of another task"),
    ("sweeps/jobs.py", "def late():\n    from pipeline.tasks.mmoe import config", "names tasks.mmoe, allowed in demo"),
    ("runs/resume.py", "CONFIG = 'pipeline.tasks.visobert.config:VisobertConfig'", "names tasks.visobert, allowed in"),
    ("maths/losses.py", "import pandas", "which is no mathematics"),
    ("storage/files.py", "from pipeline.storage import run_folder", "a circle: "),
    ("storage/losses.py", "", "2 files are called losses.py"),
])  # fmt: skip
def test_each_rule_is_seen_to_be_broken(tmp_path: Path, file: str, line: str, says: str) -> None:
    for source in modules(ROOT).values():
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    changed = tmp_path / "pipeline" / file
    changed.write_text((changed.read_text() if changed.exists() else "") + f"\n{line}\n")
    assert any(says in broken_rule for broken_rule in broken(tmp_path))
