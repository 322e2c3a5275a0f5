"""The score matrix of a task sequence and the continual-learning metrics read from it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lilora.errors import UserError


@dataclass(frozen=True)
class Metric:
    """`value` reads a [T, T], NaN where a cell is missing, and the numbers of the tasks that are scored, in order."""

    definition: (
        str  # a[j][i] is the score on task i after training on task j, T the last task; i are tasks with a test split
    )
    higher_is_better: bool
    value: Callable[[np.ndarray, np.ndarray], float]
    before_last: bool = False  # only of the scored tasks before the last task
    unseen: bool | None = None  # only of matrices that hold tasks before they are trained (True), or do not (False)


METRICS = {
    # As ZSCL (arXiv 2303.06628) has them.
    "Transfer": Metric(
        "mean over tasks i > 1 of the mean over stages j < i of a[j][i]: before training on the task",
        True,
        lambda a, tasks: np.mean([a[:i, i].mean() for i in tasks if i]),
        before_last=True,
        unseen=True,
    ),
    "Avg": Metric(
        "mean over all stages j and tasks i of a[j][i]", True, lambda a, tasks: a[:, tasks].mean(), unseen=True
    ),
    "Last": Metric("mean over tasks i of a[T][i]", True, lambda a, tasks: a[-1, tasks].mean(), unseen=True),
    "AP": Metric(
        "mean over tasks i of a[T][i]: the score after the last task",
        True,
        lambda a, tasks: a[-1, tasks].mean(),
        unseen=False,
    ),
    "MAP": Metric(
        "mean over stages j of the mean of a[j][i] over the tasks i trained by then",
        True,
        lambda a, tasks: np.mean([a[j, tasks[tasks <= j]].mean() for j in range(tasks[0], len(a))]),
        unseen=False,
    ),
    "BWT": Metric(
        "mean over i < T of a[T][i] - a[i][i]",
        True,
        lambda a, tasks: (a[-1] - a.diagonal())[tasks[tasks < len(a) - 1]].mean(),
        before_last=True,
    ),
    "Forgetting": Metric(
        "mean over i < T of a[i][i] - a[T][i]",
        False,
        lambda a, tasks: (a.diagonal() - a[-1])[tasks[tasks < len(a) - 1]].mean(),
        before_last=True,
    ),
    "Forgetting_max": Metric(
        "mean over i < T of (max over j of a[j][i]) - a[T][i]",
        False,
        lambda a, tasks: np.mean([a[i:, i].max() - a[-1, i] for i in tasks if i < len(a) - 1]),
        before_last=True,
    ),
    "New": Metric(
        "mean over tasks i of a[i][i]: the score right after training on the task",
        True,
        lambda a, tasks: a.diagonal()[tasks].mean(),
    ),
    "MIF": Metric(
        "percentage of answers in the instructed format after the last task, mean over the tasks that instruct one",
        True,
        lambda formats, tasks: formats[-1, tasks].mean(),
        unseen=False,
    ),
}


class ScoreMatrix:
    """Scores a[j][i], in points from 0 to 100 (CIDEr to 1000), on task i after training on task j, for i no later than j.

    `tasks` is the training order; with `unseen`, stages score the tasks that come later too. `unscored` are tasks without a
    test split: stages without a column, which no metric averages over. A cell that was never set is
    missing: it reads NaN, and so does every metric that needs it. Besides its score a cell may hold the share (0 to 1) of
    answers in the instructed format, which is left out for a task that instructs none, and the references' mean negative
    log-likelihood per token (nats), which no metric reads.
    """

    def __init__(self, tasks: list[str], unseen: bool = False, unscored: Iterable[str] = ()):
        if not tasks or len(set(tasks)) != len(tasks):
            raise UserError(f"score matrix: tasks is {tasks!r}; give at least one task name and each name once")
        self.tasks, self.unseen = list(tasks), unseen
        self.unscored = [name for name in tasks if name in set(unscored)]
        self.definitions = {name: metric for name, metric in METRICS.items() if metric.unseen in (None, unseen)}
        self._scores = np.full((len(tasks), len(tasks)), np.nan)
        self._formats = np.full_like(self._scores, np.nan)
        self._nlls = np.full_like(self._scores, np.nan)
        self._carried: dict[tuple[int, int], int] = {}  # (stage, task) -> the stage at which the cell was run

    def set(
        self, after: str, task: str, score: float, format_share: float | None = None, nll: float | None = None
    ) -> None:
        """Record a measured cell: `score` in points (CIDEr's go to 1000), `format_share` a share, `nll` in nats per token."""
        cell = self._cell(after, task)
        score = _in_range(score, 1000, f"the score of {task} after {after}")
        share = math.nan if format_share is None else _in_range(format_share, 1, f"the format share of {task}")
        if nll is not None and not 0 <= nll < math.inf:
            raise UserError(
                f"score matrix: the negative log-likelihood of {task} is {nll}; it must be finite and at least 0"
            )
        self._scores[cell], self._formats[cell], self._nlls[cell] = score, share, math.nan if nll is None else nll
        self._carried.pop(cell, None)

    def get(self, after: str, task: str) -> float:
        """The score of `task` after training on `after`, in points; NaN when the cell is missing."""
        return float(self._scores[self._cell(after, task)])

    def format_share(self, after: str, task: str) -> float | None:
        """The share (0 to 1) of answers in the instructed format; None where it was not measured."""
        return none_if_nan(float(self._formats[self._cell(after, task)]))

    def nll(self, after: str, task: str) -> float | None:
        """The mean negative log-likelihood of the references' tokens, in nats; None where it was not measured."""
        return none_if_nan(float(self._nlls[self._cell(after, task)]))

    def copy(self, after: str, task: str, from_after: str) -> None:
        """Carry a cell over from the earlier stage `from_after` instead of running it again.

        Only right when the task's function is proved unchanged between the two stages. The cell stays marked.
        """
        cell, source = self._cell(after, task), self._cell(from_after, task)
        if source[0] >= cell[0] or np.isnan(self._scores[source]):
            raise UserError(
                f"score matrix: {task} after {after} cannot be carried over from {from_after}; "
                "name an earlier stage whose score of that task is set"
            )
        for values in (self._scores, self._formats, self._nlls):
            values[cell] = values[source]
        self._carried[cell] = self._carried.get(source, source[0])

    def without(self, task: str, missing: Sequence[str] = ()) -> Self | None:
        """The matrix of the other tasks, without the stage of this one; None if there are no others.

        missing: stages whose cells are missing then.
        """
        others = [name for name in self.tasks if name != task]
        if not others:
            return None
        rest = type(self)(others, self.unseen, self.unscored)
        for j, after in enumerate(others):
            for name in rest.scored(j):
                if after in missing or math.isnan(score := self.get(after, name)):
                    continue
                source = self.carried_from(after, name)
                if source in (None, task, *missing):
                    rest.set(after, name, score, self.format_share(after, name), self.nll(after, name))
                else:
                    rest.copy(after, name, source)
        return rest

    def carried_from(self, after: str, task: str) -> str | None:
        """The stage at which a carried-over cell was run; None for a cell that was run itself or is missing."""
        stage = self._carried.get(self._cell(after, task))
        return None if stage is None else self.tasks[stage]

    def scores(self) -> np.ndarray:
        """A copy of the matrix: [stage, task] float64, NaN where missing and where stages score no unseen task."""
        return self._scores.copy()

    def nlls(self) -> np.ndarray:
        """A copy of the negative log-likelihoods: [stage, task] float64, NaN where they were not measured."""
        return self._nlls.copy()

    def scored(self, stage: int) -> list[str]:
        """The tasks that are scored after the stage of this number, from 0."""
        tasks = self.tasks if self.unseen else self.tasks[: stage + 1]
        return [name for name in tasks if name not in self.unscored]

    @property
    def columns(self) -> list[str]:
        """The tasks that are scored at all."""
        return self.scored(len(self.tasks) - 1)

    def missing(self) -> list[tuple[str, str]]:
        """The (after, task) cells that were never set."""
        return [(self.tasks[j], self.tasks[i]) for j, i in self._missing()]

    def metrics(self) -> dict[str, float]:
        """Every metric of `definitions`, in points; NaN where it is undefined (`undefined` says why)."""
        return {name: self._value(name) for name in self.definitions}

    def undefined(self) -> dict[str, str]:
        """For every metric that is NaN: one sentence with the cause, naming the missing cells."""
        return {name: self._cause(name) for name, value in self.metrics().items() if math.isnan(value)}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: per kind of value one list per stage, None where missing."""
        cells = [[(after, task) for task in self.scored(j)] for j, after in enumerate(self.tasks)]
        nlls = [[self.nll(*cell) for cell in row] for row in cells]
        return {
            "tasks": self.tasks,
            "unseen": self.unseen,
            **({"unscored": self.unscored} if self.unscored else {}),
            "scores": [[none_if_nan(self._scores[self._cell(*cell)]) for cell in row] for row in cells],
            "format_shares": [[none_if_nan(self._formats[self._cell(*cell)]) for cell in row] for row in cells],
            "carried_from": [[self.carried_from(*cell) for cell in row] for row in cells],
            **({} if np.isnan(self._nlls).all() else {"nlls": nlls}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_dict`; UserError when `data` is not what it writes."""
        try:
            saved = _Saved.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the top level"
            raise UserError(f"score matrix: {first['msg']} at {place}; give what ScoreMatrix.to_dict wrote") from error
        matrix = cls(saved.tasks, saved.unseen, saved.unscored)
        wanted = [len(matrix.scored(j)) for j in range(len(saved.tasks))]
        nlls = saved.nlls or [[None] * length for length in wanted]
        for name, rows in (
            *((n, getattr(saved, n)) for n in ("scores", "format_shares", "carried_from")),
            ("nlls", nlls),
        ):
            lengths = [len(row) for row in rows]
            if lengths != wanted:
                raise UserError(f"score matrix: {name} has rows of length {lengths}; the tasks want {wanted}")
        for j, after in enumerate(saved.tasks):
            for i, task in enumerate(matrix.scored(j)):
                if saved.scores[j][i] is None:
                    continue
                matrix.set(after, task, saved.scores[j][i], saved.format_shares[j][i], nlls[j][i])
                if saved.carried_from[j][i] is not None:
                    matrix._carried[matrix._cell(after, task)] = matrix._cell(saved.carried_from[j][i], task)[0]
        return matrix

    def markdown(self) -> str:
        """The matrix as a Markdown table: a row per stage, `n/a` where missing, `*` where carried over."""
        columns = self.columns
        lines = ["| after | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
        for j, after in enumerate(self.tasks):
            cells = [self._cell(after, task) for task in self.scored(j)]
            texts = [cell_text(self._scores[cell], cell in self._carried) for cell in cells]
            lines.append(f"| {after} | " + " | ".join(texts + [""] * (len(columns) - len(texts))) + " |")
        return "\n".join(lines)

    def _cell(self, after: str, task: str) -> tuple[int, int]:
        for name in (after, task):
            if name not in self.tasks:
                raise UserError(f"score matrix: unknown task {name!r}; the tasks are {', '.join(self.tasks)}")
        j, i = self.tasks.index(after), self.tasks.index(task)
        if task in self.unscored:
            raise UserError(f"score matrix: {task} has no test split; score another task")
        if i > j and not self.unseen:
            raise UserError(f"score matrix: {task} is trained after {after}; a stage scores the tasks trained by then")
        return j, i

    def _missing(self) -> list[tuple[int, int]]:
        cells = [self._cell(after, task) for j, after in enumerate(self.tasks) for task in self.scored(j)]
        return [cell for cell in cells if np.isnan(self._scores[cell])]

    def _numbers(self) -> np.ndarray:
        """Of the tasks that are scored."""
        return np.array([self.tasks.index(name) for name in self.columns], dtype=int)

    def _instructed(self) -> np.ndarray:
        """Numbers of the tasks that instruct a format, and of those with no cell at all, of which nothing is known."""
        known = ~np.isnan(self._formats).all(axis=0) | np.isnan(self._scores).all(axis=0)
        return self._numbers()[known[self._numbers()]]

    def _value(self, name: str) -> float:
        if self._too_few(name):
            return math.nan
        if name == "MIF":
            return float(METRICS[name].value(100 * self._formats, self._instructed()))
        return float(METRICS[name].value(self._scores, self._numbers()))

    def _too_few(self, name: str) -> str:
        """Why the metric has no task to be the mean over, "" if it has one."""
        if not self.columns:
            return f"{name} needs a task with a test split, this run has none"
        if METRICS[name].before_last and len(self.tasks) < 2:
            return f"{name} needs at least 2 tasks, this run has {len(self.tasks)}"
        if METRICS[name].before_last and self.columns == self.tasks[-1:]:
            return f"{name} needs a task with a test split before the last task, this run has none"
        if name == "MIF" and not len(self._instructed()):
            return "MIF needs a task that instructs an answer format, this run has none"
        return ""

    def _cause(self, name: str) -> str:
        if why := self._too_few(name):
            return why
        if name == "MIF":
            last = len(self.tasks) - 1
            cells = [(last, i) for i in self._instructed() if np.isnan(self._formats[last, i])]
        else:
            cells = [cell for cell in self._missing() if self._needs(name, cell)]
        return f"{name} needs cells that are missing: " + ", ".join(
            f"{self.tasks[i]} after {self.tasks[j]}" for j, i in cells
        )

    def _needs(self, name: str, cell: tuple[int, int]) -> bool:
        """Whether the metric turns NaN when this cell alone is missing."""
        alone = np.zeros_like(self._scores)
        alone[cell] = np.nan
        return math.isnan(METRICS[name].value(alone, self._numbers()))


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tasks: list[str]
    unseen: bool = False
    unscored: list[str] = []  # left out where there is none, as in earlier versions
    scores: list[list[float | None]]
    format_shares: list[list[float | None]]
    carried_from: list[list[str | None]]
    nlls: list[list[float | None]] | None = None  # where they were measured


def cell_text(score: float, carried: bool = False) -> str:
    """One matrix cell in print: points with one decimal, `*` when carried over, `n/a` when missing."""
    return "n/a" if math.isnan(score) else f"{score:.1f}" + "*" * carried


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(value)


def _in_range(value: float, top: float, what: str) -> float:
    # A mean of scores may leave the range by a rounding error.
    if not -1e-6 <= value <= top + 1e-6:
        raise UserError(f"score matrix: {what} is {value}; it must lie between 0 and {top}")
    return min(max(float(value), 0.0), float(top))
