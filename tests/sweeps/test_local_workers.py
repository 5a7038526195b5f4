"""Which GPU each worker process of a sweep gets."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime.gpus import VARIABLE, visible_gpus
from pipeline.runtime.processes import Ended
from pipeline.sweeps.local_workers import LocalWorkers


class Process:
    """A worker that does nothing; it keeps what it was started with."""

    def __init__(self, *_: Any, environment: Mapping[str, str], **__: Any) -> None:
        self.environment, self.log = environment, None


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`idle(size, gpus)`: a pool of such workers."""
    monkeypatch.setattr("pipeline.sweeps.local_workers.ChildProcess", Process)
    return lambda size, gpus: LocalWorkers(size, tmp_path, gpus)


def devices(pool: LocalWorkers) -> list[str | None]:
    workers: Any = pool.workers
    return [worker.environment.get(VARIABLE) for worker in workers]


def test_workers_share_the_gpus_evenly(idle: Any) -> None:
    assert devices(idle(5, ["0", "1"])) == ["0", "1", "0", "1", "0"]
    assert devices(idle(2, ["GPU-aa", "GPU-bb", "GPU-cc"])) == ["GPU-aa", "GPU-bb"]


def test_a_worker_that_replaces_another_gets_its_gpu(idle: Any) -> None:
    pool = idle(3, ["0", "1", "2"])
    _, second, _ = pool.workers
    pool._handle(second, Ended(-9), None)
    assert devices(pool) == ["0", "2", "1"]


def test_without_gpus_the_environment_stays(idle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert devices(idle(2, [])) == ["", ""]
    monkeypatch.delenv(VARIABLE)
    assert devices(idle(2, [])) == [None, None]


@pytest.mark.parametrize(("text", "names"), [
    ("0,1", ["0", "1"]), (" 3 , 1", ["3", "1"]), ("GPU-1a,MIG-2b", ["GPU-1a", "MIG-2b"]), ("", []), ("-1", []),
    ("2,-1,3", ["2"]),
])  # fmt: skip
def test_gpus_named_by_the_environment(text: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert visible_gpus() == names


@pytest.mark.parametrize(("script", "names"), [
    ("echo GPU-1a; echo GPU-2b", ["GPU-1a", "GPU-2b"]), ("echo no devices were found; exit 6", []), (None, []),
])  # fmt: skip
def test_gpus_that_the_driver_lists(
    script: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The driver's tool is a script here; without it there is no driver."""
    if script:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        tool.chmod(0o755)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin" if script else str(tmp_path))
    assert visible_gpus() == names
