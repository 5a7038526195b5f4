"""Functions that numba compiles: once a machine, and free of the interpreter's lock while they run."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

AHEAD = 16  # rows of a table to ask for before they are needed: memory answers after some 100 ns
LEAST = 1024  # items worth a second thread


def compiled(function: F) -> F:
    """The function in machine code, kept on disk for the next process where a folder for it can be written."""
    try:
        return njit(function, nogil=True, cache=True, error_model="numpy")  # type: ignore[no-any-return]
    except RuntimeError:  # numba finds no folder
        return njit(function, nogil=True, error_model="numpy")  # type: ignore[no-any-return]


def _fetch(_context: Any, array: Any, row: Any) -> Any:
    """fetch(array, row): ask for a row's first cache line, to be written: rows at random would each be waited for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table = context.make_array(signature.args[0])(context, builder, arguments[0])
        index = context.cast(builder, arguments[1], signature.args[1], types.int64)
        first = builder.ptrtoint(table.data, ir.IntType(64))
        stride = builder.extract_value(table.strides, 0)
        place = builder.inttoptr(builder.add(first, builder.mul(index, stride)), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
        builder.call(prefetch, [place, number(1), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, row), generate


fetch: Any = intrinsic(_fetch)


def shared(work: Callable[[int, int], object], size: int) -> None:
    """`work(first, last)` over parts of `range(size)`, on as many threads as torch has."""
    parts = parts_of(size)
    borders = [size * part // parts for part in range(parts + 1)]
    at_once(lambda part: work(borders[part], borders[part + 1]), parts)


def parts_of(size: int) -> int:
    """Into how many parts so many items are divided: torch's threads, if there is work for them."""
    import torch

    return min(torch.get_num_threads(), max(1, size // LEAST))


def at_once(work: Callable[[int], object], parts: int) -> None:
    """`work(part)` for each part on a thread of its own, the first on this one."""
    others = [_pool().submit(work, part) for part in range(1, parts)]
    work(0)
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="shared")
