"""SoRA: a LoRA whose gate is pulled to zero after every step, so that it loses the ranks that the loss does not hold."""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lilora_kernels.layers.rank_pool import RankPoolLinear

from .base import Inputs, register_method
from .gated import GatedLoRA
from .pooled import fresh
from .settings import RankSettings

PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "released": {"threshold": 3e-4, "l1": 10.0}}


class SoRASettings(RankSettings):
    """sparsity: lambda of the l1 term; a step's threshold is the learning rate times it, as in the paper, or the same
    `threshold` at every step, as in the published code, which also sets to 0 what is left below it. l1: weight in the loss of
    the mean of |g| over all gates, which only the code has.
    """

    sparsity: float = Field(0.1, ge=0)
    threshold: float | None = Field(None, ge=0)
    l1: float = Field(0.0, ge=0)


@register_method
class SoRA(GatedLoRA):
    """Sparse low-rank adaptation (SoRA, arXiv 2311.11696), one LoRA with gated ranks that trains task after task.

    After every step of the optimizer g <- sign(g) max(|g| - threshold, 0), the proximal step of an l1 term on the gates. They
    start as N(0, 1). A rank whose gate is 0 adds nothing, and stays in the file: a later task may take it up again, which is
    our reading. Inference needs no task.
    """

    name = "sora"
    settings_type = SoRASettings
    presets = PRESETS

    def start(self, layer: RankPoolLinear) -> tuple[Tensor, Tensor, Tensor]:
        a, b = fresh(layer, self.options.r)
        return a, b, torch.randn_like(layer.choose.lora_gate)

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        loss = cross_entropy()[0]
        if self.options.l1:
            loss = loss + grad_accum_weight * self.options.l1 * torch.cat(self.gates()).abs().mean()
        return loss

    def after_step(self, step: int, steps: int, optimizer: torch.optim.Optimizer) -> None:
        fixed = self.options.threshold
        threshold = self.options.sparsity * optimizer.param_groups[0]["lr"] if fixed is None else fixed
        for gate in self.gates():
            gate.copy_(torch.nn.functional.softshrink(gate, threshold))
            if fixed is not None:
                gate.masked_fill_(gate.abs() < fixed, 0)
