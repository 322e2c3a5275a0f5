"""What a bank tells without its model: similarity of the tasks' factors, redundant ranks, drift of the shared basis."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lilora.bank.atomic import write_atomically
from lilora.bank.bank import Bank
from lilora.bank.export import up_projection
from lilora.errors import UserError
from lilora.methods import METHODS
from lilora.methods.base import Tensors
from lilora.methods.redundancy import principal_cosines, residual_share, whitening

from .analysis_figures import depth, drift_curves, heatmaps
from .plotting import PLOT_STYLE, png
from .scores import cell_text, none_if_nan

DEFINITIONS = {
    "factors": "a task is A [r, K] and B [N, r] for every adapted linear; B is B0, in LiLoRA f B0 + (1 - f) U V",
    "overlap": "mean squared cosine of the principal angles between two tasks' row spaces of A or column spaces of B",
    "expected": "the overlap of random subspaces with the same dimensions d and d2 in D dimensions: max(d, d2) / D",
    "cka": "linear centred kernel alignment (arXiv 1905.00414) of two tasks' A, each a table of K samples (the inputs) of r "
    "features, or of their B, of N samples; 1 for tables that differ by a rotation of the ranks and a factor",
    "expected_cka": "that of random tables of r and r2 features: sqrt(r r2 / ((D - 1 + r) (D - 1 + r2))), nearly",
    "redundant": "share of the ranks of the row's task whose squared residual, after projection onto the span of the "
    "r ranks of the column's task, is below `threshold` times the 1 - r / D that a random span would leave of their "
    "squared norm; a rank is a row a of A (D = K), a column b of B (D = N), or whole, b a^T (D = N K)",
    "change": "Frobenius norm of the change of A or B0 over the norm before it",
    "angle": "mean principal angle, in degrees, between the row spaces of A or column spaces of B0 before and after",
}
_SPANS = {"A": "row spaces of A", "B": "column spaces of B"}
_RANKS = {"A": "rows a of A", "B": "columns b of B", "BA": "ranks b aᵀ"}
_DRIFTS = ("change since first", "change since previous", "angle since first", "angle since previous")
_DRIFT_UNITS = (100, 100, 1, 1)  # in print: per cent, degrees


@dataclass(frozen=True)
class Analysis:
    """Numbers of T tasks on L linears, as DEFINITIONS says.

    overlap, cka and what is expected of both: "A" and "B" -> [L, T, T]. redundant: "A", "B" and "BA" -> [L, T, T], of the
    row's task in the column's. drift: "A" and "B0" -> [L, T, 4] since the first and the previous task: two changes, two
    angles; empty where every task has a basis of its own.
    """

    method: str
    tasks: list[str]
    threshold: float
    layers: list[str]
    overlap: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    cka: dict[str, np.ndarray]
    expected_cka: dict[str, np.ndarray]
    redundant: dict[str, np.ndarray]
    drift: dict[str, np.ndarray]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: pairs and drift as means over the linears, linears as means over the pairs of tasks."""
        pairs = {name: getattr(self, name) for name in ("overlap", "expected", "cka", "expected_cka", "redundant")}
        return {
            "method": self.method,
            "tasks": self.tasks,
            "threshold": self.threshold,
            "definitions": DEFINITIONS,
            **{name: {key: _jsonable(x.mean(0)) for key, x in values.items()} for name, values in pairs.items()},
            "drift": {key: dict(zip(_DRIFTS, _jsonable(x.mean(0).T), strict=True)) for key, x in self.drift.items()},
            "layers": {
                layer: {
                    name: {key: none_if_nan(over_pairs(x[i])) for key, x in values.items()}
                    for name, values in pairs.items()
                }
                for i, layer in enumerate(self.layers)
            },
        }


def analyze(bank: Bank, threshold: float = 0.5, track: Callable[[list[str]], Iterable[str]] = iter) -> Analysis:
    """Compare the tasks of a bank, linear by linear; `track` wraps the loop over the linears, for a progress bar.

    The whole bank is read into memory, then one linear at a time is widened to float64.

    Raises:
        UserError: a threshold outside (0, 1), fewer than two tasks, a method whose tasks are no LoRA each, tasks on
            different linears, or a damaged file.
    """
    if not 0 < threshold < 1:
        raise UserError(f"--threshold is {threshold}; give a share of the squared norm, above 0 and below 1")
    method = bank.config.get("method")
    one_basis = METHODS[method].one_basis if isinstance(method, str) and method in METHODS else None
    if one_basis is None:
        fit = ", ".join(name for name, other in METHODS.items() if other.one_basis is not None)
        raise UserError(
            f"{bank.path} is of method {method!r}, which keeps no LoRA (A, B0) per task; analyze wants a bank of one of {fit}"
        )
    if len(bank.tasks) < 2:
        raise UserError(f"{bank.path} holds {len(bank.tasks)} task(s) and analyze compares two or more; train another")
    stored = _load(bank)
    layers = sorted({name.rpartition(".")[0] for name in stored[0][1]}, key=_model_order)
    parts = [_linear(layer, stored, threshold, one_basis) for layer in track(layers)]
    numbers = {
        name: {key: np.stack([part[name][key] for part in parts]) for key in values}
        for name, values in parts[0].items()
    }
    return Analysis(method, bank.tasks, threshold, layers, **numbers)


def over_pairs(x: np.ndarray) -> np.ndarray:
    """Mean over pairs of different tasks: [..., T, T] -> [...]."""
    return x[..., ~np.eye(x.shape[-1], dtype=bool)].mean(-1)


def _load(bank: Bank) -> list[tuple[Tensors, Tensors]]:
    """Each task's own factors, and its A and B0, without other state; tasks with one shared set get the same ones."""
    stored, sets = [], {}
    for task in bank.tasks:
        own, shared = (
            {name: tensor for name, tensor in tensors.items() if not name.startswith("state.")}
            for tensors in bank.load_task(task)
        )
        factors = {name: tensor for name, tensor in shared.items() if name.endswith((".A", ".B0"))}
        stored.append((own, sets.setdefault(bank.shared_fingerprint(task), factors)))
        if _sizes(stored[-1][1]) != _sizes(stored[0][1]):
            raise UserError(
                f"{bank.path}: task {task!r} adapts other linears than {bank.tasks[0]!r}; analyze compares tasks on "
                "the same linears"
            )
    return stored


def _sizes(factors: Tensors) -> dict[str, int]:
    """K of every A and N of every B0."""
    return {name: tensor.shape[name.endswith(".A")] for name, tensor in factors.items()}


def _model_order(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _linear(
    layer: str, stored: list[tuple[Tensors, Tensors]], threshold: float, one_basis: bool
) -> dict[str, dict[str, np.ndarray]]:
    """The numbers of Analysis for one linear."""
    a = [shared[f"{layer}.A"].double() for _, shared in stored]
    b0 = [shared[f"{layer}.B0"].double() for _, shared in stored]
    b = [up_projection(layer, own, x) for (own, _), x in zip(stored, b0, strict=True)]
    sizes, k, n = [len(x) for x in a], a[0].shape[1], len(b[0])
    grams = {"A": _gram(a), "B": _gram([x.mT for x in b])}
    overlaps = {key: _overlap(grams[key], sizes, dimensions) for key, dimensions in (("A", k), ("B", n))}
    grams["BA"] = grams["A"] * grams["B"]  # the `rank_gram` of all ranks
    shares = {key: _redundant(grams[key], sizes, d, threshold) for key, d in (("A", k), ("B", n), ("BA", n * k))}
    return {
        "overlap": {key: overlap for key, (overlap, _) in overlaps.items()},
        "expected": {key: expected for key, (_, expected) in overlaps.items()},
        "cka": {"A": _cka(a), "B": _cka([x.mT for x in b])},
        "expected_cka": {"A": _expected_cka(sizes, k), "B": _expected_cka(sizes, n)},
        "redundant": shares,
        "drift": {"A": _drift(a), "B0": _drift([x.mT for x in b0])} if one_basis else {},
    }


def _gram(vectors: list[Tensor]) -> Tensor:
    """Inner products of all tasks' vectors [r_t, D] -> [sum of r_t, sum of r_t]."""
    together = torch.cat(vectors)
    return together @ together.mT


def _overlap(gram: Tensor, sizes: list[int], dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """(overlap, expected overlap) of the tasks' spans, both [T, T]; sizes: vectors of each task, in D dimensions."""
    blocks = [row.split(sizes, 1) for row in gram.split(sizes)]
    w = [whitening(blocks[i][i]) for i in range(len(sizes))]
    overlap, expected = np.ones((2, len(sizes), len(sizes)))
    for i in range(len(sizes)):
        for j in range(i):
            cosines = principal_cosines(w[i], blocks[i][j], w[j])
            overlap[i, j] = overlap[j, i] = cosines.square().mean()
            expected[i, j] = expected[j, i] = max(w[i].shape[1], w[j].shape[1]) / dimensions
    return overlap, expected


def _cka(vectors: list[Tensor]) -> np.ndarray:
    """[T, T] of all tasks' vectors [r_t, D]; NaN where those of a task are zero."""
    sizes = [len(x) for x in vectors]
    gram = _gram([x - x.mean(1, keepdim=True) for x in vectors])
    norms = torch.stack([torch.stack([part.norm() for part in row.split(sizes, 1)]) for row in gram.split(sizes)])
    own = norms.diagonal()
    return (norms.square() / (own[:, None] * own)).numpy()


def _expected_cka(sizes: list[int], dimensions: int) -> np.ndarray:
    own = np.array([size / (dimensions - 1 + size) for size in sizes])
    return np.sqrt(own[:, None] * own)


def _redundant(gram: Tensor, sizes: list[int], dimensions: int, threshold: float) -> np.ndarray:
    """Share of each task's vectors (row) that are redundant in each task's span (column): [T, T]."""
    shares = []
    for i, cross in enumerate(gram.split(sizes, 1)):
        residual = residual_share(gram.diagonal(), cross, cross.split(sizes)[i])
        limit = threshold * (1 - sizes[i] / dimensions)
        shares.append([(part < limit).double().mean().item() for part in residual.split(sizes)])
    return np.array(shares).T


def _drift(states: list[Tensor]) -> np.ndarray:
    """The four columns of a factor whose rows were `states` [r, D] after each of T tasks: [T, 4]."""
    first, previous = [states[0]] * len(states), [states[0], *states[:-1]]
    columns = [map(measure, states, since) for measure in (_change, _angle) for since in (first, previous)]
    return np.array([list(column) for column in columns]).T


def _change(new: Tensor, old: Tensor) -> float:
    if torch.equal(new, old):
        return 0.0
    return float((new - old).norm() / old.norm()) if old.any() else math.nan


def _angle(new: Tensor, old: Tensor) -> float:
    if torch.equal(new, old):
        return 0.0
    cosines = principal_cosines(whitening(new @ new.mT), new @ old.mT, whitening(old @ old.mT))
    return float(cosines.acos().rad2deg().mean())


def _jsonable(x: np.ndarray) -> list:
    return [_jsonable(row) for row in x] if x.ndim else none_if_nan(x)


# --- tables and files -------------------------------------------------------------------------------------------------


def print_analysis(analysis: Analysis, console: Console) -> None:
    """Print mean and highest number between tasks, and the drift of the shared basis; `to_dict` has every pair."""
    rows = []
    overlaps, ckas, shares = _matrices(analysis)
    for title, values, random in overlaps + ckas + shares:
        pairs = np.where(np.eye(len(values), dtype=bool), -np.inf, values)
        i, j = np.unravel_index(pairs.argmax(), pairs.shape)  # of a NaN, if there is one
        mean, highest = cell_text(100 * over_pairs(values)), cell_text(100 * values[i, j])
        rows.append((title, mean, random, highest, f"{analysis.tasks[i]}, {analysis.tasks[j]}"))
    console.print(_table(("per cent", "mean", "random", "highest", "of, in"), rows))
    for factor, values in analysis.drift.items():
        console.print(f"drift of {factor}: change in % of the norm, mean principal angle in degrees")
        drift = values.mean(0) * _DRIFT_UNITS
        rows = [(task, *(f"{x:.2f}" for x in row)) for task, row in zip(analysis.tasks, drift, strict=True)]
        console.print(_table(("after", *_DRIFTS), rows))


def write_analysis(out: Path, analysis: Analysis) -> None:
    """Write overlap.png, depth.png, redundant.png, for a shared basis drift.png, and metrics.json into the folder `out`.

    Everything is rendered before the first file is written; each file is replaced in one step.
    """
    data = json.dumps(analysis.to_dict(), indent=1, allow_nan=False).encode()
    overlaps, _, shares = _matrices(analysis)
    with matplotlib.rc_context(PLOT_STYLE):
        figures = {
            "overlap.png": heatmaps(analysis.tasks, overlaps),
            "redundant.png": heatmaps(analysis.tasks, shares),
            "depth.png": depth(analysis.layers, _by_span(analysis.overlap), _by_span(analysis.expected)),
        }
        if analysis.drift:
            drift = {factor: values.mean(0) * _DRIFT_UNITS for factor, values in analysis.drift.items()}
            figures["drift.png"] = drift_curves(analysis.tasks, drift)
        pictures = {name: png(figure) for name, figure in figures.items()}
    for name, content in (pictures | {"metrics.json": data}).items():
        write_atomically(Path(out) / name, content)


def _matrices(analysis: Analysis) -> tuple[list[tuple[str, np.ndarray, str]], ...]:
    """Overlaps, CKA and redundancy: (title, numbers between tasks [T, T], means over the linears, what random spaces have)."""
    overlaps = [
        (
            f"overlap of the {name}",
            analysis.overlap[key].mean(0),
            f"{100 * over_pairs(analysis.expected[key]).mean():.1f}",
        )
        for key, name in _SPANS.items()
    ]
    ckas = [
        (f"CKA of {key}", analysis.cka[key].mean(0), f"{100 * over_pairs(analysis.expected_cka[key]).mean():.1f}")
        for key in _SPANS
    ]
    shares = [(f"redundant {name}", analysis.redundant[key].mean(0), "") for key, name in _RANKS.items()]
    return overlaps, ckas, shares


def _by_span(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name of the spaces -> per cent of each linear [L], mean over pairs of tasks."""
    return {name: 100 * over_pairs(values[key]) for key, name in _SPANS.items()}


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table
