"""C-LoRA: one LoRA with a routing matrix in its middle, of which every task trains an addition."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from pydantic import Field
from torch import Tensor, nn

from lilora.bank.bank import Bank
from lilora.bank.export import PlainLoRA, plain_lora
from lilora.module_names import unwrapped

from .base import Batches, Inputs, Stage, Tensors, lora_parameters, register_method
from .lora import LoRASettings, SequentialLoRA


class CLoRASettings(LoRASettings):
    """orthogonality: lambda of the penalty on a task's own part of the routing matrix, from the second task on."""

    orthogonality: float = Field(0.5, ge=0)


class RoutedDown(nn.Module):
    """x [..., K] -> (R_old + R_t) A x: `weight` A [r, K] and `route` R_t [r, r] are trained, `old` R_old [r, r] is kept."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        like = {"dtype": weight.dtype, "device": weight.device}
        self.route = nn.Parameter(torch.zeros(len(weight), len(weight), **like))
        self.register_buffer("old", torch.eye(len(weight), **like), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.weight), self.old + self.route)


@register_method
class CLoRA(SequentialLoRA):
    """One LoRA with a routing matrix that keeps what earlier tasks put there (C-LoRA, arXiv 2502.17920).

    y = x W^T + s x A^T V^T U^T with V = R_old + R_t; A, U and R_t are trained, on loss + lambda * sum over linears of
    |A^T R_t|_F^2 from the second task on. Afterwards R_old <- R_old + R_t. The bank has U as B0 and R_old as `state.*.R`.
    """

    name = "clora"
    sharded_parameters = False
    one_basis = None
    settings_type = CLoRASettings

    def add(self, task: str) -> None:
        first = self.model is None
        super().add(task)
        for layer in self._linears().values() if first else ():
            layer.lora_A[self.adapter(task)] = RoutedDown(layer.lora_A[self.adapter(task)].weight)

    def _linears(self) -> dict[str, Linear]:
        modules = self.model.base_model.model.named_modules()
        return {unwrapped(path): layer for path, layer in modules if isinstance(layer, Linear)}

    def downs(self) -> dict[str, RoutedDown]:
        return {path: layer.lora_A["default"] for path, layer in self._linears().items()}

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        own, shared = super().tensors(task)
        return own, shared | {f"state.{path}.R": down.old for path, down in self.downs().items()}

    def parameters(self) -> int:
        return super().parameters() + sum(down.old.numel() for down in self.downs().values())

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        loss = cross_entropy()[0]
        if self.options.orthogonality and len(self.tasks) > 1:
            terms = [(down.weight.mT @ down.route).square().sum() for down in self.downs().values()]
            loss = loss + grad_accum_weight * self.options.orthogonality * torch.stack(terms).sum()
        return loss

    @torch.no_grad()
    def end(self, stage: Stage, batches: Batches) -> None:
        for down in self.downs().values():
            down.old += down.route
            down.route.zero_()

    @classmethod
    def as_lora(cls, bank: Bank, task: str) -> PlainLoRA:
        _, stored = bank.load_task(bank.tasks[-1])
        options = cls.read_settings(bank.config["settings"])
        wide = torch.promote_types(next(iter(stored.values())).dtype, torch.float32)
        routed = {
            name: stored[f"state.{name.removesuffix('.A')}.R"].to(wide) @ tensor.to(wide)
            if name.endswith(".A")
            else tensor
            for name, tensor in stored.items()
            if not name.startswith("state.")
        }
        return plain_lora({}, routed, options.r, options.lora_alpha, options.lora_dropout)

    @classmethod
    def inference_parameters(cls, settings: CLoRASettings, linears: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return lora_parameters(settings.r, linears) + len(linears) * settings.r**2, 0
