"""MoELoRA: a LoRA split into experts, which a router weighs for every token.

In the formula of the gated pool: the experts are blocks of ranks, and each row's gate repeats an expert's weight over its ranks.
"""

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lilora_kernels.layers.rank_pool import Choice, RankPoolLinear

from .base import Tensors, lora_parameters, register_method
from .pooled import PooledMethod, fresh
from .settings import RankSettings

EXPERTS = "experts"


class MoELoRASettings(RankSettings):
    """r: ranks of all experts together; the scale is alpha / r; experts: into how many they are split."""

    experts: int = Field(8, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.r % self.experts:
            raise ValueError(f"r is {self.r} and experts is {self.experts}; r must be a multiple of experts")
        return self


class Router(nn.Module):
    """g = softmax(x R^T) over the experts for each row x of a layer's input [M, K]; R [experts, K] in fp32 at least."""

    def __init__(self, linear: nn.Linear, experts: int, ranks: int) -> None:
        super().__init__()
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        self.ranks = ranks  # of each expert
        self.lora_router = nn.Linear(linear.in_features, experts, bias=False, dtype=wide, device=linear.weight.device)

    def forward(self, layer: RankPoolLinear, x: Tensor) -> tuple[Choice, Tensor]:
        weight, rows = self.lora_router.weight, x.reshape(-1, x.shape[-1])
        weights = nn.functional.linear(rows, weight.to(rows.dtype)).softmax(-1, dtype=weight.dtype)
        gate = weights.repeat_interleave(self.ranks, 1)  # [M, r]
        return Choice((((EXPERTS,), None),), gate), torch.arange(len(rows), dtype=torch.int32, device=x.device)


@register_method
class MoELoRA(PooledMethod):
    """The mixture of LoRA experts of CoIN (arXiv 2403.08350), one set of parameters that is trained task after task.

    y = x W^T + alpha / r sum_e g_e(x) D(x) A_e^T B_e^T with all experts active; the router sees x without dropout.
    Inference needs no task. The bank has the routers as `state.*.router`.
    """

    name = "moelora"
    settings_type = MoELoRASettings
    no_lora = "a router weighs its experts for every token; use lilora generate and eval"
    one_state = True

    def chooser(self, path: str, linear: nn.Linear) -> Router:
        return Router(linear, self.options.experts, self.options.r // self.options.experts)

    def add(self, task: str) -> None:
        if not self.tasks:
            for layer in self.layers.values():
                layer.choose.lora_router.reset_parameters()
                layer.put(EXPERTS, *fresh(layer, self.options.r), train=False)
        self.tasks.append(task)

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        routers = {f"state.{path}.router": layer.choose.lora_router.weight for path, layer in self.layers.items()}
        return {}, super().tensors(task)[1] | routers

    @classmethod
    def inference_parameters(cls, settings: MoELoRASettings, linears: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return lora_parameters(settings.r, linears) + sum(settings.experts * k for _, k in linears), 0

    def ranks(self) -> int:
        return self.options.r
