"""Zero-shot: the base model as it is, for a row of every comparison."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .base import Method, Stage, Tensors, register_method
from .settings import MethodSettings


@register_method
class ZeroShot(Method):
    """The base model as it is: nothing is trained, and every task is evaluated once."""

    name = "zero-shot"
    trains_on = "nothing"
    settings_type = MethodSettings
    no_lora = "nothing is trained; use the base model itself"
    mixed_batches = True
    needs_task = False
    sharded_parameters = True
    one_state = True

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        self.read_settings(settings)
        self.model = base.requires_grad_(False)
        self.nothing = torch.zeros(0)  # a bank holds no task without tensors

    def stages(self, task: str) -> list[Stage]:
        return []

    def add(self, task: str) -> None:
        self.tasks.append(task)

    def activate(self, task: str, train: bool) -> None:
        pass

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        return {}, {"state.trained": self.nothing}

    @classmethod
    def inference_parameters(cls, settings: MethodSettings, linears: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return 0, 0

    def ranks(self) -> int:
        return 0
