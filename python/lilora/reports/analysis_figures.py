"""The plots of an analysis of a bank."""

import math
import re

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from .plotting import COLOURS, draw_matrix, draw_scale
from .scores import cell_text


def _cells(values: np.ndarray) -> list[list[tuple[str, float] | None]]:
    """(text, points) of each cell of a matrix, the diagonal left out."""
    return [[None if i == j else (cell_text(x), x) for j, x in enumerate(row)] for i, row in enumerate(values)]


def heatmaps(tasks: list[str], matrices: list[tuple[str, np.ndarray, str]]) -> Figure:
    """(title, shares [T, T], what random ones have) of each matrix, one beside the other: row's task against column's."""
    size = len(tasks)
    figure = Figure(figsize=(len(matrices) * max(1.6 + 0.6 * size, 3.6), 1.8 + 0.45 * size), layout="constrained")
    panels = figure.subplots(1, len(matrices), sharey=True)
    for (title, values, random), axes in zip(matrices, panels, strict=True):
        draw_matrix(axes, tasks, _cells(100 * values))
        axes.set_title(f"{title}, %" + (f"\nrandom ones: {random}" if random else ""))
    figure.supylabel("task", fontsize=10)
    figure.supxlabel("against task", fontsize=10)
    draw_scale(figure, panels)
    return figure


def depth(layers: list[str], overlap: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> Figure:
    """Overlap by depth in per cent, name -> [L]: one panel per kind of linear, dashed what random subspaces have."""
    kinds: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        kinds.setdefault(re.sub(r"\b\d+\b", "*", layer), []).append(i)
    columns = min(3, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(max(3.1 * columns, 4.5), 2.3 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for (kind, indices), axes in zip(kinds.items(), panels, strict=False):
        for name, colour, marker in zip(overlap, COLOURS, "os", strict=False):
            axes.plot(overlap[name][indices], color=colour, marker=marker, markersize=4, label=name)
            axes.axhline(expected[name][indices].mean(), color=colour, linestyle="--", label=f"{name}, random")
        axes.set_title(kind, fontsize=7)
        axes.set(xlim=(-0.5, len(indices) - 0.5), ylim=(0, 103))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.grid(axis="y", color="0.88")
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    figure.supxlabel("depth", fontsize=10)
    figure.supylabel("overlap of two tasks, %", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    return figure


def drift_curves(tasks: list[str], drift: dict[str, np.ndarray]) -> Figure:
    """Change (per cent) and angle (degrees) of the shared factors after each task, factor -> [T, 4]."""
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for (factor, values), colour in zip(drift.items(), COLOURS, strict=False):
        for column, numbers in enumerate(values.T):
            style, since = (("-", "first"), (":", "previous"))[column % 2]
            panels[column // 2].plot(numbers, style, color=colour, marker="o", label=f"{factor} since {since}")
    for axes, label in zip(panels, ("change, % of the norm", "mean principal angle, degrees"), strict=True):
        axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_title(label)
        axes.set_ylim(0, max(1, axes.get_ylim()[1]))
        axes.grid(axis="y", color="0.88")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)
    return figure
