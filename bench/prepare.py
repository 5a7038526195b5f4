"""`prepare_ctr` on raw files in Ali-CCP's format: CPU time per row, start-up time, and memory at two sizes."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from bench.figures import RATE, ROOT, figure, report
from bench.workshop import Workshop

SMALL, LARGE, USERS, TURNS = 200_000, 2_000_000, 700_000, 2
LAUNCHER = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Used(NamedTuple):
    cpu_seconds: float  # the command and its child processes
    peak_mb: float


def prepare_ctr(shop: Workshop) -> None:
    """Rows per CPU second, from the slope between two sizes. Fixed costs (imports, users) are a separate figure."""
    raw = {rows: _raw(shop.folder, rows) for rows in (SMALL, LARGE)}
    runs_of: dict[int, list[Used]] = {SMALL: [], LARGE: []}
    for _ in range(TURNS):
        for rows, runs in runs_of.items():
            runs.append(_used(raw[rows], shop.folder))
    slopes = [
        (LARGE - SMALL) / (large.cpu_seconds - small.cpu_seconds)
        for small, large in zip(runs_of[SMALL], runs_of[LARGE], strict=True)
    ]
    report("prepare_ctr", slopes, RATE)
    fixed = [small.cpu_seconds - SMALL / slope for small, slope in zip(runs_of[SMALL], slopes, strict=True)]
    report("prepare_ctr_start_s", fixed, "CPU s without a row: imports, 700,000 users")
    peaks = {rows: [used.peak_mb for used in runs] for rows, runs in runs_of.items()}
    ratios = [large / small for small, large in zip(peaks[SMALL], peaks[LARGE], strict=True)]
    figure("prepare_ctr_rss_mb", max(peaks[LARGE]), "MB at 2M rows, reference: at 0.2M",
           statistics.median(peaks[SMALL]), ratios)  # fmt: skip


def _raw(folder: Path, rows: int) -> Path:
    from bench.raw_aliccp import SKELETON_FILE, write_raw
    from pipeline.storage.folders import made_once

    return made_once(folder / f"raw-{rows}", [SKELETON_FILE], lambda work: write_raw(work, rows, USERS, 0), "FOLDER")


def _used(raw: Path, folder: Path) -> Used:
    output = folder / "prepared"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline", "prepare_ctr", "--data", str(raw), "--output_dir", str(output),
               "--schema", str(ROOT / "configs/data/aliccp.yaml"), "--runs_dir", str(folder / "outputs"),
               "--tracking.enabled", "false"]  # fmt: skip
    # start it from a small process, because a child's peak memory begins with that of its parent
    launcher = [sys.executable, "-c", LAUNCHER, *command]
    launched = subprocess.run(launcher, cwd=ROOT, check=False, capture_output=True, encoding="utf-8")
    if launched.returncode:
        lines = launched.stderr.strip().splitlines()
        raise RuntimeError(f"prepare_ctr ended with code {launched.returncode}: {lines[-1] if lines else ''}")
    shutil.rmtree(output)
    seconds, peak = json.loads(launched.stdout.splitlines()[-1])
    return Used(seconds, peak * 1024 / 1e6)
