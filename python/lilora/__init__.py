"""The learner's side of lilora-kernels: LiLoRA as a PEFT method, continual training and its bank of tasks.

Importing it teaches PEFT the method, so that `get_peft_model`, `PeftModel.from_pretrained` and
`AutoModel.from_pretrained` understand a LiLoRA config.
"""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilora.errors import missing_extra
from lilora_kernels import BatchContext, LiLoRALinear, attach, explain, freeze, route, set_task, unfreeze
from lilora_kernels.version import __version__

if TYPE_CHECKING:
    from .bank.export import export_lora
    from .families import register_family
    from .peft.config import PRESETS, LiLoRAConfig
    from .peft.loading import hotswap
    from .peft.tuner import LiLoRAModel

OF_PEFT = {
    "PRESETS": "peft.config",
    "LiLoRAConfig": "peft.config",
    "LiLoRAModel": "peft.tuner",
    "export_lora": "bank.export",
    "hotswap": "peft.loading",
    "register_family": "families",
}


def __getattr__(name: str) -> Any:
    if name not in OF_PEFT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{OF_PEFT[name]}"), name)


def is_command() -> bool:
    """Whether the `lilora` command runs. Of `python -m lilora` this package is imported first, while sys.argv has -m."""
    if sys.argv[0] == "-m":
        return re.fullmatch(r"(-\w*m)?lilora", sys.orig_argv[-len(sys.argv)]) is not None
    return Path(sys.argv[0]).name in ("lilora", "lilora.exe")


# The command imports PEFT, for seconds, where it takes a model.
if not is_command():
    try:
        import_module(f"{__name__}.peft")
    except ModuleNotFoundError as missing:
        raise ImportError(missing_extra(missing)) from None
    globals().update({name: __getattr__(name) for name in OF_PEFT})

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
