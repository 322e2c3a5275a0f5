"""PEFT's wrappers by kind of task have a `task_ids` of their own, for other methods, and drop it for ours."""

import functools
from collections.abc import Callable
from typing import Any

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

from lilora_kernels.routing.task_names import TaskIds

from .tuner import LiLoRAModel


def carry_task_ids() -> None:
    """Let `forward` of PeftModelForCausalLM and the like hand task_ids to a LiLoRA model, as PeftModel's does."""
    for wrapper in set(MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()):
        wrapper.forward = _carrying(wrapper.forward)


def _carrying(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def with_task_ids(self: Any, *args: Any, task_ids: TaskIds | None = None, **kwargs: Any) -> Any:
        if task_ids is None:
            return forward(self, *args, **kwargs)
        if not isinstance(self.base_model, LiLoRAModel):
            return forward(self, *args, task_ids=task_ids, **kwargs)
        with self.base_model.task_ids(task_ids):
            return forward(self, *args, **kwargs)

    return with_task_ids
