"""Scores beside the matrix: of every task before any training, and of probes, which are never trained."""

from collections.abc import Sequence
from typing import Any

from rich.progress import Progress
from torch import nn

from lilora.methods import Method

from .evaluate import TaskScore
from .kinds import Kind
from .task_sequence import Task


class Untrained:
    """A base model without adapters, as evaluations take a method."""

    mixed_batches, needs_task = True, False

    def __init__(self, base: nn.Module) -> None:
        self.base = self.model = base
        self.tasks: list[str] = []

    def activate(self, task: str, train: bool) -> None:
        """Every task is answered alike."""


def score_probes(
    kind: Kind,
    method: Method,
    processor: Any,
    probes: Sequence[Task],
    newest: str,
    batch_size: int,
    progress: Progress | None = None,
) -> list[TaskScore]:
    """The scores of probes, of which a method that needs the task is asked with the newest one's."""
    scores = []
    for spec in probes:
        asked = spec.model_copy(update={"name": newest})
        (found,) = kind.evaluate(method, processor, [asked], batch_size, progress)
        scores.append(TaskScore(spec.name, found.score, found.format_share, found.answers))
    return scores
