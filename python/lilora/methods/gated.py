"""What AdaLoRA and SoRA share: one LoRA that trains on, and a gate of every linear's ranks that trains with it.

In the formula of the gated pool: one part of ranks, and one gate for all rows.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lilora.bank.bank import Bank
from lilora.bank.export import PlainLoRA
from lilora_kernels.layers.lilora import DROPOUT, RANK
from lilora_kernels.layers.rank_pool import Choice, RankPoolLinear

from .base import Method, Tensors, lora_parameters
from .pooled import inject_rank_pools, pool_tensors, require_grad_only
from .settings import MethodSettings, alpha_field

RANKS = "ranks"


class GatedSettings(MethodSettings):
    """r: ranks of each linear, with those whose gate is 0; the scale is alpha / r."""

    r: int = Field(RANK, ge=1)
    alpha: float = alpha_field()
    dropout: float = Field(DROPOUT, ge=0, lt=1)


class Gate(nn.Module):
    """The gate of a layer's ranks for every row: `lora_gate` [r] in fp32 at least."""

    def __init__(self, linear: nn.Linear, ranks: int) -> None:
        super().__init__()
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        value = torch.zeros(ranks, dtype=wide, device=linear.weight.device)
        self.lora_gate = nn.Parameter(value, requires_grad=False)

    def forward(self, layer: RankPoolLinear, x: Tensor) -> tuple[Choice, None]:
        return Choice((((RANKS,), None),), self.lora_gate[None]), None


class GatedLoRA(Method):
    """y = x W^T + alpha / r ((D(x) A^T) * g) B^T with one A, B and g for all tasks. The bank has g as `state.*.gate`."""

    mixed_batches = True
    needs_task = False
    one_state = True
    one_process_reason = "it changes its gates between the steps of the optimizer"

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        s = self.options = self.read_settings(settings)
        self.model = base
        self.layers = inject_rank_pools(
            base, s.target_modules, lambda _, linear: Gate(linear, s.r), s.alpha / s.r, s.dropout
        )
        require_grad_only(base)

    @abstractmethod
    def start(self, layer: RankPoolLinear) -> tuple[Tensor, Tensor, Tensor]:
        """A [r, K], B [N, r] and gate [r] of a layer before the first task."""

    def add(self, task: str) -> None:
        if not self.tasks:
            for layer in self.layers.values():
                a, b, gate = self.start(layer)
                layer.put(RANKS, a, b, train=False)
                layer.choose.lora_gate.data.copy_(gate)
        self.tasks.append(task)

    def activate(self, task: str, train: bool) -> None:
        require_grad_only(self.model, *(self.tensors(task)[1].values() if train else ()))

    def gates(self) -> list[Tensor]:
        return [layer.choose.lora_gate for layer in self.layers.values()]

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        gates = {f"state.{path}.gate": layer.choose.lora_gate for path, layer in self.layers.items()}
        return {}, pool_tensors(self.layers) | gates

    @classmethod
    def as_lora(cls, bank: Bank, task: str) -> PlainLoRA:
        _, stored = bank.load_task(bank.tasks[-1])
        paths = [name.removesuffix(f".{RANKS}.A") for name in stored if name.endswith(f".{RANKS}.A")]
        factors = {
            path: (stored[f"{path}.{RANKS}.A"], stored[f"{path}.{RANKS}.B0"] * stored[f"state.{path}.gate"])
            for path in paths
        }
        options = cls.read_settings(bank.config["settings"])
        return PlainLoRA(factors, options.alpha / options.r, options.dropout)

    @classmethod
    def inference_parameters(cls, settings: GatedSettings, linears: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return lora_parameters(settings.r, linears) + settings.r * len(linears), 0

    def ranks(self) -> int:
        return self.options.r
