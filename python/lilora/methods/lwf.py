"""LwF: one LoRA that, on a new task's inputs, is to answer as it did before the task."""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from .base import Batches, Inputs, Stage, Tensors, answer_positions, evaluating, register_method, without_labels
from .distillation import divergence
from .lora import LoRASettings, SequentialLoRA


class LwFSettings(LoRASettings):
    """distillation: weight of the distillation; temperature: of both softmaxes."""

    distillation: float = Field(1.0, ge=0)
    temperature: float = Field(2.0, gt=0)


@register_method
class LwF(SequentialLoRA):
    """Learning without forgetting (arXiv 1606.09282) with a LoRA: loss + weight * KL(teacher || student), from task 2 on.

    The teacher is the model before the task, without dropout; both see the same inputs, and the divergence is the mean
    over the tokens of the answers. As in that paper the temperature is 2, the weight 1 and there is no factor T^2.
    """

    name = "lwf"
    sharded_parameters = False
    settings_type = LwFSettings
    answers_only = True

    _teacher: Tensors | None = None  # the LoRA before the task by parameter name; none in the first task

    def begin(self, stage: Stage, batches: Batches) -> None:
        super().begin(stage, batches)
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        self._teacher = {name: p.detach().clone() for name, p in trained} if len(self.tasks) > 1 else {}

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        if not (self._teacher and self.options.distillation):
            return cross_entropy()[0]
        answered = answer_positions(inputs)
        target = self._teacher_logits(inputs)[answered]
        loss, outputs = cross_entropy()
        divergent = divergence(outputs.logits[answered], target, self.options.temperature).mean()
        return loss + grad_accum_weight * self.options.distillation * divergent

    @torch.no_grad()
    def _teacher_logits(self, inputs: Inputs) -> Tensor:
        """[B, L, V], or [B, K, V] of the K positions that the batch asks for."""
        with evaluating(self.model):
            return torch.func.functional_call(self.model, self._teacher, (), without_labels(inputs)).logits
