"""CIA: one LoRA of which, after a task, a moving average over its training is kept instead of where the training ended."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .base import Batches, Stage, Tensors, register_method
from .lora import LoRASettings, SequentialLoRA


class CIASettings(LoRASettings):
    """share: how much of the trained parameters the average takes up in a step where the formula gives no share in (0, 1),
    as in the first step of a task. start: the average starts where the "task" does, or, as in the published code, where its
    first "step" ends.
    """

    share: float = Field(0.01, gt=0, le=1)
    start: Literal["task", "step"] = "task"


@register_method
class CIA(SequentialLoRA):
    """The moving average of CIA (Large Continual Instruction Assistant, arXiv 2410.10868; code JingyangQiao/CoIN).

    From the second task on, after every step theta* <- beta theta* + (1 - beta) theta for every tensor, with the published code's
    1 - beta = 2 (1 + |g|) / (|theta - theta*| |g - g'|), l1 norms, g and g' the gradients of this step and of the last one.
    theta* starts where the task does (released: where its first step ends), and the task ends at theta*. The paper's choice
    between training a LoRA again and adding one, by words of the instructions, is not reproduced; eproj makes such a choice by
    queries.
    """

    name = "cia"
    settings_type = CIASettings
    presets = {"paper": {}, "released": {"start": "step"}}  # noqa: RUF012
    sharded_parameters = False
    one_process_reason = "it reads gradients between the steps of the optimizer"

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        self._average: Tensors = {}  # theta*, empty in the first task
        self._gradient: Tensors = {}  # g'

    def begin(self, stage: Stage, batches: Batches) -> None:
        super().begin(stage, batches)
        before = self.lora() if len(self.tasks) > 1 else {}
        self._average = {name: p.detach().clone() for name, p in before.items()}
        self._gradient = {name: torch.zeros_like(average) for name, average in self._average.items()}

    def after_step(self, step: int, steps: int, optimizer: torch.optim.Optimizer) -> None:
        lora = self.lora() if self._average else {}
        for name, p in lora.items():
            if p.grad is None:  # of a linear that no sample reached
                continue
            average, last = self._average[name], self._gradient[name]
            if step == 1 and self.options.start == "step":
                average.copy_(p)
            found = balance(p, average, p.grad, last)
            known = (found > 0) & (found < 1) & (step > 1)
            average.lerp_(p, torch.where(known, found, self.options.share).to(p.dtype))
            last.copy_(p.grad)

    def progress(self) -> Tensors:
        averages = {f"average.{name}": t for name, t in self._average.items()}
        return averages | {f"gradient.{name}": t for name, t in self._gradient.items()}

    @torch.no_grad()
    def end(self, stage: Stage, batches: Batches) -> None:
        for name, average in self._average.items():
            self.lora()[name].copy_(average)


def balance(p: Tensor, average: Tensor, gradient: Tensor, last: Tensor) -> Tensor:
    """2 (1 + |g|) / (|theta - theta*| |g - g'|) by l1 norms of tensors of one shape: a scalar, not always in (0, 1)."""
    moved, size, turned = (t.abs().sum() for t in (p - average, gradient, gradient - last))
    return 2 * (1 + size) / (moved * turned)
