"""What AdaLoRA and SoRA share: one LoRA that trains on, and a gate of every linear's ranks that trains with it.

In the formula of the gated pool: one part of ranks, and one gate for all rows.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lilora.bank.bank import Bank
from lilora.bank.export import PlainLoRA
from lilora_kernels.layers.rank_pool import Choice, RankPoolLinear

from .base import Tensors, lora_parameters
from .pooled import PooledMethod
from .settings import RankSettings

RANKS = "ranks"


class Gate(nn.Module):
    """The gate of a layer's ranks for every row: `lora_gate` [r] in fp32 at least."""

    def __init__(self, linear: nn.Linear, ranks: int) -> None:
        super().__init__()
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        value = torch.zeros(ranks, dtype=wide, device=linear.weight.device)
        self.lora_gate = nn.Parameter(value, requires_grad=False)

    def forward(self, layer: RankPoolLinear, x: Tensor) -> tuple[Choice, None]:
        return Choice((((RANKS,), None),), self.lora_gate[None]), None


class GatedLoRA(PooledMethod):
    """y = x W^T + alpha / r ((D(x) A^T) * g) B^T with one A, B and g for all tasks. The bank has g as `state.*.gate`."""

    one_state = True
    one_process_reason = "it changes its gates between the steps of the optimizer"

    def chooser(self, path: str, linear: nn.Linear) -> Gate:
        return Gate(linear, self.options.r)

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

    def gates(self) -> list[Tensor]:
        return [layer.choose.lora_gate for layer in self.layers.values()]

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        gates = {f"state.{path}.gate": layer.choose.lora_gate for path, layer in self.layers.items()}
        return {}, super().tensors(task)[1] | gates

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
    def inference_parameters(cls, settings: RankSettings, linears: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return lora_parameters(settings.r, linears) + settings.r * len(linears), 0

    def ranks(self) -> int:
        return self.options.r
