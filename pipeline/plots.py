"""Pictures of a run, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def _figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def calibration(curves: Mapping[str, tuple[Floats, Floats, Floats]], file: Path) -> None:
    """Predicted against observed rates, a panel an event; on the diagonal they agree."""
    if not curves:
        return
    figure, axes = _figure(len(curves))
    for axis, (event, (predicted, observed, _)) in zip(axes, curves.items(), strict=True):
        low = max(1e-6, min(predicted.min(), observed[observed > 0].min(initial=1.0)) / 2)
        axis.plot([low, 1], [low, 1], color="0.7", linewidth=1)
        axis.plot(predicted, np.maximum(observed, low), marker="o", markersize=4)
        axis.set(xscale="log", yscale="log", title=event, xlabel="predicted", ylabel="observed")
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def losses(history: Sequence[tuple[int, Mapping[str, float]]], file: Path) -> None:
    """Every logged loss over the steps, smoothed, a panel a loss; a line marks where a loss first joins in."""
    names = list(dict.fromkeys(name for _, values in history for name in values if name.startswith("loss_")))
    if not names:
        return
    first = {name: next(step for step, values in history if name in values) for name in names}
    gates = set(first.values()) - {min(first.values())}
    columns = min(3, len(names))
    figure, axes = _figure(columns, -(-len(names) // columns))
    for axis, name in zip(axes, names, strict=False):
        points = [(step, values[name]) for step, values in history if name in values]
        steps, values = np.array(points).T
        axis.plot(steps, values, color="C0", alpha=0.2, linewidth=0.6)
        width = max(1, len(values) // 100)
        axis.plot(steps[width - 1 :], np.convolve(values, np.full(width, 1 / width), "valid"), color="C0")
        for gate in gates:
            axis.axvline(gate, color="C3", linestyle="--", linewidth=1)
        low, high = np.quantile(values, [0.005, 0.995])
        axis.set(title=name, xlabel="global step", ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-12))
        axis.grid(alpha=0.3)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    figure.savefig(file, dpi=110)
