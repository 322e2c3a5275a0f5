"""Where PEFT takes ours for another method.

Its wrappers by kind of task have a `task_ids` of their own, and drop it for ours; its PeftModel makes one task active; its
LoRA-FA takes all that has `lora` in its name.
"""

import functools
from collections.abc import Callable
from typing import Any

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from peft.optimizers.lorafa import LoraFAOptimizer

from lilora.errors import UserError
from lilora_kernels.routing.task_names import TaskIds

from .tuner import LiLoRAModel, refuse_both


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
        refuse_both(task_ids, kwargs.get("adapter_names"))
        with self.base_model.task_ids(task_ids):
            return forward(self, *args, **kwargs)

    return with_task_ids


def take_several_tasks() -> None:
    """Let PeftModel.set_adapter take a list of tasks of a LiLoRA model, as the tuner's own does."""
    PeftModel.set_adapter = _of_several(PeftModel.set_adapter)


def _of_several(set_adapter: Callable) -> Callable:
    @functools.wraps(set_adapter)
    def with_several(self: Any, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if isinstance(adapter_name, str) or not isinstance(self.base_model, LiLoRAModel):
            set_adapter(self, adapter_name, inference_mode)
            return
        self.base_model.set_adapter(adapter_name, inference_mode)
        if adapter_name:  # PeftModel knows one
            self.active_adapter = adapter_name[0]

    return with_several


def refuse_lora_fa() -> None:
    """Let PEFT's LoRA-FA say that it is not for LiLoRA; its first step would fail at tensors that are no pair of A and B."""
    LoraFAOptimizer.__init__ = _without_lilora(LoraFAOptimizer.__init__)


def _without_lilora(init: Callable) -> Callable:
    @functools.wraps(init)
    def checked(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        groups = list(params)
        names = [name for group in groups if isinstance(group, dict) for name in group.get("names", ())]
        if any(".lilora_" in name for name in names):
            raise UserError(
                "LoRA-FA wants LoRA's pairs of A and B, which a task of LiLoRA is not; make it active again, for its A is frozen "
                "now, and give it AdamW (train_a='never' keeps A fixed)"
            )
        init(self, groups, *args, **kwargs)

    return checked
