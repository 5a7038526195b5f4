"""Work divided among torch's threads."""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.interrupts import held

T = TypeVar("T")
R = TypeVar("R")

Member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
LEAST = 1024  # items worth a second thread
NUMBER, WORD, POINTER = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
MEMBER = ir.FunctionType(ir.VoidType(), [POINTER])
PARALLEL = ir.FunctionType(ir.VoidType(), [MEMBER.as_pointer(), POINTER, NUMBER, NUMBER])
build: Any = cgutils  # numba's, to write LLVM's instructions; untyped
_here = threading.local()  # busy: this thread works alone


def shared(work: Callable[[int, int], object], size: int) -> None:
    """`work(first, last)` over parts of `range(size)`, on as many threads as torch has."""
    parts = parts_of(size)
    borders = [size * part // parts for part in range(parts + 1)]
    at_once(lambda part: work(borders[part], borders[part + 1]), parts)


def over(rows: int, values: int, work: Callable[[int, int], object]) -> None:
    """`work(first, last)` over parts of the rows, as many as so many values are worth."""
    each = max(1, values // max(1, rows))
    shared(lambda first, last: work(first // each, last // each), rows * each)


def parts_of(size: int) -> int:
    """Into how many parts so many items are divided: torch's threads, if there is work for them.

    Within `alone`: one.
    """
    import torch

    if getattr(_here, "busy", False):
        return 1
    return min(torch.get_num_threads(), max(1, size // LEAST))


def alone(work: Callable[[T], R]) -> Callable[[T], R]:
    """The same, on the one thread that calls it."""

    def do(given: T) -> R:
        outer, _here.busy = getattr(_here, "busy", False), True
        try:
            return work(given)
        finally:
            _here.busy = outer

    return do


def at_once(work: Callable[[int], object], parts: int) -> None:
    """`work(part)` for each part, on torch's own threads where they are GNU OpenMP's.

    They are awake from torch's last operator; to wake a thread of ours took longer than the work it had.
    """
    if parts == 1:
        work(0)
        return

    do = alone(work)
    team = _team()
    if team is None:
        for _ in _pool().map(do, range(parts)):
            pass
        return
    raised: list[BaseException] = []
    left = set(range(parts))

    def member(_data: object) -> None:
        try:
            for part in range(team.inside.omp_get_thread_num(), parts, team.inside.omp_get_num_threads()):
                left.discard(part)
                do(part)
        except BaseException as error:  # what leaves a callback is only printed
            raised.append(error)

    with held() if threading.current_thread() is threading.main_thread() else nullcontext():
        team.parallel(Member(member), None, parts, 0)
        if raised:
            raise raised[0]
        for part in left:  # Python drops what a signal raises where a callback begins, and the callback
            do(part)


def spread(run: Callable[..., None], size: int, given: tuple[Any, ...], values: int | None = None) -> None:
    """`run(how, given)`, a compiled function that calls `divide(how, kernel, given)`.

    values: as many parts as so many of them are worth; `size` by default. No thread needs the interpreter's lock
    meanwhile, for which those of `shared` wait. One thread does it all where torch has not GNU's OpenMP.
    """
    parts = parts_of(size if values is None else values)
    team = _team()
    run((team.address if team else 0, size, parts), given)


def _divide(typing: Any, how: Any, kernel: Any, given: Any) -> Any:
    """divide(how, kernel, given): kernel(*given, first, last) over parts of a range, one after another to each thread

    how: the address of GOMP_parallel, or 0; the range's size; the number of parts. kernel: compiled, returns nothing;
    what it raises (there is only memory that it does not get) is a MemoryError.
    """
    called = typing.resolve_function_type(kernel, (*given.types, types.intp, types.intp), {})

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
        body = kernel.dispatcher.overloads[called.args]
        context.active_code_library.add_linking_library(body.library)
        callee = context.declare_function(builder.module, body.fndesc)
        start, size, parts = build.unpack_tuple(builder, values[0], 3)
        frame = build.alloca_once_value(builder, build.pack_struct(builder, [WORD(0), WORD(0), size, parts, values[2]]))

        member = ir.Function(builder.module, MEMBER, builder.module.get_unique_name("member"))
        member.linkage = "internal"
        inner = ir.IRBuilder(member.append_basic_block())
        kept = inner.bitcast(member.args[0], frame.type)
        _, _, size_, parts_, given_ = build.unpack_tuple(inner, inner.load(kept), 5)
        counter, failed = (inner.gep(kept, [NUMBER(0), NUMBER(place)]) for place in range(2))
        ask, do, end = (inner.append_basic_block() for _ in range(3))
        inner.branch(ask)
        inner.position_at_end(ask)
        part = inner.atomic_rmw("add", counter, WORD(1), "monotonic")
        inner.cbranch(inner.icmp_signed("<", part, parts_), do, end)
        inner.position_at_end(do)
        borders = [inner.sdiv(inner.mul(size_, border), parts_) for border in (part, inner.add(part, WORD(1)))]
        arguments = [*build.unpack_tuple(inner, given_, len(given)), *borders]
        status, _ = context.call_conv.call_function(inner, callee, types.none, called.args, arguments)
        inner.atomic_rmw("or", failed, inner.zext(status.is_error, WORD), "monotonic")
        inner.branch(ask)
        inner.position_at_end(end)
        inner.ret_void()

        data = builder.bitcast(frame, POINTER)
        alone = builder.or_(builder.icmp_signed("==", start, WORD(0)), builder.icmp_signed("<=", parts, WORD(1)))
        with builder.if_else(alone) as (here, there):
            with here:
                builder.call(member, [data])
            with there:
                parallel = builder.inttoptr(start, PARALLEL.as_pointer())
                builder.call(parallel, [member, data, builder.trunc(parts, NUMBER), NUMBER(0)])
        found = builder.load(builder.gep(frame, [NUMBER(0), NUMBER(1)]))
        with builder.if_then(builder.icmp_signed("!=", found, WORD(0)), likely=False):
            context.call_conv.return_user_exc(builder, MemoryError, ("a loop did not get the memory that it needs",))
        return context.get_dummy_value()

    return types.void(how, kernel, given), generate


divide: Any = intrinsic(_divide)


class _Team(NamedTuple):
    parallel: Any  # runs a function on all threads; lets go of the interpreter's lock meanwhile
    inside: ctypes.PyDLL  # what tells a function which of them it is on
    address: int  # of `parallel`


@cache
def _team() -> _Team | None:
    """Of the OpenMP library that torch has loaded, if it is GNU's."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.split(maxsplit=5)[-1] for line in mapped if "/libgomp" in line)
        parallel = ctypes.CDLL(name).GOMP_parallel
        parallel.argtypes, parallel.restype = (Member, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        address = ctypes.cast(parallel, ctypes.c_void_p).value
        return _Team(parallel, ctypes.PyDLL(name), address) if address else None
    except (OSError, StopIteration, AttributeError):
        return None


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="shared")
