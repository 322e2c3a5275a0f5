"""gate_proj and up_proj of a gated MLP in one operation: two adapters of one input, one shrink."""

import operator
from collections.abc import Sequence
from functools import partial
from operator import is_not

import torch
from torch import Tensor, fx, nn

from .. import functional
from ..ops.delta_pair.register import delta_pair
from .base import Factors, has_hooks
from .lilora import LiLoRALinear

FORMULA = "down_proj(act_fn(gate_proj(x)) * up_proj(x))"
EQUAL = ("rank", "sub_rank", "alpha", "dropout", "fusion", "training")


def fuse_mlps(model: nn.Module) -> dict[str, str | None]:
    """Compute gate_proj and up_proj of every adapted MLP of `model` together, by `delta_pair`.

    An MLP is any module that computes down_proj(act_fn(gate_proj(x)) * up_proj(x)) with a gate_proj and an up_proj that
    are LiLoRALinear. Returns, for each by its path, None if it is fused now, or why it was left as it is. A fused MLP looks
    again in every forward, and runs its layers apart while something is in the way: a merged task, a hook, a trained base.

    In training both adapters get the same dropout mask. Parameters, state dict and tasks are not
    touched. Undone by `unfuse_mlps`, and by unloading the adapters.
    """
    found = {}
    for path, mlp in model.named_modules():
        if is_adapted(mlp):
            found[path] = None if is_fused(mlp) else unfused_mlp_reason(mlp)
            if found[path] is None:
                # A bound method would be looked up in the class when unpickled.
                mlp.forward = partial(_fused_forward, mlp)
    return found


def unfuse_mlps(model: nn.Module) -> None:
    """Undo `fuse_mlps`."""
    for module in model.modules():
        if is_fused(module):
            del module.forward


def is_fused(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "func", None) is _fused_forward


def is_adapted(module: nn.Module) -> bool:
    """Whether a module has gate_proj and up_proj as an MLP has, one of them adapted at least."""
    children = module._modules
    return {"gate_proj", "up_proj", "down_proj"} <= children.keys() and any(
        isinstance(children[name], LiLoRALinear) for name in ("gate_proj", "up_proj")
    )


def pairs(model: nn.Module) -> dict[nn.Module, tuple[str, str | None]]:
    """For each adapted gate_proj and up_proj: the name of the other, and why the two are computed apart, or None."""
    found = {}
    for mlp in model.modules():
        if is_adapted(mlp):
            if is_fused(mlp):
                reason = unfused_reason(mlp.gate_proj, mlp.up_proj)
            else:
                reason = unfused_mlp_reason(mlp) or "fuse_mlps was not called"
            found[mlp.gate_proj], found[mlp.up_proj] = ("up_proj", reason), ("gate_proj", reason)
    return found


def unfused_mlp_reason(mlp: nn.Module) -> str | None:
    """Why `fuse_mlps` leaves an adapted MLP as it is, or None."""
    if "forward" in mlp.__dict__:
        return "its forward was replaced"
    if formula(mlp) != FORMULA:
        return f"{type(mlp).__name__} does not compute {FORMULA}"
    gate, up = mlp.gate_proj, mlp.up_proj
    reason = unfused_reason(gate, up)
    if reason is None and gate.tasks != up.tasks:
        reason = f"gate_proj has the tasks {gate.tasks} and up_proj {up.tasks}"
    return reason


def unfused_reason(gate: nn.Module, up: nn.Module) -> str | None:
    """Why a forward has to compute the two apart, or None; says nothing of tasks (see `LiLoRALinear.forward`)."""
    for name, layer in (("gate_proj", gate), ("up_proj", up)):
        if not isinstance(layer, LiLoRALinear):
            return f"{name} is not adapted"
        if has_hooks(layer):
            return f"{name} has hooks"
        if layer.batch_invariant:
            return f"{name} is batch-invariant"
        if layer.merged_task is not None:
            return f"{name} has a merged task"
        if layer.unfused_reason() is not None:
            return f"in {name} {layer.unfused_reason()}"
    for name in EQUAL:
        if getattr(gate, name) != getattr(up, name):
            return f"{name} is {getattr(gate, name)} in gate_proj and {getattr(up, name)} in up_proj"
    return None


def _fused_forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    (x,) = (*args, *kwargs.values())  # classes call it x, hidden_state or hidden_states
    pair = None if unfused_reason(self.gate_proj, self.up_proj) else gate_and_up(self.gate_proj, self.up_proj, x)
    if pair is None:
        return type(self).forward(self, x)
    gate, up = pair
    return self.down_proj(self.act_fn(gate) * up)


def gate_and_up(
    gate: LiLoRALinear, up: LiLoRALinear, x: Tensor, task: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """(gate(x), up(x)) in one operation, arguments as of a layer; None where a layer is the base alone."""
    first_and_rows, second_and_rows = (layer._adapter(x, task) for layer in (gate, up))
    if first_and_rows is None or second_and_rows is None:
        return None
    (first, rows), (second, other_rows) = first_and_rows, second_and_rows
    # Rows are positions among the tasks that a layer stacks. A running context gives both layers the same ones, unless another
    # thread freezes the model or changes its tasks in between.
    if not torch.compiler.is_compiling() and task is None and rows is not other_rows:
        return None
    if rows is not None and (gate.lilora_U.keys() != up.lilora_U.keys() or gate.stacking() != up.stacking()):
        return None
    cast, p = functional.autocast(x), gate._p
    bases = tuple(base for layer in (gate, up) for base in (layer.base_layer.weight, layer.base_layer.bias))
    for weight in bases[::2]:
        functional.check_dtypes("delta_pair", x, cast, weight)
    seed = functional.draw_seed(x.device) if p else None
    ys = pair_of(first, second).run(delta_pair, cast, bases, rows, None, None, seed, gate.lilora_scaling, p, None)
    for layer, y in zip((gate, up), ys, strict=True):
        layer._expect_same_tasks(y)
    return ys


class Pair(Factors):
    """Those of gate_proj, then those of up_proj."""

    def arguments(self, base: Sequence, rest: tuple) -> tuple:
        task, _, _, *more = rest
        return *base[:2], *self[:5], *base[2:], *self[5:], task, *more


def pair_of(first: Factors, second: Factors) -> Pair:
    """The same one for the same factors: it has a settled call."""
    found = first.__dict__.get("pair")
    if found is None or any(map(is_not, found, (*first, *second))):
        found = first.__dict__["pair"] = Pair((*first, *second))
    return found


class _Children(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return True


def formula(module: nn.Module) -> str | None:
    """What the class of a module computes of its children and one input x; None if it does anything else."""
    try:
        graph = _Children().trace(module)
    except Exception:  # whatever a forward does with a symbol that is no tensor
        return None
    (result,) = next(node for node in graph.nodes if node.op == "output").args
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return _formula(result) if len(inputs) == 1 else None


def _formula(value: object) -> str:
    if not isinstance(value, fx.Node):
        return repr(value)
    if value.op == "placeholder":
        return "x"
    parts = [_formula(part) for part in value.args]
    if value.op == "call_module" and not value.kwargs:
        return f"{value.target}({', '.join(parts)})"
    if value.target is operator.mul:
        return " * ".join(sorted(parts))
    return f"{value}({', '.join(parts)})"
