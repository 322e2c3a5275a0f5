"""Models with adapted layers that nobody has attached: they refuse task_ids, which would not reach the layers."""

import sys
from collections.abc import Callable

from torch import nn

from .base import AdaptedLinear


def watch(model: nn.Module) -> None:
    """Let a model that is not attached yet refuse task_ids."""
    if not isinstance(model, AdaptedLinear) and not _is_attached(model):
        forget(model, refuse_task_ids)
        model.register_forward_pre_hook(refuse_task_ids, with_kwargs=True)


def watch_running_model() -> None:
    """`watch` of the model whose forward runs, which a layer does not know: once, as the stack is long."""
    frame, code, call = sys._getframe(1), nn.Module._call_impl.__code__, None
    while frame is not None:
        call = frame if frame.f_code is code else call
        frame = frame.f_back  # type: ignore[assignment]
    if call is not None:
        model = call.f_locals["self"]
        watch(model)
        if not isinstance(model, AdaptedLinear):
            refuse_task_ids(model, (), call.f_locals["kwargs"])


def _is_attached(model: nn.Module) -> bool:
    return any("lilora_tasks" in module.__dict__ for module in model.modules())


def refuse_task_ids(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """A model may take any keyword without a word, and its rows would be of the active task."""
    if "task_ids" in kwargs and not _is_attached(model):
        raise TypeError(
            f"task_ids do not reach the adapted layers of this {type(model).__name__} yet; call attach(model) once, after "
            "its layers were replaced"
        )


def forget(model: nn.Module, unwanted: Callable) -> None:
    """Take a hook away from before the forwards of a model and its parts."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is unwanted]:
            del module._forward_pre_hooks[key]
            del module._forward_pre_hooks_with_kwargs[key]
