"""N-LoRA: a LoRA per task, all added up, each sparse so that it collides with the others in few weights.

The layers are those of O-LoRA: ranks "old" and "new" of one pool, all of them used by every sample.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lilora.errors import UserError

from .base import Inputs, register_method
from .olora import OLoRA
from .pooled import remove_rank_pools
from .settings import RankSettings
from .update_norm import update_l1


class NLoRASettings(RankSettings):
    """r: ranks of each task; the scale is alpha / r. l1: weight of the l1 norm of the new LoRA. product: of the "update" B A,
    as in the paper, or of the "inner" product A B [r, r], which the published code takes and only square layers have.
    """

    l1: float = Field(1e-5, ge=0)
    product: Literal["update", "inner"] = "update"


@register_method
class NLoRA(OLoRA):
    """Non-collision LoRA (N-LoRA, arXiv 2410.10179; code PKU-YuanGroup/N-LoRA): all tasks' LoRAs are summed, each sparse.

    loss + l1 * sum over linears of |B_t A_t|, entry by entry, of the newest task t. Inference needs no task.
    """

    name = "nlora"
    settings_type = NLoRASettings
    presets = {"paper": {}, "released": {"product": "inner", "l1": 0.4}}  # noqa: RUF012

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        for path, layer in self.layers.items() if self.options.product == "inner" else ():
            if layer.in_features != layer.out_features:
                remove_rank_pools(base, self.layers)
                raise UserError(
                    f"nlora: product is 'inner' and {path} has {layer.in_features} inputs and {layer.out_features} outputs, "
                    "where A B does not exist; give product=update, or target_modules of square layers"
                )

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        loss = cross_entropy()[0]
        if not self.options.l1:
            return loss
        pairs = [layer.part("new") for layer in self.layers.values()]
        inner = self.options.product == "inner"
        norms = torch.stack([update_l1(a, b) if inner else update_l1(b, a) for a, b in pairs])
        return loss + grad_accum_weight * self.options.l1 * norms.sum()
