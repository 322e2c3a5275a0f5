"""Experience replay: one LoRA that, while it trains on a task, sees a few stored samples of the earlier ones again."""

from pydantic import Field

from .base import Stage, register_method
from .lora import LoRASettings, SequentialLoRA


class ReplaySettings(LoRASettings):
    """memory: training samples of each earlier task that are replayed, at most, drawn at random by the run's seed.
    share: of the samples of every optimizer step, those that are replayed, from the second task on.
    """

    memory: int = Field(256, ge=1)
    share: float = Field(0.5, gt=0, lt=1)


@register_method
class ExperienceReplay(SequentialLoRA):
    """One LoRA that is trained task after task, with stored samples of the earlier tasks in every step.

    Experience replay (arXiv 1902.10486): each step is one on new samples and as many drawn from the memory, with one loss
    over both.
    """

    name = "replay"
    trains_on = "earlier"
    settings_type = ReplaySettings

    def stages(self, task: str) -> list[Stage]:
        if not self.tasks:
            return super().stages(task)
        return [Stage("learn", task, replayed=self.options.share, memory=self.options.memory)]
