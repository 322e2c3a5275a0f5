"""What a model computes with a route, and without one."""

import torch

from lilora_kernels import LiLoRALinear
from lilora_kernels.layers.lilora import set_task
from support.tiny_llava import sample


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LiLoRALinear)]


def logits(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def alone(model, inputs, images, i, name):
    """Sample i by itself, its task the active one: no route is involved."""
    set_task(model, *([] if name is None else [name]))
    try:
        return logits(model, sample(inputs, images, i))[0]
    finally:
        set_task(model, "read")


def close(got, wanted):
    assert got.shape == wanted.shape
    worst = (got - wanted).abs().max() / wanted.abs().max()
    assert worst <= 1e-5, f"{worst:.1e} of full scale"
