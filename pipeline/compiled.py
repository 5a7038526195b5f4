"""Functions that numba compiles: once a machine, and free of the interpreter's lock while they run."""

from collections.abc import Callable, Set
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

COMMON = ("compiled.py", "parallel.py")  # what any compiled function may contain a part of
STAMP = sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in COMMON)).digest()
AHEAD = 16  # rows of a table to ask for before they are needed: memory answers after some 100 ns
SUMS = {"reassoc", "contract", "nsz"}  # sums in any order, so that they are made many at a time; NaN stays NaN


def compiled(function: F, freedom: Set[str] = frozenset()) -> F:
    """The function in machine code, kept on disk for the next process where a folder for it can be written.

    freedom: what of LLVM's "fast math" it may take; none = floating point as it is written.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(freedom)}
    try:
        found: Any = njit(function, cache=True, **options)
    except RuntimeError:  # numba finds no folder
        return njit(function, **options)  # type: ignore[no-any-return]
    # numba looks at the function's own file alone, and would miss a change of what all are made of
    stored = found._cache._cache_file
    stored._source_stamp = (stored._source_stamp, STAMP)
    return found  # type: ignore[no-any-return]


def fast(function: Callable[..., Any]) -> Any:
    return compiled(function, SUMS)


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


def _widened(_context: Any, value: Any) -> Any:
    """widened(value): bfloat16's bits (a uint16), or a float32, as float32"""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        if value != types.uint16:
            return arguments[0]
        bits = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, 16)), ir.FloatType())

    return types.float32(value), generate


def _narrowed(_context: Any, _value: Any, array: Any) -> Any:
    """narrowed(_value, array): a float32 as the array's kind, to the nearest, ties to even"""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        if array.dtype != types.uint16:
            return arguments[0]
        number, half = ir.IntType(32), ir.IntType(16)
        bits = builder.bitcast(arguments[0], number)
        odd = builder.and_(builder.lshr(bits, number(16)), number(1))
        rounded = builder.add(builder.add(bits, number(0x7FFF)), odd)
        nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.select(nan, half(0x7FC0), builder.trunc(builder.lshr(rounded, number(16)), half))

    return array.dtype(types.float32, array), generate


fetch: Any = intrinsic(_fetch)
widened: Any = intrinsic(_widened)
narrowed: Any = intrinsic(_narrowed)


def array_of(tensor: "Tensor") -> Array:
    """Its values on the CPU, or their bits in bfloat16: no copy."""
    import torch

    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
