"""The plots of an analysis of a bank."""

import re

import numpy as np
from matplotlib.figure import Figure

from .plotting import (
    COLOURS,
    draw_legend,
    draw_matrix,
    draw_scale,
    legend_height,
    matrix_size,
    name_ticks,
    panels_of,
    whole_ticks,
)
from .scores import cell_text


def _cells(values: np.ndarray) -> list[list[tuple[str, float] | None]]:
    """(text, points) of each cell of a matrix, the diagonal left out."""
    return [[None if i == j else (cell_text(x), x) for j, x in enumerate(row)] for i, row in enumerate(values)]


def heatmaps(tasks: list[str], matrices: list[tuple[str, np.ndarray, str]]) -> Figure:
    """(title, shares [T, T], what random ones have) of each matrix, one beside the other: row's task against column's."""
    width, height = matrix_size(len(tasks), len(tasks))
    figure = Figure(figsize=(1.5 + len(matrices) * max(0.8 + width, 3.6), 1.8 + height), layout="constrained")
    panels = figure.subplots(1, len(matrices), sharey=True)
    for (title, values, random), axes in zip(matrices, panels, strict=True):
        draw_matrix(axes, tasks, tasks, _cells(100 * values))
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
    labels = [label for name in overlap for label in (name, f"{name}, random")]
    figure, panels = panels_of(list(kinds), labels, sharey=True)
    for indices, axes in zip(kinds.values(), panels, strict=True):
        for name, colour, marker in zip(overlap, COLOURS, "os", strict=False):
            axes.plot(overlap[name][indices], color=colour, marker=marker, markersize=4, label=name)
            axes.axhline(expected[name][indices].mean(), color=colour, linestyle="--", label=f"{name}, random")
        axes.set(xlim=(-0.5, len(indices) - 0.5), ylim=(0, 103))
        whole_ticks(axes)
    figure.supxlabel("depth", fontsize=10)
    figure.supylabel("overlap of two tasks, %", fontsize=10)
    draw_legend(figure, panels[0])
    return figure


def drift_curves(tasks: list[str], drift: dict[str, np.ndarray]) -> Figure:
    """Change (per cent) and angle (degrees) of the shared factors after each task, factor -> [T, 4]."""
    labels = [f"{factor} since {since}" for factor in drift for since in ("first", "previous")]
    width = 2 * max(3.7, 0.8 + 0.24 * len(tasks))
    figure = Figure(figsize=(width, 3.3 + legend_height(width, labels)), layout="constrained")
    panels = figure.subplots(1, 2)
    for (factor, values), colour in zip(drift.items(), COLOURS, strict=False):
        for column, numbers in enumerate(values.T):
            style, since = (("-", "first"), (":", "previous"))[column % 2]
            panels[column // 2].plot(numbers, style, color=colour, marker="o", label=f"{factor} since {since}")
    for axes, label in zip(panels, ("change, % of the norm", "mean principal angle, degrees"), strict=True):
        name_ticks(axes, tasks)
        axes.set_title(label)
        axes.set_ylim(0, max(1, axes.get_ylim()[1]))
        axes.grid(axis="y", color="0.88")
    draw_legend(figure, panels[0])
    return figure
