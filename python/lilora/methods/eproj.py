"""EProj: a task unlike all earlier ones gets a LoRA of its own; another trains that of the task it is most like."""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from .base import Batches, Inputs, Stage, Tensors, register_method
from .settings import RankSettings
from .task_keys import KeyedLoRAs


class EProjSettings(RankSettings):
    """threshold: a task whose key has at least this cosine to an earlier one's trains the LoRA of the nearest. penalty: weight
    of half the squared distance of that LoRA from where it was.
    """

    threshold: float = Field(0.9, ge=-1, le=1)
    penalty: float = Field(1.0, ge=0)


@register_method
class EProj(KeyedLoRAs):
    """EProj (arXiv 2311.16206): a task gets a new LoRA only if it is unlike the earlier ones; samples use the nearest task's.

    A LoRA for the paper's projector, keys that are mean queries, and loss + penalty / 2 sum (theta - theta*)^2 over a LoRA
    that trains again are our reading.
    """

    name = "eproj"
    settings_type = EProjSettings
    top, temperature = 1, 1.0
    _anchor: Tensors | None = None  # theta*; empty where the task has a new LoRA

    def block_of(self, key: Tensor) -> int:
        if not self.tasks:
            return 0
        near, nearest = (key @ self.keys.keys.T)[0].max(0)
        return int(self.keys.owner[nearest]) if near >= self.options.threshold else self.keys.blocks

    def begin(self, stage: Stage, batches: Batches) -> None:
        before = self.keys.blocks
        super().begin(stage, batches)
        trains_again = self.keys.blocks == before
        trained = self.block(self.keys.training) if trains_again else {}
        self._anchor = {name: p.detach().clone() for name, p in trained.items()}

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        loss = cross_entropy()[0]
        if self._anchor and self.options.penalty:
            now = self.block(self.keys.training)
            moved = torch.stack([(now[name] - before).square().sum() for name, before in self._anchor.items()]).sum()
            loss = loss + grad_accum_weight * self.options.penalty / 2 * moved
        return loss
