"""Plots of a run, as PNG files."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.maths.arrays import Floats, Ints

MOST_ASPECTS = 100  # in a picture, those with the most labels; tables contain all
T = TypeVar("T", Ints, Sequence[int])


def calibration(curves: Mapping[str, tuple[Floats, Floats, Floats]], file: Path) -> None:
    """Plot observed against predicted rates, one panel per event; a calibrated model lies on the diagonal."""
    if not curves:
        return
    figure, axes = _figure(len(curves), len(curves))
    for axis, (event, (predicted, observed, _)) in zip(axes, curves.items(), strict=True):
        low = max(1e-6, min(predicted.min(), observed[observed > 0].min(initial=1.0)) / 2)
        axis.plot([low, 1], [low, 1], color="0.7", linewidth=1)
        axis.plot(predicted, np.maximum(observed, low), marker="o", markersize=4)
        axis.set(xscale="log", yscale="log", title=event, xlabel="predicted", ylabel="observed")
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def confusion(matrices: Mapping[str, Ints], names: Sequence[str], file: Path) -> None:
    """Plot confusion matrices [C, C] (rows: true classes), one panel each, coloured by the share of the row."""
    matrices = _largest(matrices, MOST_ASPECTS)
    figure, axes = _figure(len(matrices), 4)
    ticks = range(len(names))
    for axis, (title, counts) in zip(axes, matrices.items(), strict=True):
        shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (truth, predicted), count in np.ndenumerate(counts):
            share = shares[truth, predicted]
            text, colour = f"{count}\n{share:.1%}", "white" if share > 0.5 else "black"
            axis.text(predicted, truth, text, ha="center", va="center", color=colour)
        axis.set(xticks=ticks, yticks=ticks, xticklabels=names, yticklabels=names, xlabel="predicted", ylabel="truth")
        axis.set_title(title)
    figure.savefig(file, dpi=110)


def losses(history: Iterable[tuple[int, Mapping[str, float]]], file: Path) -> None:
    """Plot each logged loss and its moving average, one panel per loss; dashed lines mark where later losses begin."""
    curves: dict[str, tuple[array[float], array[float]]] = {}
    for step, metrics in history:
        for name, value in metrics.items():
            if name.startswith("loss_"):
                steps, values = curves.setdefault(name, (array("d"), array("d")))
                steps.append(step)
                values.append(value)
    if not curves:
        return
    beginnings = {steps[0] for steps, _ in curves.values()}
    figure, axes = _figure(len(curves), 3)
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        x, y = map(np.array, curve)
        axis.plot(x, y, color="C0", alpha=0.2, linewidth=0.6)
        width = max(1, len(y) // 100)
        axis.plot(x[width - 1 :], np.convolve(y, np.full(width, 1 / width), "valid"), color="C0")
        for beginning in beginnings - {min(beginnings)}:
            axis.axvline(beginning, color="C3", linestyle="--", linewidth=1)
        low, high = np.quantile(y, [0.005, 0.995])
        axis.set(title=name, xlabel="global step", ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-12))
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def sentiments(counts: Mapping[str, Sequence[int]], names: Sequence[str], file: Path) -> None:
    """Plot counts and shares of the sentiments, one row per aspect.

    counts: row name -> number of labels of each sentiment; the first row is the total of all aspects.
    """
    counts = _largest(counts, 1 + MOST_ASPECTS)
    figure, axes = _figure(2, 2)
    figure.set_figheight(1.7 + 0.26 * len(counts))
    values = np.array(list(counts.values()), dtype=np.float64)
    shares = values / np.maximum(1, values.sum(1, keepdims=True))
    aspect_counts = np.where(np.arange(len(values))[:, None] == 0, 0, values)  # the total would dwarf the aspects
    for axis, shown, title in ((axes[0], aspect_counts, "labelled cells"), (axes[1], shares, "share")):
        left = np.zeros(len(counts))
        for name, column, colour in zip(names, shown.T, ("C2", "C3", "0.65"), strict=True):
            axis.barh(range(len(counts)), column, left=left, color=colour, label=name)
            left += column
        axis.set(yticks=range(len(counts)), yticklabels=[], title=title)
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=6)
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_yticklabels([f"{row}: {int(total):,}" for row, total in zip(counts, values.sum(1), strict=True)])
    axes[1].set(xlim=(0, 1))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.savefig(file, dpi=110)


def _largest(counts: Mapping[str, T], most: int) -> dict[str, T]:
    """The entries with the largest sums, in their order. matplotlib reads text between two dollars as a formula."""
    largest = set(sorted(counts, key=lambda name: -int(np.sum(counts[name])))[:most])
    return {name.replace("$", r"\$"): counts[name] for name in counts if name in largest}


def _figure(panels: int, most_columns: int) -> tuple[Any, list[Any]]:
    """Create a figure; returns it with the axes of its panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(most_columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes[panels:]:
        axis.set_axis_off()
    return figure, axes[:panels]
