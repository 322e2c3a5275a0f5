"""The methods that `lilora train --method` knows."""

from typing import Any

from torch import nn

from lilora.errors import UserError

from .base import Method, Stage
from .dac import DAC
from .ewc import EWC
from .lilora import LiLoRA
from .lora import DirLoRA, SequentialLoRA
from .lwf import LwF
from .moelora import MoELoRA
from .olora import OLoRA
from .pclr.method import PCLR

__all__ = ["METHODS", "Method", "Stage", "make_method"]

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (LiLoRA, PCLR, DAC, SequentialLoRA, DirLoRA, EWC, LwF, OLoRA, MoELoRA)
}


def make_method(name: str, base: nn.Module, settings: dict[str, Any]) -> Method:
    """A method on a base model, for the first time or again from the settings in a bank."""
    if name not in METHODS:
        raise UserError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    return METHODS[name](base, settings)
