"""LoRA in LoRA: every task is an adapter on a shared basis."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from peft import get_peft_model
from pydantic import Field, create_model
from torch import Tensor, nn

from lilora.bank.bank import Bank
from lilora.bank.export import PlainLoRA, plain_lora
from lilora.errors import UserError
from lilora.peft.config import OF_METHOD, PRESETS, LiLoRAConfig
from lilora.peft.layer import adapted_layers
from lilora.peft.tuner import task_tensors
from lilora_kernels.backends import choose

from .base import Inputs, Method, Tensors, lora_parameters, register_method
from .settings import MethodSettings
from .stability import StabilityLoss


class _OfConfig(MethodSettings):
    @classmethod
    def _made(cls, values: dict[str, Any]) -> LiLoRAConfig:
        """The config with these settings, which checks them itself; UserError in one sentence."""
        return LiLoRAConfig(**values)


LiLoRASettings = create_model(
    "LiLoRASettings",
    __base__=_OfConfig,
    __module__=__name__,
    **{
        f.name: (f.type, Field(f.default, json_schema_extra=dict(f.metadata)))
        for f in fields(LiLoRAConfig)
        if f.name in OF_METHOD
    },
)


@register_method
class LiLoRA(Method):
    """A basis A, B0 for all tasks, and small U, V and a fusion weight for each."""

    name = "lilora"
    mixed_batches = True
    sharded_parameters = True
    one_basis = True
    peft_adapters = True
    settings_type = LiLoRASettings
    presets = PRESETS

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        config = self.read_settings(settings)
        # Wrong settings, and a backend ordered that cannot run, are known before training.
        try:
            choose("linear", next(base.parameters()).new_empty(1, 1), config.r, config.sub_rank)
        except (RuntimeError, ValueError) as error:
            raise UserError(str(error)) from error
        self._stability: StabilityLoss | None = None

    def add(self, task: str) -> None:
        config = self.read_settings(self.settings)
        if self.model is None:
            self.model = get_peft_model(self.base, config, adapter_name=task)
        else:
            self.model.add_adapter(task, config)
        self.tasks.append(task)

    def activate(self, task: str, train: bool) -> None:
        self.model.set_adapter(task, inference_mode=not train)
        weight = self.settings.get("stability", 0.0)
        self._stability = StabilityLoss(adapted_layers(self.model), task, weight) if train and weight else None

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        loss = cross_entropy()[0]
        return loss if self._stability is None else loss + grad_accum_weight * self._stability()

    def ranks(self) -> int:
        config = self.read_settings(self.settings)
        return config.r + config.sub_rank * len(self.tasks)

    @classmethod
    def inference_parameters(cls, settings: LiLoRAConfig, linears: Sequence[tuple[int, int]]) -> tuple[int, int]:
        r, sub_rank = settings.r, settings.sub_rank
        own = sum(n * sub_rank + sub_rank * r + int(settings.fusion) for n, _ in linears)
        return lora_parameters(r, linears), own

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        return task_tensors(adapted_layers(self.model), task)

    @classmethod
    def as_lora(cls, bank: Bank, task: str) -> PlainLoRA:
        own, _ = bank.load_task(task)
        _, shared = bank.load_task(bank.tasks[-1])  # the newest serve all tasks
        config = cls.read_settings(bank.config["settings"])
        return plain_lora(own, shared, config.r, config.alpha, config.dropout, config.expert_r)
