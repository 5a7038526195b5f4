"""Package the code of a logged model: the modules of the project and of the task's package that its predictor imports.

The package is called `focal_model_<digest of its content>` and uses relative imports, so that it conflicts neither with
the project itself nor with another version of a model in the same process. It holds a folder `pipeline`, and for a task
of another package one with that package's name.
"""

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[1]
ROOT = PROJECT.name
LOADER = f"{ROOT}.serving"

Roots = Mapping[str, Sequence[Path]]  # top-level package -> its folders


def write_package(predictor: str, folder: Path) -> str:
    """Write the package for logged models with the predictor into the folder; returns its name.

    predictor: full name of a task's module `predict`.

    Raises:
        ImportError: a module does not exist, or is imported in a way that cannot be made relative.
    """
    roots = find_roots(predictor)
    modules = _collect([LOADER, predictor], roots)
    sources = {module: _with_relative_imports(module, source, list(roots)) for module, source in modules.items()}
    content = "\0".join(f"{module}\0{source}" for module, source in sorted(sources.items()))
    package = folder / f"focal_model_{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    for module, source in sources.items():
        file = package.joinpath(*module.split(".")).with_suffix(".py")
        for parent in [file.parent, *file.parent.parents]:
            parent.mkdir(parents=True, exist_ok=True)
            if parent.is_relative_to(package):
                (parent / "__init__.py").touch()
        file.write_text(source, encoding="utf-8", newline="\n")
    return package.name


def find_roots(predictor: str) -> Roots:
    """The top-level packages whose modules are packaged: the project, and the one of the predictor.

    Raises:
        ImportError: the predictor's package does not exist.
    """
    roots: dict[str, Sequence[Path]] = {ROOT: [PROJECT]}
    top = predictor.split(".", maxsplit=1)[0]
    if top not in roots:
        spec = importlib.util.find_spec(top)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"{top}: no such package")
        roots[top] = [Path(place) for place in spec.submodule_search_locations]
    return roots


def _collect(modules: list[str], roots: Roots) -> dict[str, str]:
    """Sources of the modules and of all modules below the roots that they import, also late and indirect imports."""
    sources: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in sources:
            continue
        file = next((path for path in _paths(module, roots, ".py") if path.is_file()), None)
        if file is None:
            raise ImportError(f"{module}: no such module of {' or '.join(roots)}; the __init__.py of a package is not "
                              "packaged: write from <module> import <name>")  # fmt: skip
        sources[module] = file.read_text(encoding="utf-8")
        for name, imported in _imports(module, ast.parse(sources[module]), roots):
            is_package = any(path.is_dir() for path in _paths(name, roots))
            waiting += [f"{name}.{each}" for each in imported] if is_package else [name]
    return sources


def _paths(module: str, roots: Roots, suffix: str = "") -> list[Path]:
    top, *rest = module.split(".")
    return [place.parent.joinpath(place.name, *rest).with_suffix(suffix) for place in roots[top]]


def _imports(module: str, tree: ast.AST, roots: Roots) -> Iterator[tuple[str, list[str]]]:
    """Yield the `from ... import ...` statements of a module about the roots, except under TYPE_CHECKING.

    As the full name of what is imported from, and the imported names.

    Raises:
        ImportError: the module has an `import ...` statement about a root, which cannot be made relative.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in roots for alias in node.names):
            raise ImportError(f"import {node.names[0].name}: write from ... import ..., which can be made relative")
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                name = ".".join([*module.split(".")[: -node.level], *([name] if name else [])])
            if name.split(".")[0] in roots:
                yield name, [alias.name for alias in node.names]
        yield from _imports(module, node, roots)


def _with_relative_imports(module: str, source: str, roots: Sequence[str]) -> str:
    """A module's source with its absolute imports of the roots made relative; relative imports stay as they are.

    >>> _with_relative_imports("outside.predict", "from pipeline.errors import UserError", ["pipeline", "outside"])
    'from ..pipeline.errors import UserError'
    """
    dots = "." * (module.count(".") + 1)
    names = "|".join(map(re.escape, roots))
    return re.sub(rf"(?m)^(\s*from )((?:{names})(?:\.\S+)?)(?= import )", rf"\g<1>{dots}\g<2>", source)
