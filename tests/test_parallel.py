"""Work divided among threads."""

import ctypes
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from pipeline import parallel
from pipeline.interrupts import Interrupted, check, interruptible
from pipeline.parallel import alone, at_once, divide, parts_of, shared, spread


@pytest.fixture(params=["torch's threads", "a pool"], autouse=True)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "a pool":  # as where torch has another OpenMP
        monkeypatch.setattr(parallel, "_team", lambda: None)
    elif parallel._team() is None:
        pytest.skip("torch has no GNU OpenMP here")


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_each_part_is_done_once(parts: int) -> None:
    done = np.zeros(parts, int)

    def work(part: int) -> None:
        done[part] += 1

    for _ in range(20):
        at_once(work, parts)
    assert done.tolist() == [20] * parts


def test_parts_run_beside_each_other() -> None:
    both = threading.Barrier(2, timeout=30)  # broken unless two threads wait at the same time
    at_once(lambda _: both.wait(), 2)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_any_part_is_raised(failing: int) -> None:
    def work(part: int) -> None:
        if part == failing:
            raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match=f"part {failing}"):
        at_once(work, 2)
    at_once(lambda _: None, 2)  # and the threads are still there


def test_several_threads_divide_work_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def total(size: int) -> int:
        found = np.zeros(size, int)

        def work(first: int, last: int) -> None:
            found[first:last] += np.arange(first, last)

        for _ in range(20):
            shared(work, size)
        return int(found.sum())

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(total, [5000, 6000, 7000])) == [20 * (n * (n - 1) // 2) for n in (5000, 6000, 7000)]


@njit
def _add(found: Any, amount: float, first: int, last: int) -> None:
    for place in range(first, last):
        found[place] += amount + place


@njit(nogil=True)
def _add_all(how: Any, given: Any) -> None:
    divide(how, _add, given)


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_divided_items_are_done_once(size: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: parts)
    found = np.zeros(size)
    for _ in range(20):
        spread(_add_all, size, (found, 0.5), values=10**6)
    assert found.tolist() == [20 * (0.5 + place) for place in range(size)]


def test_divided_parts_run_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GNU OpenMP itself numbers them."""
    team = parallel._team()
    if team is None:
        pytest.skip("on one thread here")
    inside = ctypes.CFUNCTYPE(ctypes.c_int)(("omp_get_num_threads", team.inside))

    @njit(nogil=True)
    def all_of(how: Any, given: Any) -> None:
        divide(how, count, given)

    @njit
    def count(found: Any, first: int, last: int) -> None:
        for place in range(first, last):
            found[place] = inside()

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = np.zeros(2)
    spread(all_of, 2, (found,), values=10**6)
    assert found.tolist() == [2, 2]
    alone(lambda _: spread(all_of, 2, (found,), values=10**6))(None)
    assert found.tolist() == [1, 1]  # within what has a thread to itself


def test_alone_holds_for_its_thread_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    def fail(_: object) -> None:
        assert parts_of(10**6) == 1
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(parts_of, 10**6).result() == 4
        raise ValueError("as it came")

    with pytest.raises(ValueError, match="as it came"):
        alone(fail)(None)
    assert parts_of(10**6) == 4
    assert parts_of(1500) == 1


@njit
def _fail(found: Any, first: int, last: int) -> None:
    for place in range(first, last):
        found[place] = 1
        if place == 3:
            raise ValueError


@njit(nogil=True)
def _fail_all(how: Any, given: Any) -> None:
    divide(how, _fail, given)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_part_that_fails_is_heard_of(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: parts)
    with pytest.raises(MemoryError, match="did not get the memory"):
        spread(_fail_all, 8, (np.zeros(8),), values=10**6)
    spread(_add_all, 8, (np.zeros(8), 0.5), values=10**6)  # and the threads are still there


def test_an_interrupt_loses_no_part() -> None:
    """Signals while two threads want the interpreter's lock, at any moment."""
    done, heard = np.zeros(2, int), 0
    random = np.random.Generator(np.random.PCG64(0))

    def work(part: int) -> None:
        total = 0
        for number in range(3000):
            total += number
        done[part] += 1

    for _ in range(150):
        timer = threading.Timer(random.uniform(0, 0.004), lambda: os.kill(os.getpid(), signal.SIGTERM))
        try:
            with interruptible():
                timer.start()
                while True:
                    done[:] = 0
                    at_once(work, 2)
                    assert done.tolist() == [1, 1]
                    check()
        except Interrupted:
            heard += 1
        timer.join()
    assert heard == 150
