"""The learner's side of lilora-kernels: LiLoRA as a PEFT method, continual training and its bank of tasks.

Importing it teaches PEFT the method, so that `get_peft_model`, `PeftModel.from_pretrained` and
`AutoModel.from_pretrained` understand a LiLoRA config.
"""

import sys
from pathlib import Path

from lilora.errors import missing_extra, print_error
from lilora_kernels import BatchContext, LiLoRALinear, attach, explain, freeze, route, set_task, unfreeze
from lilora_kernels.version import __version__

try:
    from peft.utils import register_peft_method
except ModuleNotFoundError as missing:
    if Path(sys.argv[0]).stem in ("lilora", "-m"):  # the command, of which the package is imported first
        print_error(missing_extra(missing))
        sys.exit(2)
    raise ImportError(missing_extra(missing)) from None

from lilora.bank.export import export_lora
from lilora.families import register_family
from lilora.peft.config import PRESETS, LiLoRAConfig
from lilora.peft.loading import hotswap
from lilora.peft.tuner import LiLoRAModel
from lilora.peft.wrappers import carry_task_ids, refuse_lora_fa

register_peft_method(name="lilora", config_cls=LiLoRAConfig, model_cls=LiLoRAModel)
carry_task_ids()
refuse_lora_fa()

__all__ = [
    "PRESETS",
    "BatchContext",
    "LiLoRAConfig",
    "LiLoRALinear",
    "LiLoRAModel",
    "__version__",
    "attach",
    "explain",
    "export_lora",
    "freeze",
    "hotswap",
    "register_family",
    "route",
    "set_task",
    "unfreeze",
]
