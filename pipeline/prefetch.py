"""Items made ready in the background, in their order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetched(items: Iterable[T], load: Callable[[T], R], ahead: int) -> Iterator[tuple[T, R]]:
    """Each item with what `load` makes of it, `ahead` of them in advance by one thread; 0 = when it is asked for.

    What `load` raises is raised where its item would come.
    """
    if not ahead:
        for item in items:
            yield item, load(item)
        return
    source = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting: deque[tuple[T, Future[R]]] = deque()
        try:
            for item in islice(source, ahead):
                waiting.append((item, pool.submit(load, item)))
            while waiting:
                item, future = waiting.popleft()
                ready = future.result()
                for following in islice(source, 1):
                    waiting.append((following, pool.submit(load, following)))
                yield item, ready
        finally:
            for _, future in waiting:
                future.cancel()
