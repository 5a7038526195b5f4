"""Items made ready before they are asked for, in their order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from pipeline.parallel import at_once

T = TypeVar("T")
R = TypeVar("R")


def prefetched(items: Iterable[T], load: Callable[[T], R], ahead: int, threads: int = 1) -> Iterator[tuple[T, R]]:
    """Each item with what `load` makes of it: `ahead` of them in advance by a thread in the background.

    0 = in the foreground, one for each of so many `threads` at a time. What `load` raises is raised where its item
    would come.
    """
    if not ahead:
        yield from _side_by_side(items, load, threads)
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


def _side_by_side(items: Iterable[T], load: Callable[[T], R], threads: int) -> Iterator[tuple[T, R]]:
    source = iter(items)
    while some := list(islice(source, threads)):
        for item, future in zip(some, _loaded(load, some), strict=True):
            yield item, future.result()


def _loaded(load: Callable[[T], R], items: Sequence[T]) -> Sequence[Future[R]]:
    """Each thread makes an item of its own: all of them at one would wait for each other."""
    futures: list[Future[R]] = [Future() for _ in items]

    def fill(part: int) -> None:
        try:
            futures[part].set_result(load(items[part]))
        except Exception as error:
            futures[part].set_exception(error)

    at_once(fill, len(items))
    return futures
