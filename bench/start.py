"""Start-up time: of `--help`, and from the start of a process to its first logged step."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.figures import ROOT, report
from bench.workshop import STORE_FILE, Workshop

TURNS, EMBEDDED_ROWS = 5, 4_000_000


def first_step(shop: Workshop) -> None:
    """Seconds until `train_mmoe` prints its first JSON line, with an existing tracking store and with a new one."""
    cache, kept, fresh = (shop.folder / name for name in ("data_cache", "store", "fresh"))
    for folder in (kept, fresh):
        folder.mkdir(exist_ok=True)
    _until_first_step(cache, kept)  # creates data, store and caches
    report("first_step_s", [_until_first_step(cache, kept) for _ in range(TURNS)], "s")
    seconds = []
    for _ in range(TURNS):
        shutil.rmtree(fresh)
        fresh.mkdir()
        seconds.append(_until_first_step(cache, fresh))
    report("first_step_fresh_s", seconds, "s")


def _until_first_step(cache: Path, folder: Path) -> float:
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MLFLOW_RUN_ID")}
    command = [sys.executable, "-m", "pipeline", "train_mmoe", "--config", str(ROOT / "configs/mtl_mmoe.yaml"),
               "--data.embedded.cache", str(cache), "--output_dir", str(folder / "outputs")]  # fmt: skip
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        env=environment | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / STORE_FILE}", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout
    line = process.stdout.readline()
    seconds = time.perf_counter() - started
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate()
    if not line.startswith(b"{"):
        raise RuntimeError(f"train_mmoe ended with code {process.returncode} before its first step")
    return seconds


def help_text(_: object) -> None:
    """Seconds of `python -m pipeline --help`."""
    report("help_s", _timed(TURNS * 2, lambda: _run("--help")), "s")


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _timed(turns: int, work: Callable[[], None]) -> list[float]:
    work()
    seconds = []
    for _ in range(turns):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds
