"""What a continual-learning method is to the trainer, the evaluation and the bank."""

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class Method(ABC):
    """Learns tasks one after another on one frozen base model.

    `settings` is the JSON-able description from which the same method is built again; it goes into the bank.
    """

    name: str
    mixed_batches = False  # whether one batch may hold samples of several tasks

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        self.base = base
        self.settings = settings
        self.model: PeftModel | None = None
        self.tasks: list[str] = []

    @abstractmethod
    def add(self, task: str) -> None:
        """Make room for a task: new parameters, initialised from torch's generator."""

    @abstractmethod
    def activate(self, task: str, train: bool) -> None:
        """Let the model's forward without task ids be that of the task; `train` lets its parameters learn."""

    @abstractmethod
    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        """(the task's own tensors, the shared ones), named as the bank names them: the model's own memory."""

    def parameters_per_task(self) -> int:
        """Parameters that one more task adds to storage."""
        return sum(tensor.numel() for tensor in self.tensors(self.tasks[-1])[0].values())

    def regulariser(self) -> Tensor | None:
        """A term of the active task's loss beside the cross-entropy."""
        return None

    @torch.no_grad()
    def restore(self, tasks: dict[str, tuple[Tensors, Tensors]]) -> None:
        """Add the tasks of a bank, in their order, with the values stored there; the last one's shared values win."""
        for task, stored in tasks.items():
            self.add(task)
            for own, values in zip(self.tensors(task), stored, strict=True):
                for name, value in values.items():
                    own[name].copy_(value)

    def fingerprints(self, tasks: list[str]) -> dict[str, str]:
        """16 hex digits per task that tell its function: equal digits, equal outputs for the same batch."""
        known: dict[tuple[int, ...], str] = {}  # tasks that share tensors have them hashed once

        def digest(tensors: Tensors) -> str:
            key = tuple(tensor.data_ptr() for tensor in tensors.values())
            if key not in known:
                whole = hashlib.sha256()
                for name, tensor in sorted(tensors.items()):
                    whole.update(name.encode())
                    whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                known[key] = whole.hexdigest()
            return known[key]

        settings = json.dumps(self.settings, sort_keys=True)
        parts = {task: (settings, *map(digest, self.tensors(task))) for task in tasks}
        return {task: hashlib.sha256("".join(part).encode()).hexdigest()[:16] for task, part in parts.items()}
