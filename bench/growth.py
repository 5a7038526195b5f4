"""Scaling of MMoE training: speed with the number of threads, time and memory with rows. Tracking is off."""

import statistics
from contextlib import ExitStack

from bench.child import Child
from bench.figures import figure
from bench.workshop import Workshop

THREAD_PAIRS, THREAD_STEPS = 9, 20
SIZES = (200_000, 1_000_000, 4_000_000)
SIZE_TURNS, SIZE_STEPS = 6, 64
REAL_ROWS = 42_300_000  # training rows of Ali-CCP
GIGABYTE = 1e9


def threads_2(shop: Workshop) -> None:
    """Rows per second of wall time at batch size 4096: two threads in total against one in total.

    `threads_2_prefetched`: against one training thread and one that prepares its batches (`training.threads: 1`).
    """
    ways = {"two": (2, "null"), "one": (1, 0), "prefetched": (1, 2)}
    with ExitStack() as stack:
        children = {
            name: stack.enter_context(Child(shop.data(), {
                "training.batch_size": 4096, "training.threads": threads, "training.prefetch": ahead,
            }, threads))
            for name, (threads, ahead) in ways.items()
        }  # fmt: skip
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(THREAD_PAIRS + 1):
            for name in list(ways)[:: 1 if turn % 2 else -1]:
                rate = THREAD_STEPS * 4096 / children[name].advance(THREAD_STEPS)["wall"]
                if turn:  # the first turn is not counted
                    rates[name].append(rate)
    for name, other in (("threads_2", "one"), ("threads_2_prefetched", "prefetched")):
        ratios = [faster / slower for faster, slower in zip(rates["two"], rates[other], strict=True)]
        figure(name, statistics.median(rates["two"]), "rows per second", statistics.median(rates[other]), ratios)


def rows(shop: Workshop) -> None:
    """Time per row at the largest of three sizes against the smallest; memory by linear regression on all three."""
    cpu: dict[int, list[float]] = {size: [] for size in SIZES}
    peaks, anonymous = {}, {}
    for size in SIZES:
        for made in shop.data(size).glob("*.arrow"):
            made.unlink()  # so that every size includes the one-time conversion of the Parquet files
    with ExitStack() as stack:
        children = {size: stack.enter_context(Child(shop.data(size), {}, 1)) for size in SIZES}
        read = {size: child.loaded["cpu"] for size, child in children.items()}
        for turn in range(SIZE_TURNS + 1):
            for size, child in sorted(children.items(), reverse=bool(turn % 2)):
                answer = child.advance(SIZE_STEPS)
                if turn:
                    cpu[size].append(answer["cpu"] / (SIZE_STEPS * 1024))
                peaks[size], anonymous[size] = answer["peak"], answer["anonymous"]
    ratios = [large / small for large, small in zip(cpu[SIZES[-1]], cpu[SIZES[0]], strict=True)]
    values = [1e6 * statistics.median(cpu[size]) for size in (SIZES[-1], SIZES[0])]
    figure("rows_time_ratio", values[0], "CPU us a row at 4M rows", values[1], ratios)
    slope, fixed = statistics.linear_regression(list(read), list(read.values()))
    figure("rows_reading_us", 1e6 * slope, f"CPU us a row to read it once, beside {fixed:.2f} s in all")
    for size in SIZES:
        figure(f"memory_{size // 1000}k_rows_mb", peaks[size] / 1e6, "MB, peak of the training process")
    slope, fixed = statistics.linear_regression(list(peaks), list(peaks.values()))
    figure("memory_bytes_per_row", slope, "bytes of peak memory a training row")
    figure("memory_42m_rows_gb", (fixed + slope * REAL_ROWS) / GIGABYTE, "GB, the three sizes' line at 42.3M rows")
    slope, fixed = statistics.linear_regression(list(anonymous), list(anonymous.values()))
    figure("memory_unmapped_42m_rows_gb", (fixed + slope * REAL_ROWS) / GIGABYTE, "GB of it that no file backs")
