"""The two baselines, with PEFT's own LoRA: one LoRA for all tasks, and one LoRA per task."""

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear

from .base import Method, Tensors


class DirLoRA(Method):
    """A LoRA per task: nothing is forgotten with the task given, at the full price of a LoRA for each.

    settings: fields of peft.LoraConfig. In the bank A is lora_A's weight and B0 is lora_B's, and a task owns both.
    """

    name = "dirlora"

    def adapter(self, task: str) -> str:
        return task

    def add(self, task: str) -> None:
        config = LoraConfig(**self.settings)
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
                weights[f"{path}.A"] = layer.lora_A[self.adapter(task)].weight
                weights[f"{path}.B0"] = layer.lora_B[self.adapter(task)].weight
        return {}, weights

    def ranks(self) -> int:
        return self.settings["r"] * len(self.tasks)

    def parameters_per_task(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors(self.tasks[-1])[1].values())


class SequentialLoRA(DirLoRA):
    """One LoRA that goes on learning task after task: what forgetting looks like.

    No task adds parameters to the model; the bank keeps the LoRA as it was after each.
    """

    name = "lora"

    def adapter(self, task: str) -> str:
        return "default"

    def ranks(self) -> int:
        return self.settings["r"]

    def parameters_per_task(self) -> int:
        return 0
