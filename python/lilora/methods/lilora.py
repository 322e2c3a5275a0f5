"""LoRA in LoRA: every task is an adapter on a shared basis."""

from collections.abc import Callable
from typing import Any

from peft import get_peft_model
from torch import Tensor, nn

from lilora.bank.bank import Bank
from lilora.bank.export import PlainLoRA, plain_lora
from lilora.errors import UserError
from lilora.peft.config import OF_METHOD, PRESETS, LiLoRAConfig
from lilora.peft.layer import adapted_layers
from lilora.peft.tuner import task_tensors
from lilora_kernels.backends import choose

from .base import Inputs, Method, Tensors
from .stability import StabilityLoss


class LiLoRA(Method):
    """settings: the fields of LiLoRAConfig that differ from its defaults, with target_modules as a pattern."""

    name = "lilora"
    mixed_batches = True
    sharded_parameters = True
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

    @classmethod
    def read_settings(cls, settings: dict[str, Any]) -> LiLoRAConfig:
        for name in settings:
            if name not in OF_METHOD:
                raise UserError(f"lilora has no setting {name!r}; it has {', '.join(OF_METHOD)}")
        return LiLoRAConfig(**settings)

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

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], share: float) -> Tensor:
        loss = cross_entropy()[0]
        return loss if self._stability is None else loss + share * self._stability()

    def ranks(self) -> int:
        config = self.read_settings(self.settings)
        return config.r + config.sub_rank * len(self.tasks)

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        return task_tensors(adapted_layers(self.model), task)

    @classmethod
    def as_lora(cls, bank: Bank, task: str) -> PlainLoRA:
        own, _ = bank.load_task(task)
        _, shared = bank.load_task(bank.tasks[-1])  # the newest serve all tasks
        config = cls.read_settings(bank.config["settings"])
        return plain_lora(own, shared, config.r, config.alpha, config.dropout)
