"""Prepare batches in a background thread while earlier training steps run."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetched(items: Iterable[T], load: Callable[[T], R], ahead: int) -> Iterator[tuple[T, R]]:
    """Yield each item with the result of `load(item)`, in order.

    `ahead`: number of items to load in advance; 0 = load on demand. An exception in `load` is raised when its item is
    due.
    """
    source = iter(items)
    if ahead == 0:
        yield from ((item, load(item)) for item in source)
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        waiting: deque[tuple[T, Future[R]]] = deque((item, pool.submit(load, item)) for item in islice(source, ahead))
        while waiting:
            item, future = waiting.popleft()
            loaded = future.result()
            waiting.extend((item, pool.submit(load, item)) for item in islice(source, 1))
            yield item, loaded
    finally:
        pool.shutdown(cancel_futures=True)
