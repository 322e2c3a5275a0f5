"""The report of continual-learning runs: plots (PNG), metrics (JSON), one self-contained HTML page, terminal tables."""

import base64
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import matplotlib
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lilora.bank.atomic import write_atomically
from lilora.terminal import millions

from .figures import curves, heatmap, losses, memory, routing, summary
from .plotting import PLOT_STYLE, MethodStyle, cell_colours, png
from .runs import (
    CARRIED,
    NLL,
    VALIDATION,
    MethodRuns,
    Run,
    by_method,
    differences,
    heading,
    nll_rows,
    scored_on,
    undefined_notes,
    without_nan,
)
from .scores import METRICS

BEFORE = "(before)"  # no task has such a name


def write_report(
    out: Path, runs: list[Run], title: str = "Continual learning", environment: dict[str, Any] | None = None
) -> Path:
    """Write report.html, metrics.json, summary.png, curves.png and heatmap-<method>.png into the folder `out`.

    Runs that recorded it get losses.png and memory.png, too. Seeds of one method are averaged; the spread is the sample
    standard deviation. All runs must have trained the same tasks in the same order. `environment` is a flat record of
    versions and hardware to print. Everything is rendered before the first file is written, each file is replaced in one
    step, the page last. Returns the page's path.
    """
    methods = by_method(runs)
    notes = undefined_notes(runs)
    numbers = {
        "title": title,
        "tasks": runs[0].matrix.tasks,
        "definitions": {name: METRICS[name].definition for name in methods[0].metrics},
        "methods": {
            method.name: {name: without_nan(spread._asdict()) for name, spread in method.metrics.items()}
            for method in methods
        },
        "undefined": notes,
        "runs": [run.to_dict() for run in runs],
        "environment": environment or {},
    }
    metrics_file = json.dumps(numbers, indent=1, allow_nan=False).encode()
    with matplotlib.rc_context(PLOT_STYLE):
        scored = methods[0].columns
        figures = {"summary.png": summary(methods), "curves.png": curves(methods)} if scored else {}
        if any(run.losses for run in runs):
            figures["losses.png"] = losses(methods)
        if any(method.sizes for method in methods):
            figures["memory.png"] = memory(methods)
        figures |= {method.heatmap_file: heatmap(method) for method in methods if scored}
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
        columns=scored,
        unscored=runs[0].matrix.unscored,
        scored_on=VALIDATION if scored_on(runs[0]) == "validation" else "",
        runs=runs,
        notes=notes,
        differences=differences(runs),
        carried_note=CARRIED,
        before=BEFORE,
        nlls=nll_rows(methods),
        nll_caption=NLL,
        environment=environment or {},
        images={name: base64.b64encode(data).decode() for name, data in pictures.items()},
        widths={name: round(100 * figure.get_figwidth()) for name, figure in figures.items()},
        swatch=lambda method: markupsafe.Markup(MethodStyle.of(method.index).svg()),
        cell_colours=cell_colours,
        millions=millions,
        duration=_duration,
    )
    out = Path(out)
    for name, data in (pictures | {"metrics.json": metrics_file, "report.html": page.encode()}).items():
        write_atomically(out / name, data)
    return out / "report.html"


def print_tables(runs: list[Run], console: Console) -> None:
    """Print the metrics of each method, then its score matrix (mean over seeds), to the terminal."""
    methods = by_method(runs)
    if unscored := runs[0].matrix.unscored:
        console.print(f"not scored, for want of a test split: {', '.join(unscored)}")
    if scored_on(runs[0]) == "validation":
        console.print(VALIDATION)
    if not methods[0].columns:
        _print_probes(methods, console)
        return
    console.print("metrics in points, mean±standard deviation over seeds")
    of_method = {m.name: [str(metric).replace(" ", "") for metric in m.metrics.values()] for m in methods}
    _print_table(console, "method", list(map(heading, methods[0].metrics)), of_method)
    for method in methods:
        console.print(f"{method.name}: score on each task (column) after each stage (row)")
        rows = zip((BEFORE, *method.tasks), (method.before(), *method.cells()), strict=True)
        _print_table(console, "after", method.columns, {name: [text for text, _ in row] for name, row in rows})
    _print_probes(methods, console)
    if any(method.any_carried() for method in methods):
        console.print(CARRIED)
    if (nlls := nll_rows(methods)) is not None:
        headings, rows = nlls
        console.print(NLL)
        _print_table(console, "method", headings, rows)
    for note in undefined_notes(runs):
        console.print(f"n/a: {note}")
    for name, values in differences(runs).items():
        console.print(f"differs: {name} is " + ", ".join(f"{value} in {method}" for method, value in values.items()))


def _print_probes(methods: list[MethodRuns], console: Console) -> None:
    for method in methods:
        if not (rows := method.probes()):
            continue
        console.print(f"{method.name}: score on each probe (row), never trained, before and after each stage (column)")
        _print_table(console, "probe", [BEFORE, *method.tasks, "change"], rows)


def print_routes(routes: Mapping[str, Mapping[str, int]], tasks: Sequence[str], console: Console) -> None:
    """Print how many samples of each task (row) were routed to each of `tasks` (column)."""
    console.print("samples of each task (row) by the task that they were routed to (column)")
    rows = {task: [str(counts.get(other, 0)) for other in tasks] for task, counts in routes.items()}
    _print_table(console, "of", tasks, rows)


def _print_table(console: Console, first: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Print rows of numbers by name, in parts of as many columns as the console has room for.

    A row may end early, and is left out of a part in which it has no number.
    """

    options = console.options.update(width=10_000)

    def part(end: int, narrow: bool) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        shown = {name: cells[start:end] for name, cells in rows.items() if cells[start:end]}
        most = _longest_word(first, *shown) if narrow else console.width
        table.add_column(first, overflow="fold", max_width=min(most, console.width // 2))
        for column, *cells in itertools.zip_longest(columns[start:end], *shown.values(), fillvalue=""):
            least = min(_longest_word(column, *cells), 16)
            table.add_column(
                column, justify="right", overflow="fold", min_width=least, max_width=least if narrow else 16
            )
        for name, cells in shown.items():
            table.add_row(name, *cells)
        return table

    def fits(table: Table) -> bool:
        return Measurement.get(console, options, table).maximum <= console.width

    start = 0
    while start < len(columns):
        end = start + 1
        while end < len(columns) and fits(part(end + 1, narrow=True)):
            end += 1
        wide = part(end, narrow=False)
        console.print(wide if fits(wide) else part(end, narrow=True))
        start = end


def _longest_word(*texts: str) -> int:
    return max(len(word) for text in texts for word in text.split() or [""])


def _best(methods: list[MethodRuns]) -> dict[str, float]:
    """The best mean of each metric that tells methods apart."""
    best = {}
    for name in methods[0].metrics:
        means = [method.metrics[name].mean for method in methods if not math.isnan(method.metrics[name].mean)]
        if len(set(means)) > 1:
            best[name] = max(means) if METRICS[name].higher_is_better else min(means)
    return best


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def write_routes(out: Path, routes: Mapping[str, Mapping[str, int]]) -> Path:
    """Write routes.png into the folder `out`: of each task (row) the percentage of its samples routed to each (column)."""
    with matplotlib.rc_context(PLOT_STYLE):
        write_atomically(out / "routes.png", png(routing(routes)))
    return out / "routes.png"
