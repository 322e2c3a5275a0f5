"""Joint training: one LoRA on the samples of all tasks at once, which no sequence of tasks is to surpass."""

from .base import Stage, register_method
from .lora import SequentialLoRA


@register_method
class Joint(SequentialLoRA):
    """One LoRA trained on all tasks of the run together, shuffled: the upper bound (MT).

    The first task's training is on the samples of all tasks, for as many epochs as each task has, or for its --max-steps
    times the number of tasks; the later tasks add nothing. All tasks have the same state.
    """

    name = "joint"
    trains_on = "all"
    one_state = True
    one_basis = None

    def stages(self, task: str) -> list[Stage]:
        return [] if self.tasks else super().stages(task)
