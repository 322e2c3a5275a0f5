"""MoELoRA: a LoRA split into experts, which a router weighs for every token.

In the formula of the gated pool: the experts are blocks of ranks, and each row's gate repeats an expert's weight over its ranks.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lilora_kernels.layers.lilora import DROPOUT, RANK
from lilora_kernels.layers.rank_pool import Choice, RankPoolLinear

from .base import Method, Tensors, lora_parameters, register_method
from .pooled import fresh, inject_rank_pools, pool_tensors, require_grad_only
from .settings import MethodSettings, alpha_field

EXPERTS = "experts"


class MoELoRASettings(MethodSettings):
    """r: ranks of all experts together; the scale is alpha / r; experts: into how many they are split."""

    r: int = Field(RANK, ge=1)
    alpha: float = alpha_field()
    dropout: float = Field(DROPOUT, ge=0, lt=1)
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
class MoELoRA(Method):
    """The mixture of LoRA experts of CoIN (arXiv 2403.08350), one set of parameters that is trained task after task.

    y = x W^T + alpha / r sum_e g_e(x) D(x) A_e^T B_e^T with all experts active; the router sees x without dropout.
    Inference needs no task. The bank has the routers as `state.*.router`.
    """

    name = "moelora"
    settings_type = MoELoRASettings
    no_lora = "a router weighs its experts for every token; use lilora generate and eval"
    mixed_batches = True
    needs_task = False
    one_state = True

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        s = self.options = self.read_settings(settings)
        self.model = base
        self.layers = inject_rank_pools(
            base,
            s.target_modules,
            lambda path, linear: Router(linear, s.experts, s.r // s.experts),
            s.alpha / s.r,
            s.dropout,
        )
        require_grad_only(base)

    def add(self, task: str) -> None:
        if not self.tasks:
            for layer in self.layers.values():
                layer.choose.lora_router.reset_parameters()
                layer.put(EXPERTS, *fresh(layer, self.options.r), train=False)
        self.tasks.append(task)

    def activate(self, task: str, train: bool) -> None:
        require_grad_only(self.model, *(self.tensors(task)[1].values() if train else ()))

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        routers = {f"state.{path}.router": layer.choose.lora_router.weight for path, layer in self.layers.items()}
        return {}, pool_tensors(self.layers) | routers

    @classmethod
    def inference_parameters(cls, settings: MoELoRASettings, linears: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return lora_parameters(settings.r, linears) + sum(settings.experts * k for _, k in linears), 0

    def ranks(self) -> int:
        return self.options.r
