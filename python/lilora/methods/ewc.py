"""EWC: one LoRA whose parameters are held the more the likelihood of the earlier tasks' answers depends on them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from .base import Batches, Inputs, Stage, Tensors, answer_positions, evaluating, register_method
from .lora import LoRASettings, SequentialLoRA


class EWCSettings(LoRASettings):
    """penalty: lambda of the quadratic penalty. fisher_samples: training samples of a task that its Fisher is taken from,
    at most.
    """

    penalty: float = Field(1e4, ge=0)
    fisher_samples: int = Field(256, ge=1)


@register_method
class EWC(SequentialLoRA):
    """Elastic weight consolidation (arXiv 1612.00796) of a LoRA: loss + lambda / 2 sum_i F_i (theta_i - theta*_i)^2.

    theta* is the LoRA after the last task and F the sum of the tasks' Fisher diagonals, each taken at the end of its task:
    one penalty for all tasks, as in online EWC (arXiv 1805.06370) without decay. The bank has F as `state.fisher.*`.
    """

    name = "ewc"
    sharded_parameters = False
    settings_type = EWCSettings
    answers_only = True

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        self.fisher: Tensors = {}
        self._anchor: Tensors = {}  # theta*, empty in the first task

    def add(self, task: str) -> None:
        super().add(task)
        if not self.fisher:
            self.fisher = {name: torch.zeros_like(p) for name, p in self.lora().items()}

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        own, shared = super().tensors(task)
        return own, shared | {f"state.fisher.{name}": fisher for name, fisher in self.fisher.items()}

    def begin(self, stage: Stage, batches: Batches) -> None:
        super().begin(stage, batches)
        before = self.lora() if len(self.tasks) > 1 else {}
        self._anchor = {name: p.detach().clone() for name, p in before.items()}

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        loss = cross_entropy()[0]
        if self._anchor and self.options.penalty:
            loss = loss + grad_accum_weight * self.options.penalty * consolidation(
                self.lora(), self._anchor, self.fisher
            )
        return loss

    def end(self, stage: Stage, batches: Batches) -> None:
        with evaluating(self.model):
            new = fisher_diagonal(self.model, self.lora(), batches(self.options.fisher_samples, 1))
        for name, fisher in self.fisher.items():
            fisher += new[name]


def consolidation(parameters: Tensors, anchor: Tensors, fisher: Tensors) -> Tensor:
    """1/2 sum_i F_i (theta_i - theta*_i)^2 over tensors of equal names and shapes, a scalar."""
    return 0.5 * sum((fisher[name] * (p - anchor[name]).square()).sum() for name, p in parameters.items())


def fisher_diagonal(model: nn.Module, parameters: Tensors, samples: Iterable[Inputs]) -> Tensors:
    """Diagonal of the empirical Fisher information: the mean over samples of (d log p(answer | prompt) / d theta)^2.

    samples: batches of one sample with labels [1, L], -100 where there is no answer; log p is the sum over the answer's
    tokens. Returns tensors shaped and named as parameters.
    """
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count = 0
    for inputs in samples:
        tokens = answer_positions(inputs).sum()
        log_likelihood = -tokens * model(**inputs).loss  # the loss is a mean over them
        gradients = torch.autograd.grad(
            log_likelihood, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        for square, gradient in zip(squares.values(), gradients, strict=True):
            square += gradient.square()
        count += 1
    return {name: square / count for name, square in squares.items()}
