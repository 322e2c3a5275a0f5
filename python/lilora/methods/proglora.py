"""ProgLoRA: a LoRA per task in a frozen pool, of which every sample adds up the few whose keys are nearest to it."""

from pydantic import Field

from .base import register_method
from .settings import RankSettings
from .task_keys import KeyedLoRAs


class ProgLoRASettings(RankSettings):
    """top: LoRAs that a sample uses, or all where there are fewer. temperature: of the softmax over their similarities."""

    top: int = Field(2, ge=1)
    temperature: float = Field(0.1, gt=0)


@register_method
class ProgLoRA(KeyedLoRAs):
    """Progressive LoRA (ProgLoRA, Findings of ACL 2025): each sample weighs the LoRAs of the tasks that it is most like.

    weights = softmax(cos(query, key) / temperature) over the `top` nearest keys. That keys are mean queries, top, the
    temperature, and that the newest LoRA is always used while it trains are our reading; the paper's task recall is not
    reproduced.
    """

    name = "proglora"
    settings_type = ProgLoRASettings

    @property
    def top(self) -> int:
        return self.options.top

    @property
    def temperature(self) -> float:
        return self.options.temperature
