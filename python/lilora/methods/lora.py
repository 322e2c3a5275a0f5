"""The two baselines, with PEFT's own LoRA: one LoRA for all tasks, and one LoRA per task."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from pydantic import Field
from torch import nn

from lilora.bank.bank import Bank
from lilora.bank.export import PlainLoRA, plain_lora
from lilora.module_names import unwrapped
from lilora_kernels.layers.lilora import DROPOUT, RANK

from .base import Method, Tensors, lora_parameters, register_method
from .settings import MethodSettings, alpha_field


class LoRASettings(MethodSettings):
    """Fields of peft.LoraConfig, with target_modules as a pattern."""

    r: int = Field(RANK, ge=1)
    lora_alpha: float = alpha_field()
    lora_dropout: float = Field(DROPOUT, ge=0, lt=1)
    renamed = {"alpha": "lora_alpha", "dropout": "lora_dropout"}  # noqa: RUF012


class DirLoRASettings(LoRASettings):
    """same_start: whether A of every task starts where that of the first did, as of models that are trained apart from one
    seed, which is the run's; else each task draws a start of its own.
    """

    same_start: bool = False


@contextmanager
def from_seed(seed: int) -> Iterator[None]:
    """What is drawn inside, on the CPU as PEFT does, is the same every time: a resumed run has no first start to copy."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@register_method
class DirLoRA(Method):
    """A LoRA per task: nothing is forgotten with the task given, at the full price of a LoRA for each.

    In the bank A is lora_A's weight and B0 is lora_B's, and a task owns both.
    """

    name = "dirlora"
    sharded_parameters = True
    one_basis = False
    settings_type: type[LoRASettings] = DirLoRASettings

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        self.options = self.read_settings(settings)

    def adapter(self, task: str) -> str:
        return task

    def add(self, task: str) -> None:
        config = LoraConfig(**self.options.model_dump(include=set(LoRASettings.model_fields)))
        same = isinstance(self.options, DirLoRASettings) and self.options.same_start
        with from_seed(self.seed) if same else nullcontext():
            if self.model is None:
                self.model = get_peft_model(self.base, config, adapter_name=self.adapter(task))
            elif self.adapter(task) not in self.model.peft_config:
                self.model.add_adapter(self.adapter(task), config)
        self.tasks.append(task)

    def activate(self, task: str, train: bool) -> None:
        self.model.set_adapter(self.adapter(task), inference_mode=not train)

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        weights = {}
        for path, layer in self.model.base_model.model.named_modules():
            if isinstance(layer, Linear):
                weights[f"{unwrapped(path)}.A"] = layer.lora_A[self.adapter(task)].weight
                weights[f"{unwrapped(path)}.B0"] = layer.lora_B[self.adapter(task)].weight
        return {}, weights

    @classmethod
    def as_lora(cls, bank: Bank, task: str) -> PlainLoRA:
        _, stored = bank.load_task(task if cls.needs_task else bank.tasks[-1])
        options = cls.read_settings(bank.config["settings"])
        return plain_lora({}, stored, options.r, options.lora_alpha, options.lora_dropout)

    @classmethod
    def inference_parameters(cls, settings: LoRASettings, linears: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return 0, lora_parameters(settings.r, linears)

    def ranks(self) -> int:
        return self.options.r * len(self.tasks)


@register_method
class SequentialLoRA(DirLoRA):
    """One LoRA that is trained task after task: what forgetting looks like.

    No task adds parameters to the model; the bank keeps the LoRA as it was after each.
    """

    name = "lora"
    needs_task = False
    one_basis = True
    settings_type = LoRASettings

    def adapter(self, task: str) -> str:
        return "default"

    def lora(self) -> Tensors:
        """A and B of the one LoRA."""
        return SequentialLoRA.tensors(self, self.tasks[-1])[1]

    def parameters(self) -> int:
        return sum(p.numel() for p in self.lora().values())

    @classmethod
    def inference_parameters(cls, settings: LoRASettings, linears: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return lora_parameters(settings.r, linears), 0

    def ranks(self) -> int:
        return self.options.r
