"""The code that travels with a logged model: the modules that its predictor imports, as a package of their own.

It is called `focal_model_<digest of its content>` and imports itself by relative names, so that it collides neither
with a checkout of the project nor with another version of a model in the same process.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parents[1]
ROOT = PROJECT.name
LOADER = f"{ROOT}.serving"


def write_package(task: str, folder: Path) -> str:
    """Write the package of a task's logged models below the folder, and return its name.

    Raises:
        ImportError: a module imports what is not there, or the project in a way that cannot be made relative.
    """
    modules = _needed([LOADER, f"{ROOT}.tasks.{task}.predict"])
    sources = {module: _relative(module, source) for module, source in modules.items()}
    content = "\0".join(f"{module}\0{source}" for module, source in sorted(sources.items()))
    package = folder / f"focal_model_{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    for module, source in sources.items():
        file = package.joinpath(*module.split(".")[1:]).with_suffix(".py")
        for parent in [file.parent, *file.parent.parents]:
            parent.mkdir(parents=True, exist_ok=True)
            if parent.is_relative_to(package):
                (parent / "__init__.py").touch()
        file.write_text(source, encoding="utf-8")
    return package.name


def _needed(first: list[str]) -> dict[str, str]:
    """The sources of these modules and of all that they import of the project, late imports too."""
    sources: dict[str, str] = {}
    waiting = list(first)
    while waiting:
        module = waiting.pop()
        if module in sources:
            continue
        file = PROJECT.parent.joinpath(*module.split(".")).with_suffix(".py")
        if not file.is_file():
            raise ImportError(f"{module}: no such module of the project")
        sources[module] = file.read_text(encoding="utf-8")
        for node in _imports(ast.parse(sources[module])):
            waiting += _modules(node)
    return sources


def _imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Every `from pipeline... import ...` of a module but those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == ROOT for alias in node.names):
            raise ImportError(f"import {node.names[0].name}: write from ... import ..., which can be made relative")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == ROOT:
            yield node
        yield from _imports(node)


def _modules(node: ast.ImportFrom) -> list[str]:
    """The modules that an import names: a module, or modules of a package."""
    name = str(node.module)
    if PROJECT.parent.joinpath(*name.split(".")).is_dir():
        return [f"{name}.{alias.name}" for alias in node.names]
    return [name]


def _relative(module: str, source: str) -> str:
    """A module's source with its imports of the project relative.

    >>> _relative("pipeline.tasks.mmoe.predict", "from pipeline.config.strict_config import load")
    'from ...config import load'
    """
    dots = "." * module.count(".")
    return re.sub(rf"(?m)^(\s*from ){ROOT}(?:\.(\S+))?(?= import )", lambda found: f"{found[1]}{dots}{found[2] or ''}",
                  source)  # fmt: skip
