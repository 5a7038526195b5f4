"""One training by several processes: `torchrun --nproc_per_node=2 -m pipeline train_mmoe`. Alone, nothing here acts.

Every process (a rank) holds the whole model, and takes its share of the rows of every batch. A step adds up over the
ranks what it counts, its losses' shares and its gradients; since a loss is a sum divided by the step's counts, the
result is the one that a single process would have, up to rounding. Then all make the same update. Rank 0 alone opens
the run, logs, and writes files: what it saves does not say how many processes there were.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipeline.errors import RankLost, UserError
from pipeline.runtime import process_rank
from pipeline.runtime.interrupts import deferred, raise_or_disable
from pipeline.runtime.process_rank import is_main_process, world_size

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(minutes=30)  # that ranks wait while one evaluates, or saves
BUCKET_BYTES = 25 << 20  # of gradients that are added up in one go


def join(device: str) -> None:
    """Meet the other processes.

    Raises:
        UserError: the environment does not say where.
        RankLost: they did not come.
    """
    if world_size() == 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"found WORLD_SIZE {world_size()} without {', '.join(missing)}, allowed: what torchrun sets, or none"
        )
    import torch
    from torch import distributed

    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with _together():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)


def leave() -> None:
    """Go on alone: what is left is for rank 0."""
    if world_size() == 1:
        return
    from torch import distributed

    distributed.destroy_process_group()
    process_rank.go_alone()


@contextmanager
def _together() -> Iterator[None]:
    """A block that fails where another process is gone. What is asked of this one meanwhile is heard after it."""
    with deferred():
        try:
            yield
        except RuntimeError as error:  # what gloo and NCCL say
            raise_or_disable()  # torchrun's signal to those that are left follows; the cause is this
            reason = str(error).strip().splitlines()[-1]
            raise RankLost(f"rank {process_rank.rank()} of {world_size()}: another process of this training is gone "
                           f"({reason}); torchrun names the first that ended") from None  # fmt: skip


def agree(facts: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Rank 0's facts, which must be those of every rank. None of rank 0's: there is nothing to train, all part.

    Raises:
        UserError: names a rank that differs.
    """
    if world_size() == 1:
        return facts
    from torch import distributed

    found: list[Any] = [None] * world_size()
    with _together():
        distributed.all_gather_object(found, None if facts is None else dict(facts))
    for rank, other in enumerate(found):
        for name, value in (found[0] or {}).items():
            if other is not None and other[name] != value:
                raise UserError(f"rank {rank}: {name} is {other[name]}, rank 0: {value}; allowed: the same everywhere")
    first: Mapping[str, Any] | None = found[0]
    if first is None:
        leave()
    return first


def first_of(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on every rank: plain values with tensors in them."""
    if world_size() == 1:
        return make()
    import torch
    from torch import distributed

    tensors: list[Tensor] = []
    told: list[Any] = [None]
    if is_main_process():
        plain = _without_tensors(make(), tensors)
        told = [(plain, [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors])]
    with _together():
        distributed.broadcast_object_list(told, 0)
        plain, kinds = told[0]
        if not is_main_process():
            tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in kinds]
        for tensor in tensors:
            distributed.broadcast(tensor if tensor.is_contiguous() else tensor.contiguous(), 0)
    return _with_tensors(plain, tensors)


class _Place(int):
    """Where in the list a tensor is."""


def _without_tensors(value: Any, tensors: "list[Tensor]") -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if isinstance(value, Mapping):
        return {key: _without_tensors(part, tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_tensors(part, tensors) for part in value)
    return value


def _with_tensors(value: Any, tensors: "Sequence[Tensor]") -> Any:
    if isinstance(value, _Place):
        return tensors[value]
    if isinstance(value, dict):
        return {key: _with_tensors(part, tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(part, tensors) for part in value)
    return value


def share(rows: Any) -> Any:
    """This rank's rows of a micro-batch. Where there are fewer than ranks, each takes all (see `weight`)."""
    return rows if len(rows) < world_size() else rows[process_rank.rank() :: world_size()]


def weight(rows: int) -> float:
    """Of this rank's part of a micro-batch of so many rows, in sums over the ranks."""
    return 1 / world_size() if rows < world_size() else 1.0


def summed(named: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The tensors added up over the ranks, by name."""
    if world_size() == 1 or not named:
        return dict(named)
    import torch
    from torch import distributed

    whole = torch.cat([tensor.detach().reshape(-1).double() for tensor in named.values()])
    with _together():
        distributed.all_reduce(whole)
    found, first = {}, 0
    for name, tensor in named.items():
        part = whole[first : first + tensor.numel()].view(tensor.shape)
        first += tensor.numel()
        found[name] = (part if tensor.is_floating_point() else part.round()).to(tensor.dtype)
    return found


def mean(values: "Tensor") -> "Tensor":
    """The mean over the first dimension, of the rows of all ranks; a gradient flows through this rank's alone.

    A function of it, times this rank's share of the rows, adds up over the ranks to the function of the whole, and so
    do the gradients.
    """
    own = values.mean(0)
    if world_size() == 1:
        return own
    total = summed({"sum": values.sum(0), "rows": values.new_tensor(float(len(values)))})
    return total["sum"] / total["rows"] + (own - own.detach())


def sum_gradients(parameters: "Iterable[Tensor]") -> None:
    """Add up the gradients over the ranks, in place; of a sparse one, the rows that any rank has."""
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    filled = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = _summed_rows(parameter.grad)
            continue
        bucket.append(parameter.grad)
        filled += parameter.grad.nbytes
        if filled >= BUCKET_BYTES:
            _sum_bucket(bucket)
            bucket, filled = [], 0
    _sum_bucket(bucket)


def _sum_bucket(bucket: "Sequence[Tensor]") -> None:
    import torch
    from torch import distributed

    if not bucket:
        return
    whole = torch.cat([gradient.reshape(-1) for gradient in bucket])
    with _together():
        distributed.all_reduce(whole)
    for gradient, part in zip(bucket, torch.split(whole, [gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def _summed_rows(gradient: "Tensor") -> "Tensor":
    """A coalesced sparse gradient: each rank's rows in their order, so that all add up in the same one."""
    import torch

    from pipeline.compute.sparse import coalesced

    own = coalesced(gradient)
    rows, values = joined(own.indices()[0]), joined(own.values())
    return torch.sparse_coo_tensor(rows[None], values, own.shape, check_invariants=False).coalesce()


def joined(part: "Tensor") -> "Tensor":
    """The parts of all ranks, in their order, along the first dimension."""
    if world_size() == 1:
        return part
    import torch
    from torch import distributed

    lengths = torch.zeros(world_size(), dtype=torch.int64, device=part.device)
    lengths[process_rank.rank()] = len(part)
    with _together():
        distributed.all_reduce(lengths)
        counts = lengths.tolist()
        padded = part.new_zeros(max(counts), *part.shape[1:])
        padded[: len(part)] = part
        found = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(found, padded)
    return torch.cat([whole[:count] for whole, count in zip(found, counts, strict=True)])


def each_its_part(rows: int, work: "Callable[[int, int], Sequence[Tensor]]") -> "list[Tensor]":
    """`work(first, last)` of this rank's part of the rows, each of its tensors joined with the other ranks'."""
    if world_size() == 1 or rows < world_size():
        return list(work(0, rows))
    borders = [rows * rank // world_size() for rank in (process_rank.rank(), process_rank.rank() + 1)]
    return [joined(part) for part in work(*borders)]


def seed(own: int, step: int) -> None:
    """Random numbers of a step that no other rank draws. Rank 0 goes on with those that it has, as if it were alone."""
    if is_main_process():
        return
    import numpy as np
    import torch

    torch.manual_seed(
        int(np.random.SeedSequence([own, process_rank.rank(), step]).generate_state(1, np.uint64)[0] >> 1)
    )
