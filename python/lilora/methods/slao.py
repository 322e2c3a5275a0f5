"""SLAO: one LoRA whose tasks are merged into it one by one, each beginning from the one before in an orthonormal basis."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lilora.errors import UserError

from .base import Batches, Stage, Tensors, register_method
from .lora import SequentialLoRA


@register_method
class SLAO(SequentialLoRA):
    """One LoRA, merged before it forgets (SLAO, arXiv 2512.23017): each task moves B by 1 / sqrt(t) of its own way.

    Task t begins with A = Q^T, of the QR decomposition of A_{t-1}^T, and B = B_{t-1}, as trained. Afterwards A is A_t and
    B <- B + (B_t - B) / sqrt(t). The bank has B_t as `state.trained.*`.
    """

    name = "slao"
    sharded_parameters = False

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        self.trained: Tensors = {}  # each B as the last task left it, before it was merged
        self._merged: Tensors = {}  # each B of all tasks before the running one

    def add(self, task: str) -> None:
        super().add(task)
        if self.trained:
            return
        for name, tensor in self.lora().items():
            if name.endswith(".B0"):
                self.trained[name] = torch.zeros_like(tensor)
            elif tensor.shape[0] > tensor.shape[1]:
                raise UserError(
                    f"slao: r is {tensor.shape[0]} and {name.removesuffix('.A')} has {tensor.shape[1]} inputs, of which so "
                    "many orthonormal rows cannot be made; give at most as many ranks as inputs"
                )

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        own, shared = super().tensors(task)
        return own, shared | {f"state.trained.{name}": b for name, b in self.trained.items()}

    @torch.no_grad()
    def begin(self, stage: Stage, batches: Batches) -> None:
        super().begin(stage, batches)
        self._merged = {}
        if len(self.tasks) == 1:
            return
        for name, tensor in self.lora().items():
            if name.endswith(".A"):
                tensor.copy_(orthonormal_rows(tensor))
            else:
                self._merged[name] = tensor.clone()
                tensor.copy_(self.trained[name])

    @torch.no_grad()
    def end(self, stage: Stage, batches: Batches) -> None:
        for name, trained in self.trained.items():
            b = self.lora()[name]
            trained.copy_(b)
            if self._merged:
                b.copy_(torch.lerp(self._merged[name], trained, 1 / math.sqrt(len(self.tasks))))


def orthonormal_rows(a: Tensor) -> Tensor:
    """Q^T of a^T = Q R with a positive diagonal of R, which makes Q the only one: a [r, K] with r <= K -> [r, K]."""
    q, r = torch.linalg.qr(a.mT.to(torch.promote_types(a.dtype, torch.float32)))
    return (q * torch.where(r.diagonal() < 0, -1, 1)).mT
