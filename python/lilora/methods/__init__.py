"""The methods that `lilora train --method` knows."""

from typing import Any

from torch import nn

from lilora.errors import UserError

from .base import Method, Stage
from .lilora import LiLoRA
from .lora import DirLoRA, SequentialLoRA

__all__ = ["METHODS", "Method", "Stage", "make_method"]

METHODS: dict[str, type[Method]] = {method.name: method for method in (LiLoRA, SequentialLoRA, DirLoRA)}


def make_method(name: str, base: nn.Module, settings: dict[str, Any]) -> Method:
    """A method on a base model, for the first time or again from the settings in a bank."""
    if name not in METHODS:
        raise UserError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    return METHODS[name](base, settings)
