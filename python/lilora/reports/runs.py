"""The runs of a report: one per method and seed, and what the seeds of a method give together."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from lilora.errors import UserError
from lilora.validation import first_problem

from .scores import METRICS, ScoreMatrix, cell_text, none_if_nan

NLL = "negative log-likelihood of the references, nats per token: right after training, and after the last task"
VALIDATION = "scored on validation samples, not on the test splits"
CARRIED = "* carried over: the task's function is proved unchanged, so the cell was not run again"


@dataclass(frozen=True)
class Run:
    """One method trained on the whole task sequence with one seed.

    `params_per_task` counts the parameters stored for each task, `seconds` is wall time, `extra` holds further
    JSON-able facts about the run. losses: of each task by stage, (step, mean training loss since the entry before); the bank
    keeps them, and `to_dict` leaves them out. zero_shot: points of tasks and probes before any training. probes: those of each
    probe by the task that they are after.
    """

    method: str
    seed: int
    matrix: ScoreMatrix
    params_per_task: int | None = None
    seconds: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, dict[str, list[tuple[int, float]]]] = field(default_factory=dict)
    zero_shot: dict[str, float] = field(default_factory=dict)
    probes: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if name != "losses"}
        return fields | {"matrix": self.matrix.to_dict(), "metrics": without_nan(self.matrix.metrics())}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_dict`, without losses; the metrics are computed again from the matrix."""
        fields = {name: value for name, value in data.items() if name != "metrics"}
        return cls(**fields | {"matrix": ScoreMatrix.from_dict(data["matrix"])})


def read_runs(path: Path) -> list[Run]:
    """The runs in the metrics.json of a run or a report, without their losses.

    Raises UserError for a file that cannot be read or holds something else.
    """
    try:
        stored = _Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a run folder, or a metrics.json") from error
    except ValidationError as error:
        raise UserError(
            f"{path} holds no runs as lilora writes them ({first_problem(error)}); give the metrics.json of a run or a report"
        ) from error
    try:
        return [Run.from_dict(run.model_dump(exclude_unset=True)) for run in stored.runs]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class _Extra(BaseModel):
    model_config = ConfigDict(extra="allow")

    settings: dict[str, JsonValue] = {}
    train: dict[str, JsonValue] = {}
    sizes: dict[str, list[int]] | None = None


class _Stored(BaseModel):
    method: str
    seed: int
    matrix: dict[str, JsonValue]
    params_per_task: int | None
    seconds: float | None
    extra: _Extra
    zero_shot: dict[str, float] = {}
    probes: dict[str, dict[str, float]] = {}


class _Report(BaseModel):
    """Of metrics.json what a report is made of."""

    runs: list[_Stored]


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


class MethodRuns:
    """The runs of one method, one per seed, and what they give together; `index` is its place among the methods."""

    def __init__(self, name: str, runs: list[Run], index: int):
        self.name, self.runs, self.index = name, runs, index
        self.tasks, self.columns = runs[0].matrix.tasks, runs[0].matrix.columns
        scores = np.stack([run.matrix.scores() for run in runs])  # [seed, stage, task]
        self.scores = scores.mean(axis=0)
        self.deviation = scores.std(axis=0, ddof=1) if len(runs) > 1 else np.full_like(self.scores, np.nan)
        metrics = [run.matrix.metrics() for run in runs]
        self.metrics = {name: Spread.of([values[name] for values in metrics]) for name in metrics[0]}
        params = [run.params_per_task for run in runs]
        self.params_per_task = None if None in params else round(np.mean(params))
        sizes = [run.extra.get("sizes") for run in runs]
        self.sizes = None
        if None not in sizes:  # nan where a run has not come to
            self.sizes = {n: np.mean([_padded(size[n], len(self.tasks)) for size in sizes], 0) for n in sizes[0]}
        seconds = [run.seconds for run in runs]
        self.seconds = None if None in seconds else float(np.mean(seconds))

    def losses(self, task: str) -> np.ndarray:
        """[2, points]: optimizer steps over all stages of the task, and the training loss there, mean over the seeds."""
        of_seeds = []
        for run in self.runs:
            points, before = [], 0
            for stage in run.losses.get(task, {}).values():
                points += [(before + step, loss) for step, loss in stage]
                before = points[-1][0] if points else 0
            if points:
                of_seeds.append(np.array(points, dtype=float).T)
        if not of_seeds:
            return np.empty((2, 0))
        steps = max((curve[0] for curve in of_seeds), key=len)  # a resumed run may have logged at other ones
        return np.stack([steps, np.mean([np.interp(steps, *curve) for curve in of_seeds], 0)])

    def nlls(self) -> list[float] | None:
        """The references' negative log-likelihood: mean over the tasks right after training, and after the last task, then of
        each task after the last one; means over seeds, NaN where one was not measured; None where none was."""
        nlls = np.mean([run.matrix.nlls() for run in self.runs], axis=0)
        if np.isnan(nlls).all():
            return None
        scored = [self.tasks.index(task) for task in self.columns]
        return [nlls.diagonal()[scored].mean(), nlls[-1, scored].mean(), *nlls[-1, scored]]

    def cells(self) -> list[list[tuple[str, float]]]:
        """(text, mean score) of each cell of the matrix, a row per stage."""
        matrix = self.runs[0].matrix

        def cell(j: int, task: str) -> tuple[str, float]:
            carried = any(run.matrix.carried_from(self.tasks[j], task) is not None for run in self.runs)
            score = self.scores[j, self.tasks.index(task)]
            return cell_text(score, carried), score

        return [[cell(j, task) for task in matrix.scored(j)] for j in range(len(self.tasks))]

    def before(self) -> list[tuple[str, float]]:
        """(text, mean score) of each column before any training; empty if no run was scored then."""
        if not any(task in run.zero_shot for run in self.runs for task in self.columns):
            return []
        scores = [float(np.mean([run.zero_shot.get(task, math.nan) for run in self.runs])) for task in self.columns]
        return [(cell_text(score), score) for score in scores]

    def probes(self) -> dict[str, list[str]]:
        """Of each probe, as text: its mean score before any training and after each task, and the change over all of them."""
        rows = {}
        for name in dict.fromkeys(name for run in self.runs for stage in run.probes.values() for name in stage):
            stages = [
                [
                    run.zero_shot.get(name, math.nan),
                    *(run.probes.get(task, {}).get(name, math.nan) for task in self.tasks),
                ]
                for run in self.runs
            ]
            means = np.mean(stages, axis=0)
            change = means[-1] - means[0]
            rows[name] = [*map(cell_text, means), "n/a" if math.isnan(change) else f"{change:+.1f}"]
        return rows

    def any_carried(self) -> bool:
        return any(text.endswith("*") for row in self.cells() for text, _ in row)

    @property
    def heatmap_file(self) -> str:
        return f"heatmap-{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.name).strip('-')}.png"


def by_method(runs: list[Run]) -> list[MethodRuns]:
    """The runs grouped by method, in order of first appearance."""
    if not runs:
        raise UserError("report: there are no runs; train at least one method first")
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.matrix.tasks != runs[0].matrix.tasks:
            raise UserError(
                f"report: {run.method} was trained on {', '.join(run.matrix.tasks)} but {runs[0].method} on "
                f"{', '.join(runs[0].matrix.tasks)}; report runs of one task order together"
            )
        if run.matrix.unscored != runs[0].matrix.unscored:
            raise UserError(
                f"report: {run.method} was scored on {', '.join(run.matrix.columns) or 'no task'} but {runs[0].method} on "
                f"{', '.join(runs[0].matrix.columns) or 'no task'}; report runs with the same test splits together"
            )
        if run.matrix.unseen != runs[0].matrix.unseen:
            raise UserError(
                f"report: of {run.method} and {runs[0].method}, one was scored on tasks before it was trained on them and "
                "one was not; report runs of one kind of manifest together"
            )
        if (label_space := run.extra.get("label_space", "task")) != runs[0].extra.get("label_space", "task"):
            raise UserError(
                f"report: {run.method} was scored in the label space {label_space!r} and {runs[0].method} in another; report "
                "runs of one label space together"
            )
        if scored_on(run) != scored_on(runs[0]):
            raise UserError(
                f"report: of {run.method} and {runs[0].method}, one was scored on validation samples (--validate) and one on the "
                "test splits; report runs of one kind together"
            )
        seeds = groups.setdefault(run.method, {})
        manifests = {other.extra.get("manifest") for other in (run, *seeds.values())}
        if len(manifests) > 1:
            raise UserError(
                f"report: runs of {run.method} are of different manifests, {' and '.join(sorted(map(str, manifests)))}, and "
                "would be averaged as seeds; give them labels of their own (--label), or report them apart"
            )
        if run.seed in seeds:
            raise UserError(f"report: {run.method} has two runs with seed {run.seed}; pass each run once")
        seeds[run.seed] = run
    methods = [MethodRuns(name, list(seeds.values()), i) for i, (name, seeds) in enumerate(groups.items())]
    if len({method.heatmap_file for method in methods}) < len(methods):
        raise UserError(f"report: the methods {', '.join(groups)} differ only in punctuation; name them apart")
    return methods


def scored_on(run: Run) -> str:
    """The samples that its scores are of: "test" or "validation"."""
    return run.extra.get("scored_on", "test")


def undefined_notes(runs: list[Run]) -> list[str]:
    """Why a metric is n/a, once per cause with the runs it concerns."""
    concerned: dict[str, list[str]] = {}
    for run in runs:
        for why in run.matrix.undefined().values():
            concerned.setdefault(why, []).append(f"{run.method} seed {run.seed}")
    return [
        f"{why} ({'all runs' if len(names) == len(runs) else ', '.join(names)})" for why, names in concerned.items()
    ]


_SAME = {"lora_alpha": "alpha", "lora_dropout": "dropout"}  # PEFT's names of settings that other methods have, too


def differences(runs: list[Run]) -> dict[str, dict[str, str]]:
    """Settings that differ between runs which have them: name -> method -> value, "–" where a method has no such setting.

    A method whose seeds differ gets each value with its seeds. The seed itself and the sizes of what was trained are left
    out.
    """
    found: dict[str, dict[str, dict[str, list[int]]]] = {}  # name -> method -> value -> seeds
    for run in runs:
        settings = run.extra.get("settings", {}) | run.extra.get("train", {})
        settings |= {name: value for name, value in run.extra.items() if name in ("model", "manifest")}
        for name, value in settings.items():
            if name != "seed":
                text = value if isinstance(value, str) else json.dumps(value)
                by_value = found.setdefault(_SAME.get(name, name), {}).setdefault(run.method, {})
                by_value.setdefault(text, []).append(run.seed)
    methods = dict.fromkeys(run.method for run in runs)
    return {
        name: {method: _values(values.get(method, {})) for method in methods}
        for name, values in found.items()
        if len({text for by_value in values.values() for text in by_value}) > 1
    }


def _values(by_value: dict[str, list[int]]) -> str:
    if len(by_value) < 2:
        return next(iter(by_value), "–")
    return ", ".join(f"{text} (seed {' '.join(map(str, seeds))})" for text, seeds in by_value.items())


def nll_rows(methods: list[MethodRuns]) -> tuple[list[str], dict[str, list[str]]] | None:
    """(headings, method -> cells) of the table of negative log-likelihoods; None where no run measured any."""
    found = {method.name: method.nlls() for method in methods}
    if not any(found.values()):
        return None
    headings = ["New, mean", "last, mean", *methods[0].columns]
    texts = {name: [_nll_text(v) for v in values or [math.nan] * len(headings)] for name, values in found.items()}
    return headings, texts


def _nll_text(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def heading(metric: str) -> str:
    return f"{metric} {'↑' if METRICS[metric].higher_is_better else '↓'}"


def without_nan(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: none_if_nan(value) for name, value in numbers.items()}


def _padded(values: list[float], length: int) -> np.ndarray:
    return np.pad(np.array(values, float), (0, length - len(values)), constant_values=np.nan)
