"""Items made ready before they are asked for: in the background, in gaps, side by side."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any

import pytest
import torch

from pipeline import prefetch
from pipeline.parallel import parts_of
from pipeline.prefetch import gaps_can_be_used, in_advance, in_gaps, side_by_side

Way = Callable[..., Iterator[tuple[Any, Any]]]
WAYS: dict[str, Way] = {
    **{f"in advance {ahead}": partial(in_advance, ahead=ahead) for ahead in (1, 3, 20)},
    **{f"in gaps {ahead} {threads}": partial(in_gaps, ahead=ahead, threads=threads)
       for ahead in (1, 2, 20) for threads in (1, 2, 4) if gaps_can_be_used()},
    **{f"side by side {threads}": partial(side_by_side, threads=threads) for threads in (1, 2, 3)},
}  # fmt: skip
has_gaps = pytest.mark.skipif(not gaps_can_be_used(), reason="no threads that give way here")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


def test_order_is_kept(way: Way) -> None:
    assert list(way(range(50), lambda item: item * item)) == [(item, item * item) for item in range(50)]
    assert list(way([], lambda item: item)) == []


@pytest.mark.parametrize("bad", [0, 1, 7, 9])
def test_an_error_is_raised_where_its_item_would_come(way: Way, bad: int) -> None:
    def load(item: int) -> int:
        if item == bad:
            raise ValueError("this one")
        return item

    found = []
    with pytest.raises(ValueError, match="this one"):  # noqa: PT012 (what came before it counts)
        for item, _ in way(range(10), load):
            found.append(item)
    assert found == list(range(bad))


def test_whoever_stops_early_is_not_kept(way: Way) -> None:
    made: list[int] = []
    stream = way(count(), lambda item: made.append(item) or item)
    assert [item for item, _ in islice(stream, 3)] == [0, 1, 2]
    stream.close()
    time.sleep(0.05)  # what is in the making
    left = len(made)
    assert left <= 3 + 21
    time.sleep(0.05)
    assert len(made) == left


def test_in_advance_runs_ahead_by_so_many() -> None:
    made: list[int] = []
    stream = in_advance(range(100), lambda item: made.append(item) or item, 2)
    for _ in range(3):
        next(stream)
    stream.close()
    assert len(made) <= 3 + 2


@has_gaps
def test_items_in_gaps_are_made_by_a_thread_that_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    policies: dict[str, int] = {}

    def load(item: int) -> int:
        name = threading.current_thread().name
        policies[name] = os.sched_getscheduler(threading.get_native_id())
        assert parts_of(10**9) == 1  # the other threads are busy
        return item

    for _ in in_gaps(range(200), load, 2, 2):
        time.sleep(0.001)  # a gap
    background = [policy for name, policy in policies.items() if name.startswith("prefetch")]
    assert background == [os.SCHED_IDLE]
    assert all(policy != os.SCHED_IDLE for name, policy in policies.items() if not name.startswith("prefetch"))


@has_gaps
def test_without_a_gap_the_caller_makes_items_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A background that never gets a core: nothing is lost or doubled, and one patience is all that it costs."""
    monkeypatch.setattr(prefetch, "SIDE_BY_SIDE", 20)
    monkeypatch.setattr(prefetch, "FIRST_PATIENCE", 0.1)
    release = threading.Event()
    by: dict[str, list[int]] = {"caller": [], "background": []}

    def load(item: int) -> int:
        if threading.current_thread().name.startswith("prefetch"):
            by["background"].append(item)
            assert release.wait(30)
        else:
            by["caller"].append(item)
        return item * item

    stream = in_gaps(range(60), load, 2, 2)
    found = []
    for item, square in stream:
        found.append((item, square))
        if item == 50:
            release.set()
    assert found == [(item, item * item) for item in range(60)]
    assert sorted(by["caller"])[:50] == list(range(50))
    assert by["background"][0] == 0


@has_gaps
def test_the_next_item_is_made_while_one_is_waited_for() -> None:
    begun, makers = threading.Event(), {}

    def load(item: int) -> int:
        makers[item] = threading.current_thread().name
        if item == 0 and makers[0].startswith("prefetch"):
            begun.set()
            while 1 not in makers:
                time.sleep(0.001)
        return item

    stream = in_gaps(range(2), load, 2, 2)
    assert next(stream) == (0, 0)
    if begun.is_set():  # else the caller was first
        assert not makers[1].startswith("prefetch")
    assert next(stream) == (1, 1)
