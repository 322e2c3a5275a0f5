"""SD-LoRA: the directions of earlier tasks stay, and how far to go along each of them is trained on.

In the formula of the gated pool: ranks "old" and "new" of one pool, and a gate that repeats a task's magnitude over its ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lilora.bank.bank import Bank
from lilora.bank.export import PlainLoRA
from lilora_kernels.layers.rank_pool import Choice, Chooser, RankPoolLinear

from .base import Batches, Inputs, Stage, Tensors, lora_parameters, register_method
from .olora import ALL_RANKS, OLoRA
from .pooled import require_grad_only
from .redundancy import rank_gram
from .settings import RankSettings

PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "released": {"norm": "factors", "restart": 0.8}}


class SDLoRASettings(RankSettings):
    """r: ranks of each task; the scale is alpha / r. norm: a task's B A is divided, after the task, by the Frobenius norm of
    the "product", as in the paper, or by the product of those of its "factors", as in the published code. restart: the
    magnitude that all tasks have at the start of a new one, 0.8 in the code; None: the earlier ones go on from where they were
    and the new one starts at 1 (our reading).
    """

    norm: Literal["product", "factors"] = "product"
    restart: float | None = Field(None, gt=0)


class Magnitudes(nn.Module):
    """g = the magnitude of each rank's task, for every row; `lora_magnitude` [tasks] in fp32 at least, in their order."""

    def __init__(self, linear: nn.Linear, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks  # of each task
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        self.put(torch.empty(0, dtype=wide, device=linear.weight.device))

    def put(self, magnitudes: Tensor) -> None:
        self.lora_magnitude = nn.Parameter(magnitudes.detach().clone(), requires_grad=False)

    def forward(self, layer: RankPoolLinear, x: Tensor) -> tuple[Choice, None]:
        return Choice(ALL_RANKS.groups, self.lora_magnitude.repeat_interleave(self.ranks)[None]), None


@register_method
class SDLoRA(OLoRA):
    """SD-LoRA (arXiv 2501.13198): all tasks' LoRAs are summed, each as a frozen direction times a magnitude that trains on.

    y = x W^T + alpha / r sum over tasks k of m_k D(x) (B_k A_k)^T / norm(B_k A_k). The newest B A trains without its norm,
    which is 0 at the start, and is divided by it after the task, its magnitude multiplied: the function stays. A magnitude
    for each linear and task is our reading. Inference needs no task. The bank has m as `state.*.magnitude`.
    """

    name = "sdlora"
    settings_type = SDLoRASettings
    presets = PRESETS

    def chooser(self, path: str, linear: nn.Linear) -> Chooser:
        return Magnitudes(linear, self.options.r)

    def magnitudes(self) -> Tensors:
        return {f"state.{path}.magnitude": layer.choose.lora_magnitude for path, layer in self.layers.items()}

    def add(self, task: str) -> None:
        super().add(task)
        start = self.options.restart
        for layer in self.layers.values():
            old = layer.choose.lora_magnitude.detach()
            layer.choose.put(torch.cat([old if start is None else torch.full_like(old, start), old.new_ones(1)]))
            if start is not None:
                layer.choose.lora_magnitude.data[-1] = start

    def activate(self, task: str, train: bool) -> None:
        require_grad_only(self.model, *((*self.new().values(), *self.magnitudes().values()) if train else ()))

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        return cross_entropy()[0]

    @torch.no_grad()
    def end(self, stage: Stage, batches: Batches) -> None:
        for layer in self.layers.values():
            a, b = layer.part("new")
            norm = direction_norm(a, b, self.options.norm)
            if norm > 0:  # a linear that no sample reaches has B = 0
                b.div_(norm)
                layer.choose.lora_magnitude[-1] *= norm

    # --- the bank ---------------------------------------------------------------------------------------------------

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        return {}, super().tensors(task)[1] | self.magnitudes()

    def restore(self, tasks: dict[str, tuple[Tensors, Tensors]]) -> None:
        super().restore(tasks)
        for path, layer in self.layers.items() if tasks else ():
            stored = tasks[self.tasks[-1]][1][f"state.{path}.magnitude"]
            layer.choose.put(stored.to(layer.choose.lora_magnitude))

    @classmethod
    def as_lora(cls, bank: Bank, task: str) -> PlainLoRA:
        lora = super().as_lora(bank, task)
        _, stored = bank.load_task(bank.tasks[-1])
        ranks = cls.read_settings(bank.config["settings"]).r
        factors = {
            path: (a, b * stored[f"state.{path}.magnitude"].repeat_interleave(ranks))
            for path, (a, b) in lora.factors.items()
        }
        return PlainLoRA(factors, lora.scaling, lora.dropout)

    @classmethod
    def inference_parameters(cls, settings: SDLoRASettings, linears: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return 0, lora_parameters(settings.r, linears) + len(linears)


def direction_norm(a: Tensor, b: Tensor, norm: str) -> Tensor:
    """Frobenius norm of B A ("product"), or the product of those of A and B ("factors"): A [r, K], B [N, r] -> fp64 scalar."""
    if norm == "factors":
        return a.double().norm() * b.double().norm()
    return rank_gram(a, b, a, b).sum().clamp_min(0).sqrt()
