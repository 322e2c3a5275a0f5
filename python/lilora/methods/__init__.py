"""The methods that `lilora train --method` knows: a module each, which registers them."""

from typing import Any

from torch import nn

from lilora.families import require_matched

from .lilora import LiLoRA  # first: lists of methods have the order of registration

# isort: split
from .adalora import AdaLoRA
from .base import METHODS, Method, Stage, register_method
from .cia import CIA
from .clora import CLoRA
from .dac import DAC
from .eproj import EProj
from .ewc import EWC
from .joint import Joint
from .loda import LoDA
from .lora import DirLoRA, SequentialLoRA
from .lwf import LwF
from .moelora import MoELoRA
from .nlora import NLoRA
from .olora import OLoRA
from .ortholora import OrthoLoRA
from .pclr.method import PCLR
from .proglora import ProgLoRA
from .replay import ExperienceReplay
from .sdlora import SDLoRA
from .sefe import SEFE
from .slao import SLAO
from .sora import SoRA
from .xgblora import XGBLoRA
from .zero_shot import ZeroShot

__all__ = [
    "CIA",
    "DAC",
    "EWC",
    "METHODS",
    "PCLR",
    "SEFE",
    "SLAO",
    "AdaLoRA",
    "CLoRA",
    "DirLoRA",
    "EProj",
    "ExperienceReplay",
    "Joint",
    "LiLoRA",
    "LoDA",
    "LwF",
    "Method",
    "MoELoRA",
    "NLoRA",
    "OLoRA",
    "OrthoLoRA",
    "ProgLoRA",
    "SDLoRA",
    "SequentialLoRA",
    "SoRA",
    "Stage",
    "XGBLoRA",
    "ZeroShot",
    "make_method",
    "register_method",
]


def make_method(name: str, base: nn.Module, settings: dict[str, Any]) -> Method:
    """A method on a base model, for the first time or again from the settings in a bank.

    Raises:
        UserError: an unknown name, a wrong setting, or target_modules that match nothing of the model.
    """
    method = METHODS.find(name)
    method.read_settings(settings)
    require_matched(base, settings.get("target_modules"))
    return method(base, settings)
