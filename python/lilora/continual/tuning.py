"""Choosing a learning rate, and other settings, by successive halving (arXiv 1502.07943) over the tasks of a sequence."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, JsonValue

from lilora.bank.atomic import write_atomically
from lilora.reports.plotting import PLOT_STYLE, MethodStyle, draw_legend, legend_height, png

from .task_sequence import ScoredOn

FILE = "tune.json"
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEED = 100  # of what is drawn: none that is usually reported


class Candidate(BaseModel):
    """What is tried: a learning rate, and settings of the method."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float
    settings: dict[str, JsonValue] = {}

    def __str__(self) -> str:
        return ", ".join([f"lr {self.learning_rate:g}", *(f"{key} {value}" for key, value in self.settings.items())])


class Result(BaseModel):
    """What a candidate reached on the first `tasks` tasks.

    ap: mean score of these tasks after the last of them, in points. nll: the same of the references' negative log-likelihood,
    in nats per token; None where tasks have no answers. Both are None for a training that diverged; `diverged` says how.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    candidate: Candidate
    tasks: int
    ap: float | None = None
    nll: float | None = None
    seconds: float | None = None
    diverged: str | None = None

    def rank(self) -> tuple[float, float]:
        """Smaller is better: by points and, where these are equal, by likelihood."""
        return (
            math.inf if self.ap is None else -self.ap,
            math.inf if self.nll is None else self.nll,
        )


class Tuning(BaseModel):
    """The content of tune.json: what was tried, with which options, and what won. seed: of all runs here. scored_on: the
    samples that the points are of; earlier versions took those of the test splits, and did not say so."""

    model_config = ConfigDict(extra="forbid")

    tasks: list[str]
    seed: int
    scored_on: ScoredOn = "test"
    options: dict[str, JsonValue]
    best: Result | None = None
    results: list[Result] = []

    def find(self, candidate: Candidate, tasks: int) -> Result | None:
        return next((r for r in self.results if r.candidate == candidate and r.tasks == tasks), None)


class Round(NamedTuple):
    """How many candidates are trained, each on how many tasks in all."""

    candidates: int
    tasks: int


def rounds(candidates: int, first: int, tasks: int) -> list[Round]:
    """All candidates on the first tasks, half of them on twice as many, and so on, until one is left or all tasks are trained.

    They depend on these numbers alone: methods that are tuned with equally many candidates have equal budgets.
    """
    plan = [Round(candidates, min(first, tasks))]
    while plan[-1].tasks < tasks and plan[-1].candidates > 2:
        plan.append(Round(math.ceil(plan[-1].candidates / 2), min(2 * plan[-1].tasks, tasks)))
    return plan


def halving(
    candidates: Sequence[Candidate], plan: Sequence[Round], measure: Callable[[Candidate, int], Result]
) -> Iterator[list[Result]]:
    """The ranking of each round, the best first; only the best go on to the next.

    measure(candidate, tasks): its result on so many tasks; a later call for the same candidate goes on with its run.
    """
    left = list(candidates)
    for number, tasks in plan:
        ranking = sorted((measure(candidate, tasks) for candidate in left[:number]), key=Result.rank)
        yield ranking
        left = [result.candidate for result in ranking]


def write_tuning(out: Path, tuning: Tuning) -> None:
    """Write tune.json into the folder `out` and, once there is a best, tune.png."""
    write_atomically(out / FILE, f"{tuning.model_dump_json(indent=1)}\n".encode())
    if tuning.best is not None:
        with matplotlib.rc_context(PLOT_STYLE):
            write_atomically(out / "tune.png", png(_figure(tuning)))


def _figure(tuning: Tuning) -> Figure:
    """Points over learning rates, a line for each number of tasks and, where settings were tried, each of their values."""
    lines: dict[str, list[Result]] = {}
    for result in tuning.results:
        settings = [f"{key} {value}" for key, value in result.candidate.settings.items()]
        lines.setdefault(", ".join([f"{result.tasks} tasks", *settings]), []).append(result)
    figure = Figure(figsize=(6, 3.2 + legend_height(6, list(lines))), layout="constrained")
    axes = figure.subplots()
    for index, (name, results) in enumerate(lines.items()):
        shown = sorted((r.candidate.learning_rate, r.ap) for r in results if r.ap is not None)
        rates, points = zip(*shown, strict=True) if shown else ((), ())
        axes.plot(rates, points, label=name, clip_on=False, zorder=3, markersize=5, **MethodStyle.of(index).line())
    top = max(100, *(result.ap for result in tuning.results if result.ap is not None), 0)  # CIDEr goes beyond
    axes.set(xscale="log", ylim=(0, top), xlabel="learning rate", ylabel="mean score over the tasks, in points")
    axes.grid(axis="y", color="0.88")
    draw_legend(figure, axes)
    return figure
