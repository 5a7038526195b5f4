"""Cost of logging every step: two equal trainings alternate in one process, one tracked in SQLite, one untracked."""

import os
import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

from bench.figures import figure
from bench.workshop import Trainer, Workshop
from pipeline.storage.journal import read_points

PAIRS, STALLED_PAIRS, STEPS = 20, 6, 64


def logging(shop: Workshop) -> None:
    """Wall and CPU time of training, CPU time of the writer process per point, and wall time while it is stopped."""
    task = shop.task()
    with shop.tracked("logging, first") as first:
        first.log_metrics(0, {"loss_total": 0.0})
    with shop.tracked("logging") as run:
        tracked, plain = Trainer(task, run), Trainer(task, shop.untracked())
        _turns(tracked, plain, 1)
        wall, cpu, milliseconds = _turns(tracked, plain, PAIRS)
        figure("logging_cpu", milliseconds[1] * statistics.median(cpu), "CPU ms a step", milliseconds[1], cpu)
        figure("logging_wall", milliseconds[0] * statistics.median(wall), "ms a step", milliseconds[0], wall)
    spent = run.writer_cpu_seconds - first.writer_cpu_seconds
    points = sum(len(record["values"]) for record in read_points(run.journal.file))
    figure("logging_writer_cpu", 1e6 * spent / points, "us of the writer a point")
    with shop.tracked("logging, stalled") as run:
        tracked = Trainer(task, run)
        _turns(tracked, plain, 1)
        with _stopped(shop.writer_process):
            wall, _, milliseconds = _turns(tracked, plain, STALLED_PAIRS)
    figure("logging_wall_stalled", milliseconds[0] * statistics.median(wall), "ms a step, the writer stopped",
           milliseconds[0], wall)  # fmt: skip


def _turns(tracked: Trainer, plain: Trainer, pairs: int) -> tuple[list[float], list[float], tuple[float, float]]:
    """Ratios of wall time, ratios of CPU time, and the median (wall, CPU) milliseconds of an untracked step."""
    times_of: dict[Trainer, list[tuple[float, float]]] = {tracked: [], plain: []}
    for pair in range(pairs):
        for trainer in [tracked, plain][:: 1 if pair % 2 else -1]:
            times_of[trainer].append(trainer.advance(STEPS))
    walls, cpus = ([one[place] / other[place] for one, other in zip(times_of[tracked], times_of[plain], strict=True)]
                   for place in (0, 1))  # fmt: skip
    usual = tuple(1000 * statistics.median(times[place] for times in times_of[plain]) / STEPS for place in (0, 1))
    return walls, cpus, (usual[0], usual[1])


@contextmanager
def _stopped(process: int) -> Iterator[None]:
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)
