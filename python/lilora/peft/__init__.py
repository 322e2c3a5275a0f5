"""LiLoRA as a method of PEFT, which importing this teaches it."""

from peft.utils import register_peft_method

from .config import LiLoRAConfig
from .tuner import LiLoRAModel
from .wrappers import carry_task_ids, refuse_lora_fa, take_several_tasks

register_peft_method(name="lilora", config_cls=LiLoRAConfig, model_cls=LiLoRAModel)
carry_task_ids()
take_several_tasks()
refuse_lora_fa()
