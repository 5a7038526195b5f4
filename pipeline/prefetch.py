"""Items made ready before they are asked for, in their order."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import islice
from typing import Generic, TypeVar

from pipeline.parallel import alone, at_once

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 0.01  # seconds at least for an item in the making, before it is made anew
FIRST_PATIENCE = 1.0  # as long as nobody knows how long one takes
SIDE_BY_SIDE = 500  # items, after one took so long


def in_advance(items: Iterable[T], load: Callable[[T], R], ahead: int) -> Iterator[tuple[T, R]]:
    """Each item with what `load` makes of it, `ahead` of them in advance by one thread that has a core of its own.

    What `load` raises is raised where its item would come, here as below.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        yield from _Queue(pool, load, items, ahead).taken(_Queue.wait)


def in_gaps(items: Iterable[T], load: Callable[[T], R], ahead: int, threads: int) -> Iterator[tuple[T, R]]:
    """As `in_advance`, for a caller whose own threads have all the cores: made while one of them has nothing to do.

    The kernel has such a thread give way at once (SCHED_IDLE); `gaps_can_be_used` tells whether there are such. Where
    the caller has to wait for an item, it makes the next one meanwhile. Where other processes leave no gaps, items are
    made side by side for a while. `load` depends on its item alone: it may be called twice.
    """
    source = iter(items)
    pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="prefetch", initializer=_give_way)
    try:
        queue = _Queue(pool, alone(load), source, ahead)
        while queue.waiting:
            yield from queue.taken(_Queue.help)
            yield from side_by_side(islice(source, SIDE_BY_SIDE), load, threads)
            queue.starved = False
            queue.submit(ahead)
    finally:
        pool.shutdown(wait=False)  # a thread that gets no core is not waited for


def side_by_side(items: Iterable[T], load: Callable[[T], R], threads: int) -> Iterator[tuple[T, R]]:
    """As `in_advance`, in the foreground: each thread makes an item; all of them at one would wait for each other."""
    source = iter(items)
    while some := list(islice(source, threads)):
        for item, future in zip(some, _all_made(load, some), strict=True):
            yield item, future.result()


def _all_made(load: Callable[[T], R], items: Sequence[T]) -> Sequence[Future[R]]:
    futures: list[Future[R]] = [Future() for _ in items]
    at_once(lambda part: _fill(futures[part], load, items[part]), len(items))
    return futures


class _Queue(Generic[T, R]):
    """Items that are being made ready."""

    def __init__(self, pool: ThreadPoolExecutor, load: Callable[[T], R], items: Iterable[T], ahead: int) -> None:
        self.pool, self.load, self.source = pool, load, iter(items)
        self.waiting: deque[tuple[T, Future[R]]] = deque()
        self.starved = False  # an item took so long that no more are begun
        self.patience = FIRST_PATIENCE
        self.submit(ahead)

    def submit(self, count: int) -> None:
        for item in islice(self.source, count):
            self.waiting.append((item, self.pool.submit(self._timed, item)))

    def _timed(self, item: T) -> R:
        started = time.thread_time()  # how long the core was ours
        try:
            return self.load(item)
        finally:
            self.patience = max(PATIENCE, 2 * (time.thread_time() - started))

    def taken(self, take: "Callable[[_Queue[T, R], T, Future[R]], R]") -> Iterator[tuple[T, R]]:
        """All of them in turn, or those begun before one took too long."""
        try:
            while self.waiting:
                item, future = self.waiting.popleft()
                ready = take(self, item, future)
                self.submit(0 if self.starved else 1)
                yield item, ready
        finally:
            for _, future in self.waiting:
                future.cancel()

    def wait(self, _: T, future: Future[R]) -> R:
        return future.result()

    def help(self, item: T, future: Future[R]) -> R:
        if future.cancel():  # nobody has begun
            return self.load(item)
        if not future.done():
            self._make_next()
        try:
            return future.result(self.patience)
        except TimeoutError:  # the cores are busy with something else
            self.starved = True
            return self.load(item)

    def _make_next(self) -> None:
        for place, (item, future) in enumerate(self.waiting):
            if future.cancel():
                self.waiting[place] = item, _fill(Future(), self.load, item)
                return


def _fill(future: Future[R], load: Callable[[T], R], item: T) -> Future[R]:
    try:
        future.set_result(load(item))
    except Exception as error:
        future.set_exception(error)
    return future


def _give_way() -> None:
    """From now on this thread runs where no other wants to."""
    os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))


@cache
def gaps_can_be_used() -> bool:
    """The kernel has threads that give way, and lets us have one."""
    found: list[bool] = []

    def attempt() -> None:
        try:
            _give_way()
            found.append(True)
        except (AttributeError, OSError):
            found.append(False)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return found[0]
