"""Compile the dense part of a model with `torch.compile`, in training mode, with dynamic shapes.

Evaluation and prediction run the same methods without compilation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from pipeline.errors import UserError
from pipeline.runtime.console import warn

ALLOWED = "allowed: a C++ compiler (g++, or the one that CXX names in the environment), or training.compile: false"
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "fallback_random": True,  # dropout draws the random numbers that it draws without compilation
    "deterministic": True,  # kernels are not chosen by their measured time, which varies
}

_model: object = None  # description of the model whose compiled code this process has


def check_compiler(device: str) -> None:
    """Check that torch finds what it compiles with, for the CPU. For CUDA, the first compilation shows it.

    Raises:
        UserError: there is no C++ compiler.
    """
    if device != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # torch's own search; there is no public one

    try:
        get_cpp_compiler()
    except RuntimeError:
        raise UserError(f"training.compile: found no C++ compiler, {ALLOWED}") from None


def compile_method(module: nn.Module, name: str) -> None:
    """Compile a method of a module in place. The state dict keeps its names.

    It is compiled at its first call, in one piece, and again for a case that the compiled code excludes, such as a
    batch of one row. If torch's limit of compilations (`torch._dynamo.config.recompile_limit`) is reached, other cases
    are not compiled, and a warning says so.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch._functorch import config

    config.donated_buffer = False  # gradients of single loss components need the graph more than once
    eager = getattr(module, name)
    compiled: Callable[..., Any] = torch.compile(eager, dynamic=True, fullgraph=True, options=OPTIONS)
    warned = False

    def call(*arguments: Any) -> Any:
        nonlocal warned
        if not module.training:
            return eager(*arguments)
        try:
            return compiled(*arguments)
        except FailOnRecompileLimitHit:
            if not warned:
                warned = True
                warn(f"training.compile: {type(module).__name__}.{name} was compiled for as many cases as torch allows "
                     "(torch._dynamo.config.recompile_limit); others are not compiled, so they are slower")  # fmt: skip
            return eager(*arguments)

    setattr(module, name, call)


@contextmanager
def compiling(model: object, *, alone: bool) -> Iterator[None]:
    """Compile within the block, by the first calls of compiled methods.

    Torch keeps compiled code on disk (TORCHINDUCTOR_CACHE_DIR), where other processes find it. The next model of a
    process, such as a sweep's worker, uses the code of the one before it if both are the same; otherwise that is
    forgotten, so that the limit of compilations is that of one model.

    Args:
        model: description of the model.
        alone: processes with the same cache compile one after the other, so that only the first one has to. Not for
            processes that wait for each other.

    Raises:
        UserError: torch cannot compile the model.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    global _model  # noqa: PLW0603 (as torch's compiled code is global)
    if model != _model:
        torch.compiler.reset()
        _model = model
    try:
        with FileLock(Path(cache_dir()) / "focal-pipeline.lock") if alone else nullcontext():
            yield
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", error)
        line = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise UserError(f"training.compile: torch cannot compile the model: {line}; {ALLOWED}") from error
