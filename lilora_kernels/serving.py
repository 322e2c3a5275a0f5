"""Serving: one copy of all tasks' factors, in the form that mixed batches read."""

from torch import nn

from .context import tasks_of
from .linear import LiLoRALinear


def freeze(model: nn.Module, capacity: int | None = None) -> None:
    """Lay the factors of all tasks out for mixed batches, with room for `capacity` ids (default: those that there are).

    A layer then stacks nothing, whatever the number of tasks. Every U, V and fusion becomes a window of one tensor
    [capacity, ...] of its layer, so no task is held twice, and what is written into one, by `hotswap` or by hand, is seen by
    compiled and captured forwards too (`parameter.data = other` writes nothing into it, and is not seen). They stop
    requiring gradients. The state dict does not change. Adding a task keeps all tensors where they are; beyond `capacity`
    it raises. `train()` and `unfreeze` end it. Raises RuntimeError before `attach(model)` and for parameters that are
    offloaded, sharded or of several dtypes, ValueError for too small a capacity.
    """
    tasks = tasks_of(model)
    taken = len(tasks.names)
    capacity = taken if capacity is None else capacity
    if capacity < max(taken, 1):
        raise ValueError(
            f"capacity is {capacity}, but {taken} ids are taken, those of deleted tasks among them; give more"
        )
    layers = [module for module in model.modules() if isinstance(module, LiLoRALinear)]
    for layer in layers:
        layer.require_freezable()
    for layer in layers:
        layer.set_task(*layer.active, train=False)
        layer.freeze(capacity)


def unfreeze(model: nn.Module) -> None:
    """Undo `freeze`. The parameters stay where they are, and still want no gradients: see `set_task`."""
    for module in model.modules():
        if isinstance(module, LiLoRALinear):
            module.unfreeze()
