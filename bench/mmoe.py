"""The MMoE: speed of a step, and what logging every step costs."""

import itertools
import statistics
import time
from pathlib import Path

from bench.figures import PAIRS, Timed, figure, measured
from pipeline.config import load
from pipeline.console import Console
from pipeline.run import MemoryRun, MlflowRun, RunRequest, Writer
from pipeline.task import TOTAL
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.training import Training, Window

ROOT = Path(__file__).parent.parent
ROWS, BATCH, STEPS = 500_000, 1024, 300
WARMUP_STEPS = 30


def config_for(folder: Path) -> MmoeConfig:
    overrides = {
        "data.embedded.rows": ROWS,
        "data.embedded.cache": folder / "data",
        "training.batch_size": BATCH,
        "training.max_steps": STEPS + WARMUP_STEPS,
        "training.threads": 1,
        "loss.aux_focal.warmup_steps": 0,
        "tracking.log_model": "false",
    }
    return load(MmoeConfig, ROOT / "configs/mtl_mmoe.yaml", {key: str(value) for key, value in overrides.items()})


class Block:
    """A training of which only the steps are timed, in wall and in CPU seconds of this process."""

    def __init__(self, task: MmoeTask, run: MemoryRun | MlflowRun) -> None:
        self.training = Training(task, run, Console(0, quiet=True), "cpu")
        self.training.model.train()
        self.plan = task.plan(0)

    def steps(self, first: int, count: int) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for index in range(first, first + count):
            window = Window([self.plan[index]], ends_epoch=False)
            self.training._step(window, self.training._load(window))
        self.training.recorder.drain()
        return time.perf_counter() - wall, time.process_time() - cpu


def logging_overhead(task: MmoeTask, folder: Path) -> None:
    """Every step logged to SQLite against tracking switched off, in pairs of equal trainings, turn about."""
    wall, cpu, plain_walls, writer_cpu = [], [], [], []
    with Writer() as writer:
        for pair in range(PAIRS):
            taken: dict[str, tuple[float, float]] = {}
            for kind in ("tracked", "plain") if pair % 2 else ("plain", "tracked"):
                name = f"{kind} {pair}"
                run = MlflowRun(writer, RunRequest(name), folder / "runs") if kind == "tracked" else MemoryRun(name)
                block = Block(task, run)
                block.steps(0, WARMUP_STEPS)
                taken[kind] = block.steps(WARMUP_STEPS, STEPS)
                run.finish("FINISHED")
                if isinstance(run, MlflowRun):
                    writer_cpu.append(run.writer_cpu_seconds)
                    points = run.points
            wall.append(taken["tracked"][0] / taken["plain"][0])
            cpu.append(taken["tracked"][1] / taken["plain"][1])
            plain_walls.append(taken["plain"][0])
    milliseconds = 1000 * statistics.median(plain_walls) / STEPS
    figure("logging_wall", milliseconds * statistics.median(wall), "ms a step", milliseconds, wall)
    figure("logging_cpu", statistics.median(cpu), "trainer CPU, of the CPU without tracking", 1.0, cpu)
    spent = [later - earlier for earlier, later in itertools.pairwise(writer_cpu)]
    figure("logging_writer_cpu", 1e6 * statistics.median(spent) / points, "us of the writer a point")


def training_speed(task: MmoeTask) -> None:
    """Rows per CPU second of the trainer against forward and backward of the same model on one fixed batch."""
    block = Block(task, MemoryRun())
    batch = task.batch(block.plan[0])
    counts = task.counts(batch)

    def limit(count: int) -> float:
        started = time.process_time()
        for _ in range(count):
            task.losses(block.training.model, batch, counts, 1)[TOTAL].backward()
            block.training.model.zero_grad(set_to_none=True)
        return time.process_time() - started

    measured("mmoe_b1024", Timed(lambda: block.steps(0, 100)[1], 100 * BATCH), Timed(lambda: limit(100), 100 * BATCH))


def main(folder: Path) -> None:
    """All figures of the MMoE; `folder` is for data and runs."""
    task = MmoeTask(config_for(folder))
    training_speed(task)
    logging_overhead(task, folder)
