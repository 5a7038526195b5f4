"""Package the code of a logged model: the project modules that its predictor imports.

The package is called `focal_model_<digest of its content>` and uses relative imports, so that it conflicts neither with
the project itself nor with another version of a model in the same process.
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
    """Write the package for a task's logged models into the folder; returns its name.

    Raises:
        ImportError: a module does not exist, or imports the project in a way that cannot be made relative.
    """
    modules = _collect([LOADER, f"{ROOT}.tasks.{task}.predict"])
    sources = {module: _with_relative_imports(module, source) for module, source in modules.items()}
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


def _collect(modules: list[str]) -> dict[str, str]:
    """Sources of the modules and of all project modules that they import, including late and indirect imports."""
    sources: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in sources:
            continue
        file = PROJECT.parent.joinpath(*module.split(".")).with_suffix(".py")
        if not file.is_file():
            raise ImportError(f"{module}: no such module of the project")
        sources[module] = file.read_text(encoding="utf-8")
        for node in _project_imports(ast.parse(sources[module])):
            name = str(node.module)
            is_package = PROJECT.parent.joinpath(*name.split(".")).is_dir()
            waiting += [f"{name}.{alias.name}" for alias in node.names] if is_package else [name]
    return sources


def _project_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Yield the `from pipeline... import ...` statements of a module, except under TYPE_CHECKING.

    Raises:
        ImportError: the module has an `import pipeline...` statement, which cannot be made relative.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == ROOT for alias in node.names):
            raise ImportError(f"import {node.names[0].name}: write from ... import ..., which can be made relative")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == ROOT:
            yield node
        yield from _project_imports(node)


def _with_relative_imports(module: str, source: str) -> str:
    """A module's source with its imports of the project made relative.

    >>> _with_relative_imports("pipeline.tasks.mmoe.predict", "from pipeline.config.strict_config import load")
    'from ...config.strict_config import load'
    """
    dots = "." * module.count(".")
    return re.sub(rf"(?m)^(\s*from ){ROOT}(?:\.(\S+))?(?= import )",
                  lambda match: f"{match[1]}{dots}{match[2] or ''}", source)  # fmt: skip
