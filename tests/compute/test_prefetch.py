"""Batches made ready in the background."""

import threading
from itertools import count, islice

import pytest

from pipeline.compute.prefetch import prefetched


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
def test_order_is_kept(ahead: int) -> None:
    assert list(prefetched(range(50), lambda item: item * item, ahead)) == [(item, item**2) for item in range(50)]
    assert list(prefetched([], lambda item: item, ahead)) == []


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
@pytest.mark.parametrize("bad", [0, 1, 7, 9])
def test_an_error_is_raised_where_its_item_would_come(ahead: int, bad: int) -> None:
    def load(item: int) -> int:
        if item == bad:
            raise ValueError("this one")
        return item

    taken = []
    with pytest.raises(ValueError, match="this one"):  # noqa: PT012 (what came before it counts)
        for item, _ in prefetched(range(10), load, ahead):
            taken.append(item)
    assert taken == list(range(bad))


def test_loading_runs_ahead_in_another_thread() -> None:
    """Both items in advance are loaded while nobody asks for the next."""
    threads, loaded = {}, threading.Semaphore(0)

    def load(item: int) -> int:
        threads[item] = threading.current_thread()
        loaded.release()
        return item

    stream = prefetched(range(100), load, 2)
    next(stream)
    for _ in range(3):
        assert loaded.acquire(timeout=300)
    assert threading.current_thread() not in threads.values()
    stream.close()
    assert len(threads) == 3


def test_without_loading_ahead_the_caller_loads() -> None:
    threads = {}
    stream = prefetched(range(100), lambda item: threads.setdefault(item, threading.current_thread()), 0)
    next(stream)
    assert threads == {0: threading.current_thread()}


def test_whoever_stops_early_leaves_nothing_behind() -> None:
    loaded: list[int] = []
    stream = prefetched(count(), lambda item: loaded.append(item) or item, 20)
    assert [item for item, _ in islice(stream, 3)] == [0, 1, 2]
    stream.close()
    assert len(loaded) <= 3 + 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
