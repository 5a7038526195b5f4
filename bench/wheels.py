"""What `bench.gpu` needs beside the packages of a machine with a GPU, as wheels to bring there."""

import importlib.metadata
import re
import tomllib

from bench.figures import ROOT

MACHINE = ("torch", "transformers", "numba", "pyarrow", "pandas", "scikit-learn", "scipy")
PYTHON, PLATFORMS = "3.12", ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64")  # what torch itself needs, or older
UNUSED = ("click", "deepctr-torch", "matplotlib", "mlflow", "optuna")  # for tracking, sweeps, plots, the command line


def commands() -> str:
    """How to fetch the wheels here, and how to install them there."""
    pins = " ".join(f"{name}=={version}" for name, version in needed().items())
    platforms = " ".join(f"--platform {name}" for name in PLATFORMS)
    return (f"pip download --dest wheels --no-deps --only-binary=:all: --python-version {PYTHON} {platforms} {pins}\n"
            "python -m pip install --no-index --no-deps wheels/*.whl  # on the machine")  # fmt: skip


def needed() -> dict[str, str]:
    """The packages, with their versions here: pins of pyproject.toml that the machine lacks, and what these require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = [*project["dependencies"], *project["optional-dependencies"]["bench"]]
    there = {*MACHINE, *UNUSED, *(name for package in MACHINE for name in _required(package))}
    found, waiting = set[str](), [pin.partition("==")[0] for pin in pins]
    while waiting:
        name = waiting.pop()
        if name not in there and name not in found:
            found.add(name)
            waiting += _required(name)
    return {name: importlib.metadata.version(name) for name in sorted(found)}


def _required(package: str) -> list[str]:
    """Names of the packages that a package requires everywhere, without its extras."""
    required = importlib.metadata.requires(package) or []
    names = [re.split(r"[^\w.-]", each)[0] for each in required if ";" not in each]
    return [re.sub(r"[-_.]+", "-", name).lower() for name in names]
