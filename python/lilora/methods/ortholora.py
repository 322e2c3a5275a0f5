"""Ortho-LoRA: one LoRA trained on all tasks together, whose tasks do not undo each other's steps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Inputs, next_labels, register_method
from .joint import Joint


@register_method
class OrthoLoRA(Joint):
    """Joint training with gradients that are projected where tasks conflict (Ortho-LoRA, arXiv 2601.09684).

    g = sum over the tasks i of a batch of g_i, from which, for every other task j in random order, its part along g_j is taken
    out where <g_i, g_j> is negative. Each A and each B is projected alone. That this is so for every linear by itself, and
    for every batch of a step, is our reading.
    """

    name = "ortholora"
    sees_tasks = True
    answers_only = True
    sharded_parameters = False
    one_process_reason = "it projects the gradients of the tasks of a whole batch"

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        task = inputs.pop("task_ids")
        loss, outputs = cross_entropy()
        parts = losses_of_tasks(loss, outputs.logits, next_labels(inputs), task)
        if len(parts) == 1:
            return loss
        parameters = list(self.lora().values())
        gradients = [
            torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for part in parts
        ]
        orders = [torch.randperm(len(parts)).tolist() for _ in parts]
        combined = [combined_gradient(own, orders) for own in zip(*gradients, strict=True)]
        return WithGradients.apply(loss.detach(), combined, *parameters)


def losses_of_tasks(loss: Tensor, logits: Tensor, labels: Tensor, task: Tensor) -> list[Tensor]:
    """The shares of `loss`, a scalar, of each task of a batch, by the cross-entropy of the tokens of its answers.

    logits [B, L, V], labels [B, L] that they predict, -100 where there is no answer, task [B].
    """
    answered = labels != -100
    wide = torch.promote_types(logits.dtype, torch.float32)
    tokens = nn.functional.cross_entropy(logits[answered].to(wide), labels[answered], reduction="none")
    owner = task[:, None].expand_as(labels)[answered]
    scale = (loss / tokens.sum()).detach()
    return [scale * tokens[owner == t].sum() for t in owner.unique()]


def combined_gradient(gradients: Sequence[Tensor], orders: Sequence[Sequence[int]]) -> Tensor:
    """The sum over tasks i of gradients[i] without what points against another one's; orders[i]: in which order of those."""
    total = torch.zeros_like(gradients[0])
    for i, order in enumerate(orders):
        own = gradients[i].clone()
        for j in order:
            other = gradients[j]
            inner = (own * other).sum()
            if j != i and inner < 0:
                own -= inner / other.square().sum() * other
        total += own
    return total


class WithGradients(torch.autograd.Function):
    """A loss whose gradients are given."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * gradient for gradient in ctx.saved_tensors)
