"""The plots of a report."""

import math
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .plotting import draw_matrix, draw_scale, line_style
from .runs import CARRIED, MethodRuns, heading
from .scores import cell_text


def heatmap(method: MethodRuns) -> Figure:
    """Score on each task (column) after each stage (row), mean over seeds."""
    size = len(method.tasks)
    figure = Figure(figsize=(2.4 + 0.75 * size, 1.9 + 0.5 * size), layout="constrained")
    axes = figure.subplots()
    draw_matrix(axes, method.tasks, method.cells())
    axes.set(xlabel="score on task", ylabel="after learning")
    seeds = f", mean of {len(method.runs)} seeds" if len(method.runs) > 1 else ""
    axes.set_title(f"{method.name}: score in points{seeds}", fontsize=11)
    draw_scale(figure, axes)
    if method.any_carried():
        figure.supxlabel(CARRIED.replace(", so", ",\nso"), fontsize=8, x=0.01, ha="left")
    return figure


def routing(routes: Mapping[str, Mapping[str, int]]) -> Figure:
    """Percentage of the samples of each task (row) that were routed to each task (column)."""
    tasks = list(routes)
    shares = [[100 * counts.get(task, 0) / sum(counts.values()) for task in tasks] for counts in routes.values()]
    figure = Figure(figsize=(2.4 + 0.75 * len(tasks), 1.9 + 0.5 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    draw_matrix(axes, tasks, [[(cell_text(share), share) for share in row] for row in shares])
    axes.set(xlabel="routed to", ylabel="samples of")
    axes.set_title("Percentage of a task's test samples routed to each task", fontsize=11)
    return figure


def curves(methods: list[MethodRuns]) -> Figure:
    """One panel per task: its score at every stage that has one, a line per method; dotted: where it was learned."""
    tasks = methods[0].tasks
    size, columns = len(tasks), min(3, len(tasks))
    rows = math.ceil(size / columns)
    figure = Figure(figsize=(max(3.1 * columns, 4.5), 2.3 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    unseen = methods[0].runs[0].matrix.unseen
    for i, (task, axes) in enumerate(zip(tasks, panels, strict=False)):
        first = 0 if unseen else i
        stages = np.arange(first + 1, size + 1)
        if unseen:
            axes.axvline(i + 1, color="0.6", linestyle=":", linewidth=1)
        for method in methods:
            mean, deviation = method.scores[first:, i], method.deviation[first:, i]
            axes.plot(
                stages, mean, label=method.name, clip_on=False, zorder=3, markersize=5, **line_style(method.index)
            )
            axes.fill_between(
                stages,
                mean - deviation,
                mean + deviation,
                color=line_style(method.index)["color"],
                alpha=0.18,
                linewidth=0,
            )
        axes.set_title(f"{i + 1}. {task}")
        axes.set(xlim=(0.8, size + 0.2), ylim=(0, 100), xticks=range(1, size + 1))
        axes.tick_params(labelbottom=i + columns >= size)
        axes.grid(axis="y", color="0.88")
    for axes in panels[size:]:
        axes.set_visible(False)
    figure.supxlabel("tasks learned so far", fontsize=10)
    figure.supylabel("score in points", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=int(figure.get_figwidth() // 1.7), frameon=False)
    return figure


def memory(methods: list[MethodRuns]) -> Figure:
    """Parameters, and ranks of a linear, that inference keeps beside the base model, over the tasks."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name, unit in zip(panels, ("parameters", "ranks"), (1e6, 1), strict=True):
        for method in methods:
            if method.sizes:
                stages = range(1, len(method.tasks) + 1)
                axes.plot(
                    stages, method.sizes[name] / unit, label=method.name, markersize=4, **line_style(method.index)
                )
        axes.set(xlabel="tasks learned", ylabel=f"millions of {name}" if unit > 1 else f"{name} of a linear")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.grid(axis="y", color="0.88")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def summary(methods: list[MethodRuns]) -> Figure:
    """One panel per metric, a bar per method with its spread over seeds."""
    shown = [
        name
        for name in ("Transfer", "Avg", "Last", "AP", "MAP", "New", "Forgetting", "MIF")
        if any(name in method.metrics and not math.isnan(method.metrics[name].mean) for method in methods)
    ] or ["New"]
    figure = Figure(figsize=(1.6 + 1.75 * len(shown), 0.9 + 0.36 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False).flatten()
    places = range(len(methods))
    for name, axes in zip(shown, panels, strict=True):
        spreads = [method.metrics[name] for method in methods]
        means = np.array([spread.mean for spread in spreads])
        axes.barh(
            places,
            means,
            xerr=[spread.deviation for spread in spreads],
            color=[line_style(method.index)["color"] for method in methods],
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        for place, spread in zip(places, spreads, strict=True):
            reach = np.nansum([max(spread.mean, 0), spread.deviation])
            axes.text(reach + 3, place, "n/a" if math.isnan(spread.mean) else f"{spread.mean:.1f}", va="center")
        axes.set(title=heading(name), xlim=(min(0, np.nanmin(means, initial=0) * 1.1), 128), xticks=(0, 50, 100))
        axes.grid(axis="x", color="0.88")
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(places, [method.name for method in methods])
    panels[0].invert_yaxis()
    return figure
