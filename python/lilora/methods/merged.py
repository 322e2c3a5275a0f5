"""What DAC and XGBLoRA share: what a task trained goes into the base weights, and the bank keeps it to do so again."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from lilora.bank.bank import Bank

from .base import Tensors
from .pooled import PooledMethod, remove_rank_pools


class MergedLoRAs(PooledMethod):
    """After a task the layers are plain: inference is the base model with other weights, whatever the task."""

    no_lora = "what it trains becomes part of the base weights; export the whole model with lilora bank merge"

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        self.trained: dict[str, Tensors] = {}  # of each task, as the bank has it

    @abstractmethod
    def _merge(self, task: str, stored: Tensors) -> None:
        """Add what a task trained to the base weights and keep `stored` in `trained`; the layers are plain again."""

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        return {}, self.trained[task]

    def restore(self, tasks: dict[str, tuple[Tensors, Tensors]]) -> None:
        for task, (_, stored) in tasks.items():
            self.tasks.append(task)
            self._merge(task, {name: tensor.to(self.model.device) for name, tensor in stored.items()})

    @classmethod
    def merge(cls, base: nn.Module, bank: Bank, task: str) -> None:
        method = cls(base, bank.config["settings"])
        method.restore(bank.load_tasks())
        remove_rank_pools(base, method.layers)

    def fingerprints(self, tasks: list[str]) -> dict[str, str]:
        own = super().fingerprints(self.tasks)  # all that is merged acts on every task
        whole = hashlib.sha256("".join(own.values()).encode()).hexdigest()[:16]
        return dict.fromkeys(tasks, whole)

    @classmethod
    def inference_parameters(cls, settings: Any, linears: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return 0, 0

    def ranks(self) -> int:
        return 0

    def parameters(self) -> int:
        return 0
