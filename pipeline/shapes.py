"""Models without values: what they are made of can be counted, whatever their size."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FILLS = {"normal_", "uniform_"}  # methods that every random initialisation comes down to


class _Unfilled(TorchFunctionMode):
    """Nothing is initialised: random values on the "meta" device are drawn by torch's compiler, a second to import."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or getattr(func, "__name__", "") in FILLS:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules that are made within the block have shapes and types, and neither values nor memory for them."""
    with torch.device("meta"), _Unfilled():
        yield
