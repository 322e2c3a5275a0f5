"""SEFE's RegLoRA: a LoRA per task, all added up, each kept from the weights that the earlier ones changed most.

The layers are those of O-LoRA: ranks "old" and "new" of one pool, all of them used by every sample.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lilora_kernels.layers.rank_pool import RankPoolLinear

from .base import Batches, Inputs, Stage, register_method
from .olora import OLoRA
from .settings import RankSettings
from .update_norm import update_l1


class SEFESettings(RankSettings):
    """r: ranks of each task; the scale is alpha / r. penalty: lambda. share: of the elements of a task's update in each
    linear, those of the largest absolute values, which later tasks are kept from. scaled: whether the scale is part of what
    is penalised; in the published code it is not.
    """

    penalty: float = Field(2500.0, ge=0)
    share: float = Field(0.02, gt=0, le=1)
    scaled: bool = True


@register_method
class SEFE(OLoRA):
    """RegLoRA of SEFE (arXiv 2505.02486; code jinpeng0528/SEFE): all tasks' LoRAs are summed, key weights are spared.

    loss + lambda * mean over linears of sum_i |M_i * (s B A)| / sum_i |M_i|, i over the earlier tasks: M_i [N, K] is 1 at
    the largest elements of B_i A_i and 0 elsewhere, s = alpha / r (released: 1). SEFE's answer-style diversification is
    work on the data.
    """

    name = "sefe"
    settings_type = SEFESettings
    presets = {"paper": {}, "released": {"scaled": False}}  # noqa: RUF012
    _counts: dict[str, Tensor] | None = None  # path -> sum_i M_i [N, K]; empty in the first task

    def begin(self, stage: Stage, batches: Batches) -> None:
        super().begin(stage, batches)
        kept = self.options.penalty and len(self.tasks) > 1
        self._counts = {path: self._key_elements(layer) for path, layer in self.layers.items()} if kept else {}

    @torch.no_grad()
    def _key_elements(self, layer: RankPoolLinear) -> Tensor:
        """Of how many earlier tasks an element of the layer's weight is a key element, [N, K] int16."""
        a, b = layer.part("old")
        counts = torch.zeros(layer.out_features, layer.in_features, dtype=torch.int16, device=a.device)
        keys = max(1, int(self.options.share * counts.numel()))
        for a_i, b_i in zip(a.split(self.options.r), b.split(self.options.r, 1), strict=True):
            counts.view(-1)[(b_i @ a_i).abs().view(-1).topk(keys).indices] += 1
        return counts

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        loss = cross_entropy()[0]
        if not self._counts:
            return loss
        means = []
        for path, counts in self._counts.items():
            a, b = self.layers[path].part("new")
            means.append(update_l1(b, a, counts) / counts.sum())
        scale = self.options.alpha / self.options.r if self.options.scaled else 1
        return loss + grad_accum_weight * self.options.penalty * scale * torch.stack(means).mean()
