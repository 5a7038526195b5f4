"""Data-parallel training in several processes: `torchrun --nproc_per_node=2 -m pipeline train_mmoe`.

Every process (rank) holds the whole model and trains on its part of the rows of every micro-batch. Counts, losses and
gradients are summed over the ranks. Every loss is a sum divided by global counts, so the result equals that of a
single process up to rounding. Rank 0, the main process, opens the run, logs and writes files. Checkpoints do not depend
on the number of processes. With a single process, these functions do not communicate.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from pipeline.compute.sparse import coalesced
from pipeline.errors import RankLost, UserError
from pipeline.runtime.interrupts import deferred, raise_or_disable
from pipeline.runtime.process_rank import go_alone, is_main_process, rank, world_size

TIMEOUT = timedelta(minutes=30)  # other ranks wait while rank 0 evaluates or saves
BUCKET_BYTES = 25 << 20  # size of the gradients that are summed in one all-reduce


def init(device: str) -> None:
    """Join the process group.

    Raises:
        UserError: torchrun's environment variables are missing.
        RankLost: another process did not join.
    """
    if world_size() == 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"found WORLD_SIZE {world_size()} without {', '.join(missing)}, allowed: what torchrun sets, or none"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with _collective():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)


def destroy() -> None:
    """Leave the process group; rank 0 continues alone."""
    if world_size() == 1:
        return
    distributed.destroy_process_group()
    go_alone()


@contextmanager
def _collective() -> Iterator[None]:
    """Defer interrupts during a collective operation, and raise `RankLost` if it fails."""
    with deferred():
        try:
            yield
        except RuntimeError as error:  # raised by gloo and NCCL
            raise_or_disable()  # torchrun now signals the remaining processes; report this error, not the signal
            reason = str(error).strip().splitlines()[-1]
            raise RankLost(f"rank {rank()} of {world_size()}: another process of this training is gone ({reason}); "
                           "torchrun names the first that ended") from None  # fmt: skip


def check_same(facts: Mapping[str, Any] | None) -> bool:
    """Check that the facts are the same on all ranks.

    Returns False if rank 0 passes None, because there is nothing to train; the process group is then destroyed.

    Raises:
        UserError: a fact differs from that of rank 0.
    """
    if world_size() == 1:
        return facts is not None
    gathered: list[Any] = [None] * world_size()
    with _collective():
        distributed.all_gather_object(gathered, None if facts is None else dict(facts))
    expected = gathered[0]
    if expected is None:
        destroy()
        return False
    for other, values in enumerate(gathered):
        for name, value in expected.items():
            if values is not None and values[name] != value:
                raise UserError(
                    f"rank {other}: {name} is {values[name]}, rank 0: {value}; allowed: the same everywhere"
                )
    return True


def broadcast(make: Callable[[], Any]) -> Any:
    """Call `make` on rank 0 and return its result (tensors and plain values) on every rank, on the CPU."""
    if world_size() == 1:
        return make()
    buffer = BytesIO()
    if is_main_process():
        torch.save(make(), buffer)
    size = torch.tensor(buffer.tell())
    with _collective():
        distributed.broadcast(size, 0)
        content = torch.frombuffer(buffer.getbuffer() if is_main_process() else bytearray(int(size)), dtype=torch.uint8)
        distributed.broadcast(content, 0)
    return torch.load(BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=True)


def local_rows(rows: Any) -> Any:
    """Select this rank's rows of a micro-batch. If there are fewer rows than ranks, every rank takes all of them."""
    return rows if len(rows) < world_size() else rows[rank() :: world_size()]


def local_weight(rows: int) -> float:
    """Weight of this rank's values in sums over the ranks: below 1 if every rank has all rows (see `local_rows`).

    rows: number of rows of the whole micro-batch.
    """
    return 1 / world_size() if rows < world_size() else 1.0


def all_reduce(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum each tensor over the ranks, in float64; the results keep their data types."""
    if world_size() == 1 or not tensors:
        return dict(tensors)
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors.values()])
    with _collective():
        distributed.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors.values()])
    return {
        name: (part if tensor.is_floating_point() else part.round()).view(tensor.shape).to(tensor.dtype)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }


def all_reduce_mean(values: Tensor) -> Tensor:
    """Mean over the first dimension and all ranks; gradients flow only to this rank's rows.

    Multiply a function of this mean by this rank's share of the rows: summed over the ranks, the values and gradients
    are then those of the function of the whole batch.
    """
    own = values.mean(0)
    if world_size() == 1:
        return own
    total = all_reduce({"sum": values.sum(0), "rows": values.new_tensor(float(len(values)))})
    return total["sum"] / total["rows"] + (own - own.detach())


def all_reduce_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients over the ranks in place. A sparse gradient gets the rows of all ranks."""
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = _all_reduce_sparse(parameter.grad)
            continue
        bucket.append(parameter.grad)
        if sum(gradient.nbytes for gradient in bucket) >= BUCKET_BYTES:
            _all_reduce_bucket(bucket)
            bucket = []
    if bucket:
        _all_reduce_bucket(bucket)


def _all_reduce_bucket(bucket: Sequence[Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
    with _collective():
        distributed.all_reduce(flat)
    for gradient, part in zip(bucket, torch.split(flat, [gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def _all_reduce_sparse(gradient: Tensor) -> Tensor:
    own = coalesced(gradient)
    rows, values = all_gather(own.indices()[0]), all_gather(own.values())  # in the same order on every rank
    return torch.sparse_coo_tensor(rows[None], values, own.shape, check_invariants=False).coalesce()


def all_gather(part: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks along the first dimension; their lengths may differ."""
    if world_size() == 1:
        return part
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=part.device)
    lengths[rank()] = len(part)
    with _collective():
        distributed.all_reduce(lengths)
        counts = lengths.tolist()
        padded = part.new_zeros(max(counts), *part.shape[1:])
        padded[: len(part)] = part
        gathered = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(gathered, padded)
    return torch.cat([whole[:count] for whole, count in zip(gathered, counts, strict=True)])


def split_evenly(rows: int, work: Callable[[int, int], Sequence[Tensor]]) -> list[Tensor]:
    """Call `work(first, last)` for this rank's part of the rows; return each tensor, gathered from all ranks."""
    if world_size() == 1 or rows < world_size():
        return list(work(0, rows))
    first, last = (rows * index // world_size() for index in (rank(), rank() + 1))
    return [all_gather(part) for part in work(first, last)]


def seed_rank(seed: int, step: int) -> None:
    """Seed torch for a step, differently on each rank. Rank 0 keeps its state, as in training with one process."""
    if is_main_process():
        return
    torch.manual_seed(int(np.random.SeedSequence([seed, rank(), step]).generate_state(1, np.uint64)[0] >> 1))
