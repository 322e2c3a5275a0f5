"""The plots of a report."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .plotting import (
    CHARACTER,
    MethodStyle,
    draw_legend,
    draw_matrix,
    draw_scale,
    legend_height,
    matrix_size,
    panels_of,
    shortened,
    whole_ticks,
)
from .runs import CARRIED, MethodRuns, heading
from .scores import cell_text


def heatmap(method: MethodRuns) -> Figure:
    """Score on each task (column) after each stage (row), mean over seeds."""
    width, height = matrix_size(len(method.tasks), len(method.columns))
    figure = Figure(figsize=(2.4 + width, 1.9 + height), layout="constrained")
    axes = figure.subplots()
    draw_matrix(axes, method.tasks, method.columns, method.cells())
    axes.set(xlabel="score on task", ylabel="after training on")
    seeds = f", mean of {len(method.runs)} seeds" if len(method.runs) > 1 else ""
    axes.set_title(f"{shortened(method.name)}\nscore in points{seeds}", fontsize=11)
    draw_scale(figure, axes)
    if method.any_carried():
        figure.supxlabel(CARRIED.replace(", so", ",\nso"), fontsize=8, x=0.01, ha="left")
    return figure


def routing(routes: Mapping[str, Mapping[str, int]]) -> Figure:
    """Percentage of the samples of each task (row) that were routed to each task (column)."""
    tasks = list(routes)
    shares = [[100 * counts.get(task, 0) / sum(counts.values()) for task in tasks] for counts in routes.values()]
    width, height = matrix_size(len(tasks), len(tasks))
    figure = Figure(figsize=(2.4 + width, 1.9 + height), layout="constrained")
    axes = figure.subplots()
    draw_matrix(axes, tasks, tasks, [[(cell_text(share), share) for share in row] for row in shares])
    axes.set(xlabel="routed to", ylabel="samples of")
    axes.set_title("per cent of a task's samples\nrouted to each task", fontsize=11)
    return figure


def curves(methods: list[MethodRuns]) -> Figure:
    """One panel per task: its score at every stage that has one, a line per method; dotted: where it was trained."""
    tasks, unseen = methods[0].tasks, methods[0].runs[0].matrix.unseen
    shown = [tasks.index(task) for task in methods[0].columns]
    titles = [f"{i + 1}. {tasks[i]}" for i in shown]
    names = [method.name for method in methods]
    figure, panels = panels_of(titles, names, sharex=True, sharey=True)
    top = max(100, *(np.nanmax(method.scores, initial=0) for method in methods))  # CIDEr goes beyond
    for i, axes in zip(shown, panels, strict=True):
        first = 0 if unseen else i
        stages = np.arange(first + 1, len(tasks) + 1)
        if unseen:
            axes.axvline(i + 1, color="0.6", linestyle=":", linewidth=1)
        for method in methods:
            style = MethodStyle.of(method.index)
            mean, deviation = method.scores[first:, i], method.deviation[first:, i]
            axes.plot(stages, mean, label=method.name, clip_on=False, zorder=3, markersize=5, **style.line())
            axes.fill_between(stages, mean - deviation, mean + deviation, color=style.colour, alpha=0.18, linewidth=0)
        axes.set(xlim=(0.8, len(tasks) + 0.2), ylim=(0, top))
        whole_ticks(axes)
    figure.supxlabel("tasks so far", fontsize=10)
    figure.supylabel("score in points", fontsize=10)
    draw_legend(figure, panels[0])
    return figure


def losses(methods: list[MethodRuns]) -> Figure:
    """One panel per task: the training loss over its optimizer steps, those of several stages one after another."""
    tasks, names = methods[0].tasks, [method.name for method in methods]
    figure, panels = panels_of([f"{i}. {task}" for i, task in enumerate(tasks, 1)], names)
    for task, axes in zip(tasks, panels, strict=True):
        for method in methods:
            steps, loss = method.losses(task)
            style = MethodStyle.of(method.index).line() | {"linewidth": 1.2, "markevery": max(1, len(steps) // 8)}
            axes.plot(steps, loss, label=method.name, markersize=4, **style)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        whole_ticks(axes, 4)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    figure.supxlabel("optimizer steps", fontsize=10)
    figure.supylabel("training loss", fontsize=10)
    draw_legend(figure, panels[0])
    return figure


def memory(methods: list[MethodRuns]) -> Figure:
    """Parameters, and ranks of a linear, that inference keeps beside the base model, over the tasks."""
    shown = [method for method in methods if method.sizes]
    names = [method.name for method in shown]
    figure = Figure(figsize=(8, 2.8 + legend_height(8, names)), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name, unit in zip(panels, ("parameters", "ranks"), (1e6, 1), strict=True):
        for method in shown:
            stages, style = range(1, len(method.tasks) + 1), MethodStyle.of(method.index)
            axes.plot(stages, method.sizes[name] / unit, label=method.name, markersize=4, **style.line())
        axes.set(xlabel="tasks so far", ylabel=f"millions of {name}" if unit > 1 else f"{name} of a linear")
        axes.set_ylim(bottom=0)
        whole_ticks(axes)
        axes.grid(axis="y", color="0.88")
    draw_legend(figure, panels[0])
    return figure


def summary(methods: list[MethodRuns]) -> Figure:
    """One panel per metric, a bar per method with its spread over seeds."""
    shown = [
        name
        for name in ("Transfer", "Avg", "Last", "AP", "MAP", "New", "Forgetting", "MIF")
        if any(name in method.metrics and not math.isnan(method.metrics[name].mean) for method in methods)
    ] or ["New"]
    names = [shortened(method.name) for method in methods]
    width = 0.4 + CHARACTER * max(map(len, names)) + 1.75 * len(shown)
    figure = Figure(figsize=(width, 0.9 + 0.36 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False).flatten()
    places, styles = range(len(methods)), [MethodStyle.of(method.index) for method in methods]
    for name, axes in zip(shown, panels, strict=True):
        spreads = [method.metrics[name] for method in methods]
        means = np.array([spread.mean for spread in spreads])
        axes.barh(
            places,
            means,
            xerr=[spread.deviation for spread in spreads],
            color=[style.colour for style in styles],
            hatch=[style.hatch for style in styles],
            edgecolor="white",
            linewidth=0,
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        for place, spread in zip(places, spreads, strict=True):
            reach = np.nansum([max(spread.mean, 0), spread.deviation])
            axes.text(reach + 3, place, "n/a" if math.isnan(spread.mean) else f"{spread.mean:.1f}", va="center")
        right = max(128, 1.28 * np.nanmax(means, initial=0))  # CIDEr goes beyond 100
        axes.set(title=heading(name), xlim=(min(0, np.nanmin(means, initial=0) * 1.1), right), xticks=(0, 50, 100))
        axes.grid(axis="x", color="0.88")
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(places, names)
    panels[0].invert_yaxis()
    return figure
