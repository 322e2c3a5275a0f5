"""Serving: one copy of all tasks' factors, in the form that mixed batches read."""

from torch import nn

from .layers.accelerated import AcceleratedLinear
from .layers.base import AdaptedLinear
from .layers.experts import ExpertLinear
from .layers.lilora import LiLoRALinear
from .routing.context import tasks_of


def freeze(model: nn.Module, capacity: int | None = None, *, batch_invariant: bool = False) -> None:
    """Lay the factors of all tasks out for mixed batches, with room for `capacity` tasks (default: as many ids as were given).

    A layer then stacks nothing, whatever the number of tasks. Every U, V and fusion becomes a window of one tensor
    [capacity, ...] of its layer, so no task is held twice, and what is written into one, by `hotswap` or by hand, is seen by
    compiled and captured forwards too. `parameter.data = other` writes nothing into it, and is not seen;
    `torch.func.functional_call` with all parameters raises. They stop requiring gradients. The state dict keeps its names;
    its tensors are copies: what is written into them does not arrive, `load_state_dict` does. Adding a task keeps all tensors
    where they are; beyond `capacity` it raises. Once all ids are given, a new task takes that of a deleted one. `train()`,
    `unfreeze` and `share_memory()` end it: `eval()` does not bring it back. Freezing again with the same capacity moves none.

    While other threads compute, one thread may add, delete and swap tasks that they do not use, unfreeze, and freeze again
    with the same capacity. The first freeze, and one with another capacity, moves parameters: let no forward run then.

    Raises RuntimeError before `attach(model)` and for parameters that are sharded, shared with other processes or of several
    dtypes, ValueError for too small a capacity.

    batch_invariant: every linear layer takes the CPU kernels for any number of rows, so that a row's bits depend neither on
    the other rows of the batch nor on their tasks. Call `accelerate_linears(model)` first: RuntimeError for a layer that
    would take others. A call that they cannot run raises Unsupported.
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
    if batch_invariant and (others := [path for path, module in model.named_modules() if takes_other_kernels(module)]):
        raise RuntimeError(
            f"batch_invariant: {len(others)} modules would take kernels of torch's choice, {', '.join(others[:3])} among them; "
            "call accelerate_linears(model) first, which says why it leaves a layer alone"
        )
    for layer in layers:
        layer.set_task(*layer.active, train=False)
        layer.freeze(capacity)
        layer.batch_invariant = batch_invariant
    pin(model, batch_invariant)


def takes_other_kernels(module: nn.Module) -> bool:
    """Whether a module multiplies by weights, and not by the CPU kernels alone."""
    if isinstance(module, LiLoRALinear):
        return isinstance(module, ExpertLinear) or module.unfused_reason() is not None
    return isinstance(module, AdaptedLinear) or (
        isinstance(module, nn.Linear) and type(module) is not AcceleratedLinear
    )


def pin(model: nn.Module, batch_invariant: bool) -> None:
    for module in model.modules():
        if isinstance(module, AcceleratedLinear):
            module.pin(batch_invariant)


def unfreeze(model: nn.Module) -> None:
    """Undo `freeze`. The parameters stay where they are, and still want no gradients: see `set_task`."""
    for module in model.modules():
        if isinstance(module, LiLoRALinear):
            module.unfreeze()
    pin(model, False)
