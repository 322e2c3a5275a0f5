"""The report of continual-learning runs: plots (PNG), metrics (JSON), one self-contained HTML page, terminal tables."""

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lilora.bank.atomic import write_atomically
from lilora.errors import UserError
from lilora.terminal import plain_console

from .scores import METRICS, ScoreMatrix, cell_text, none_if_nan

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#4D4D4D", "#F0E442"]  # Okabe-Ito
_MARKERS = "osD^vPX*"
_CARRIED = "* carried over: the task's function is proved unchanged, so the cell was not run again"
PLOT_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "savefig.dpi": 150,
    "text.parse_math": False,  # a label is no formula
}


@dataclass(frozen=True)
class Run:
    """One method trained on the whole task sequence with one seed.

    `params_per_task` counts the parameters stored for each task, `seconds` is wall time, `extra` holds further
    JSON-able facts about the run.
    """

    method: str
    seed: int
    matrix: ScoreMatrix
    params_per_task: int | None = None
    seconds: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "matrix": self.matrix.to_dict(), "metrics": _without_nan(self.matrix.metrics())}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_dict`; the metrics are computed again from the matrix."""
        fields = {name: value for name, value in data.items() if name != "metrics"}
        return cls(**fields | {"matrix": ScoreMatrix.from_dict(data["matrix"])})


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; the deviation of a single seed is NaN."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: list[float]) -> Self:
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan)

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "n/a"
        mean = f"{self.mean:.1f}".replace("-0.0", "0.0")
        return mean if math.isnan(self.deviation) else f"{mean} ± {self.deviation:.1f}"


class _Method:
    """The runs of one method, one per seed, and what they give together."""

    def __init__(self, name: str, runs: list[Run], index: int):
        self.name, self.runs = name, runs
        self.colour = COLOURS[index % len(COLOURS)]
        # Of a line: 24 methods look different.
        self.style = {"color": self.colour, "marker": _MARKERS[index % len(_MARKERS)], "linewidth": 1.8}
        self.style["linestyle"] = ("-", "--", ":")[index // len(COLOURS) % 3]
        self.tasks = runs[0].matrix.tasks
        scores = np.stack([run.matrix.scores() for run in runs])  # [seed, stage, task]
        self.scores = scores.mean(axis=0)
        self.deviation = scores.std(axis=0, ddof=1) if len(runs) > 1 else np.full_like(self.scores, np.nan)
        metrics = [run.matrix.metrics() for run in runs]
        self.metrics = {name: Spread.of([values[name] for values in metrics]) for name in metrics[0]}
        params = [run.params_per_task for run in runs]
        self.params_per_task = None if None in params else round(np.mean(params))
        sizes = [run.extra.get("sizes") for run in runs]
        self.sizes = None if None in sizes else {n: np.mean([size[n] for size in sizes], 0) for n in sizes[0]}
        seconds = [run.seconds for run in runs]
        self.seconds = None if None in seconds else float(np.mean(seconds))

    def carried(self, stage: int, task: int) -> bool:
        after, name = self.tasks[stage], self.tasks[task]
        return any(run.matrix.carried_from(after, name) is not None for run in self.runs)

    def rows(self) -> list[list[tuple[str, str, str]]]:
        """(text, background, text colour) of each cell of the mean matrix, a row per stage."""
        matrix = self.runs[0].matrix

        def cell(j: int, i: int) -> tuple[str, str, str]:
            return cell_text(self.scores[j, i], self.carried(j, i)), *cell_colours(self.scores[j, i])

        return [[cell(j, i) for i in range(len(matrix.scored(j)))] for j in range(len(self.tasks))]

    def any_carried(self) -> bool:
        return any(text.endswith("*") for row in self.rows() for text, *_ in row)

    @property
    def heatmap_file(self) -> str:
        return f"heatmap-{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.name).strip('-')}.png"


def write_report(
    out: Path, runs: list[Run], title: str = "Continual learning", environment: dict[str, Any] | None = None
) -> Path:
    """Write report.html, metrics.json, curves.png, summary.png and heatmap-<method>.png into the folder `out`.

    Seeds of one method are averaged; the spread is the sample standard deviation. All runs must have learned the same
    tasks in the same order. `environment` is a flat record of versions and hardware to print. Everything is rendered
    before the first file is written, each file is replaced in one step, the page last. Returns the page's path.
    """
    methods = _by_method(runs)
    notes = _notes(runs)
    numbers = {
        "title": title,
        "tasks": runs[0].matrix.tasks,
        "definitions": {name: METRICS[name].definition for name in methods[0].metrics},
        "methods": {
            method.name: {name: _without_nan(spread._asdict()) for name, spread in method.metrics.items()}
            for method in methods
        },
        "undefined": notes,
        "runs": [run.to_dict() for run in runs],
        "environment": environment or {},
    }
    metrics_file = json.dumps(numbers, indent=1, allow_nan=False).encode()
    with matplotlib.rc_context(PLOT_STYLE):
        figures = {"summary.png": _summary(methods), "curves.png": _curves(methods)}
        if any(method.sizes for method in methods):
            figures["memory.png"] = _memory(methods)
        figures |= {method.heatmap_file: _heatmap(method) for method in methods}
        pictures = {name: png(figure) for name, figure in figures.items()}
    template = jinja2.Template(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = template.render(
        title=title,
        methods=methods,
        metrics=runs[0].matrix.definitions,
        unseen=runs[0].matrix.unseen,
        best=_best(methods),
        tasks=runs[0].matrix.tasks,
        runs=runs,
        notes=notes,
        carried_note=_CARRIED,
        environment=environment or {},
        images={name: base64.b64encode(data).decode() for name, data in pictures.items()},
        widths={name: round(100 * figure.get_figwidth()) for name, figure in figures.items()},
        millions=_millions,
        duration=_duration,
    )
    out = Path(out)
    for name, data in (pictures | {"metrics.json": metrics_file, "report.html": page.encode()}).items():
        write_atomically(out / name, data)
    return out / "report.html"


def print_tables(runs: list[Run], console: Console | None = None) -> None:
    """Print the metrics of each method, then its score matrix (mean over seeds), to the terminal."""
    console = console or plain_console()
    methods = _by_method(runs)
    console.print("metrics in points, mean±standard deviation over seeds")
    table = _table("method", map(_heading, methods[0].metrics), min_width=9)
    for method in methods:
        table.add_row(method.name, *(str(metric).replace(" ", "") for metric in method.metrics.values()))
    _print(table, console)
    for method in methods:
        console.print(f"{method.name}: score on each task (column) after each stage (row)")
        table = _table("after", method.tasks)
        for after, row in zip(method.tasks, method.rows(), strict=True):
            table.add_row(after, *(text for text, *_ in row))
        _print(table, console)
    if any(method.any_carried() for method in methods):
        console.print(_CARRIED)
    for note in _notes(runs):
        console.print(f"n/a: {note}")


def print_routes(routes: Mapping[str, Mapping[str, int]], tasks: Sequence[str], console: Console) -> None:
    """Print how many samples of each task (row) were routed to each of `tasks` (column)."""
    console.print("samples of each task (row) by the task that they were routed to (column)")
    table = _table("of", tasks)
    for task, counts in routes.items():
        table.add_row(task, *(str(counts.get(other, 0)) for other in tasks))
    _print(table, console)


def _table(first: str, columns: Iterable[str], min_width: int = 6) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold", min_width=min_width)
    return table


def _print(table: Table, console: Console) -> None:
    """Whole on a narrow terminal too, where rich would leave columns out."""
    least = Measurement.get(console, console.options.update(width=10_000), table).minimum
    console.print(table, width=max(console.width, least), crop=False)


def _by_method(runs: list[Run]) -> list[_Method]:
    """The runs grouped by method, in order of first appearance."""
    if not runs:
        raise UserError("report: there are no runs; train at least one method first")
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.matrix.tasks != runs[0].matrix.tasks:
            raise UserError(
                f"report: {run.method} learned {', '.join(run.matrix.tasks)} but {runs[0].method} learned "
                f"{', '.join(runs[0].matrix.tasks)}; report runs of one task order together"
            )
        if run.matrix.unseen != runs[0].matrix.unseen:
            raise UserError(
                f"report: of {run.method} and {runs[0].method}, one was scored on tasks before it learned them and one was "
                "not; report runs of one kind of manifest together"
            )
        seeds = groups.setdefault(run.method, {})
        if run.seed in seeds:
            raise UserError(f"report: {run.method} has two runs with seed {run.seed}; pass each run once")
        seeds[run.seed] = run
    methods = [_Method(name, list(seeds.values()), i) for i, (name, seeds) in enumerate(groups.items())]
    if len({method.heatmap_file for method in methods}) < len(methods):
        raise UserError(f"report: the methods {', '.join(groups)} differ only in punctuation; name them apart")
    return methods


def _notes(runs: list[Run]) -> list[str]:
    """Why a metric is n/a, once per cause with the runs it concerns."""
    concerned: dict[str, list[str]] = {}
    for run in runs:
        for why in run.matrix.undefined().values():
            concerned.setdefault(why, []).append(f"{run.method} seed {run.seed}")
    return [
        f"{why} ({'all runs' if len(names) == len(runs) else ', '.join(names)})" for why, names in concerned.items()
    ]


def _best(methods: list[_Method]) -> dict[str, float]:
    """The best mean of each metric that tells methods apart."""
    best = {}
    for name in methods[0].metrics:
        means = [method.metrics[name].mean for method in methods if not math.isnan(method.metrics[name].mean)]
        if len(set(means)) > 1:
            best[name] = max(means) if METRICS[name].higher_is_better else min(means)
    return best


def _heading(metric: str) -> str:
    return f"{metric} {'↑' if METRICS[metric].higher_is_better else '↓'}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _without_nan(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: none_if_nan(value) for name, value in numbers.items()}


def cell_colours(score: float) -> tuple[str, str]:
    """Background and text colour of a matrix cell; a missing one is grey."""
    if math.isnan(score):
        return "#d9d9d9", "#000000"
    red, green, blue, _ = colour = matplotlib.colormaps["viridis"](score / 100)
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2  # WCAG: black reads better above 0.18
    return matplotlib.colors.to_hex(colour), "#000000" if luminance > 0.18 else "#ffffff"


def png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def draw_matrix(axes: Axes, tasks: list[str], rows: list[list[tuple[str, str, str]]]) -> None:
    """Cells given as (text, background, text colour), a row and a column per task."""
    size = len(tasks)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    for j, row in enumerate(rows):
        for i, (text, background, colour) in enumerate(row):
            axes.add_patch(
                matplotlib.patches.Rectangle((i - 0.5, j - 0.5), 1, 1, facecolor=background, edgecolor="white")
            )
            axes.text(i, j, text, ha="center", va="center", color=colour, in_layout=False)
    axes.set_xticks(range(size), tasks, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), tasks)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _heatmap(method: _Method) -> Figure:
    """Score on each task (column) after each stage (row), mean over seeds."""
    size = len(method.tasks)
    figure = Figure(figsize=(2.4 + 0.75 * size, 1.9 + 0.5 * size), layout="constrained")
    axes = figure.subplots()
    draw_matrix(axes, method.tasks, method.rows())
    axes.set(xlabel="score on task", ylabel="after learning")
    seeds = f", mean of {len(method.runs)} seeds" if len(method.runs) > 1 else ""
    axes.set_title(f"{method.name}: score in points{seeds}", fontsize=11)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 100), "viridis")
    figure.colorbar(scale, ax=axes, shrink=0.8).outline.set_visible(False)
    if method.any_carried():
        figure.supxlabel(_CARRIED.replace(", so", ",\nso"), fontsize=8, x=0.01, ha="left")
    return figure


def write_routes(out: Path, routes: Mapping[str, Mapping[str, int]]) -> Path:
    """Write routes.png into the folder `out`: of each task (row) the percentage of its samples routed to each (column)."""
    tasks = list(routes)
    rows = []
    for counts in routes.values():
        shares = [100 * counts.get(task, 0) / sum(counts.values()) for task in tasks]
        rows.append([(cell_text(share), *cell_colours(share)) for share in shares])
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(2.4 + 0.75 * len(tasks), 1.9 + 0.5 * len(tasks)), layout="constrained")
        axes = figure.subplots()
        draw_matrix(axes, tasks, rows)
        axes.set(xlabel="routed to", ylabel="samples of")
        axes.set_title("Percentage of a task's test samples routed to each task", fontsize=11)
        write_atomically(out / "routes.png", png(figure))
    return out / "routes.png"


def _curves(methods: list[_Method]) -> Figure:
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
            axes.plot(stages, mean, label=method.name, clip_on=False, zorder=3, markersize=5, **method.style)
            axes.fill_between(stages, mean - deviation, mean + deviation, color=method.colour, alpha=0.18, linewidth=0)
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


def _memory(methods: list[_Method]) -> Figure:
    """Parameters, and ranks of a linear, that inference keeps beside the base model, over the tasks."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name, unit in zip(panels, ("parameters", "ranks"), (1e6, 1), strict=True):
        for method in methods:
            if method.sizes:
                stages = range(1, len(method.tasks) + 1)
                axes.plot(stages, method.sizes[name] / unit, label=method.name, markersize=4, **method.style)
        axes.set(xlabel="tasks learned", ylabel=f"millions of {name}" if unit > 1 else f"{name} of a linear")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.grid(axis="y", color="0.88")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _summary(methods: list[_Method]) -> Figure:
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
            color=[method.colour for method in methods],
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        for place, spread in zip(places, spreads, strict=True):
            reach = np.nansum([max(spread.mean, 0), spread.deviation])
            axes.text(reach + 3, place, "n/a" if math.isnan(spread.mean) else f"{spread.mean:.1f}", va="center")
        axes.set(title=_heading(name), xlim=(min(0, np.nanmin(means, initial=0) * 1.1), 128), xticks=(0, 50, 100))
        axes.grid(axis="x", color="0.88")
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(places, [method.name for method in methods])
    panels[0].invert_yaxis()
    return figure
