"""Work divided among threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pipeline import parallel
from pipeline.parallel import at_once, shared


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
