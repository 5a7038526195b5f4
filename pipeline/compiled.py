"""Functions that numba compiles: once a machine, and free of the interpreter's lock while they run."""

import ctypes
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

Member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
AHEAD = 16  # rows of a table to ask for before they are needed: memory answers after some 100 ns
LEAST = 1024  # items worth a second thread


def compiled(function: F, freedom: Set[str] = frozenset()) -> F:
    """The function in machine code, kept on disk for the next process where a folder for it can be written.

    freedom: what of LLVM's "fast math" it may take; none = floating point as it is written.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(freedom)}
    try:
        return njit(function, cache=True, **options)  # type: ignore[no-any-return]
    except RuntimeError:  # numba finds no folder
        return njit(function, **options)  # type: ignore[no-any-return]


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
    """`work(part)` for each part, on torch's own threads where they are GNU OpenMP's.

    They are awake from torch's last operator; to wake a thread of ours took longer than the work it had.
    """
    if parts == 1:
        work(0)
        return
    team = _team()
    if team is None:
        for _ in _pool().map(work, range(parts)):
            pass
        return
    parallel, inside = team
    raised: list[BaseException] = []

    def member(_data: object) -> None:
        try:
            for part in range(inside.omp_get_thread_num(), parts, inside.omp_get_num_threads()):
                work(part)
        except BaseException as error:  # what leaves a callback is only printed
            raised.append(error)

    parallel(Member(member), None, parts, 0)
    if raised:
        raise raised[0]


@cache
def _team() -> tuple[Callable[..., None], ctypes.PyDLL] | None:
    """Of the OpenMP library that torch has loaded, if it is GNU's: what runs a function on all threads, and itself."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.split(maxsplit=5)[-1] for line in mapped if "/libgomp" in line)
        parallel = ctypes.CDLL(name).GOMP_parallel  # lets go of the interpreter's lock
        parallel.argtypes, parallel.restype = (Member, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return parallel, ctypes.PyDLL(name)
    except (OSError, StopIteration, AttributeError):
        return None


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="shared")
