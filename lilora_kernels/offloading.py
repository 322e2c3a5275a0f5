"""Parameters that accelerate keeps on the CPU or a disk, and brings to the device of a forward while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def offloading(module: nn.Module) -> list[Any]:
    """accelerate's hooks that offload the module's own parameters."""
    hook = module.__dict__.get("_hf_hook")
    return [part for part in getattr(hook, "hooks", (hook,)) if getattr(part, "offload", False)]


@contextmanager
def onloaded(*parameters: nn.Module) -> Iterator[None]:
    """Bring parameters that accelerate offloads to where they are used, until the end.

    Its hooks wait for a forward of the module that holds them, and a ParameterDict has none.
    """
    hooks = [(hook, module) for module in parameters for hook in offloading(module)]
    for hook, module in hooks:
        hook.pre_forward(module)
        _tie(module)
    try:
        yield
    finally:
        for hook, module in hooks:
            hook.post_forward(module, None)
            _tie(module)


def onload(*parameters: nn.Module) -> None:
    """End the offloading of parameters: they stay where they are used."""
    for module in parameters:
        for hook in offloading(module):
            hook.pre_forward(module)
            for name in ("_hf_hook", "_old_forward", "forward"):
                module.__dict__.pop(name, None)
            _tie(module)


def _tie(module: nn.Module) -> None:
    """Of parameters by task: see TaskParameters._tie."""
    if hasattr(module, "_tie"):
        module._tie()
