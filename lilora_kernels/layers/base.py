"""What the adapted linear layers have in common: a frozen base layer and one operation that adds the adapter to it."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from inspect import getsource, isfunction
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, functional
from ..offloading import offloading
from ..ops import cpu_runtime
from ..ops.delta.register import delta
from ..ops.linear.register import linear
from ..ops.operation import (
    TENSORS_OR_NONE,
    Operation,
    conditions,
    is_any_watching,
    is_transformed,
    needs_graph,
    require_memory,
)
from ..ops.schema import AdapterArgs
from ..routing.context import TEXT, Tasks
from .accelerated import INVARIANT, is_plain, parameters_of


def takes_none(*args: Tensor | None) -> None:
    """The bound call where there is none."""


class Factors(tuple):
    """(a, b0, u, v, fusion) of one call, or of many: what is settled in the first two need not be again."""

    # Without and with gradients, and in blocks: the kind of call that was checked, and that call bound to its parameters;
    # without gradients from the second on. A pair is always set together: layers serve several threads.
    settled: tuple[tuple, Callable | None] = (), None
    settled_grads: tuple[tuple, Callable | None] = (), None
    settled_blocks: tuple[tuple, Callable] = (), takes_none

    def run(self, operation: Operation, x: Tensor, base: tuple[Tensor | None, ...], *rest: Any) -> Any:
        """y [..., N] of `lilora::linear` or `delta` for x [..., K]. base: (weight, bias) or (); rest: task to ranks."""
        if is_transformed() or not TENSORS_OR_NONE.issuperset(map(type, (x, *self))):
            return functional.of_rows(operation, x, *self.arguments(base, rest))
        grads = torch.is_grad_enabled() and torch._C._any_requires_grad(x, *self)
        at = "settled_grads" if grads else "settled"
        kind = x.dtype, x.device, x.shape[-1], *rest[-3:], *conditions(*self, *base)
        settled, bound = getattr(self, at)
        # Gates are others in every call.
        known = settled == kind and rest[1] is None and (rest[0] is None or rest[0].shape[0] == x.shape[:-1].numel())
        if not known:
            bound = None
        # With gradients the first call is as the others: checkpoints compare what a forward and its repetition save.
        if rest[1] is None and (known or grads) and not is_any_watching():
            if bound is None:
                args = x.reshape(-1, x.shape[-1]), *self.arguments(base, rest)
                if operation.is_watched(args):
                    bound = takes_none
                else:
                    if not known:
                        operation.check(*args)
                        require_memory(*args)
                    bound = operation.bind(*args) or takes_none
                setattr(self, at, (kind, bound))
            y = bound(x, *base, *self, rest[0], rest[3]) if grads else bound(x, rest[0], rest[3])
            if y is not None:
                return y
        y = functional.of_rows(operation, x, *self.arguments(base, rest), known=known)
        if bound is None:
            setattr(self, at, (kind, None))
        return y

    def arguments(self, base: tuple, rest: tuple) -> tuple:
        """Of the operation, after x."""
        return *base, *self, *rest

    def in_blocks(self, operation: Operation, x: Tensor, base: tuple[Tensor | None, ...], *rest: Any) -> Tensor:
        """As `run`, by the CPU kernels alone: a row's bits depend on nothing but that row and its task."""
        plain = not is_transformed() and TENSORS_OR_NONE.issuperset(map(type, (x, *self))) and not is_any_watching()
        if plain and not needs_graph(x, *self):
            kind = x.dtype, x.device, x.shape[-1], *rest[-3:], *conditions(*self, *base)
            settled, bound = self.settled_blocks
            if settled != kind:
                args = x.reshape(-1, x.shape[-1]), *base, *self, *rest
                require_memory(*self, *base)
                operation.check(*args)
                bound = takes_none
                if backends.forced["backend"] in (None, "cpu") and cpu_runtime.unsupported_reason(x, 0, 0) is None:
                    bound = cpu_runtime.bind(args[0], *base, AdapterArgs(*self, *rest), blocks=True) or takes_none
                self.settled_blocks = kind, bound
            y = bound(x, rest[0])
            if y is not None:
                return y
        raise backends.Unsupported(INVARIANT)

    def __getstate__(self) -> None:
        return None  # a copy lies elsewhere


class AdaptedLinear(nn.Module):
    """A frozen linear layer [N, K] with an adapter on top.

    base_layer: any module that maps [..., K] to [..., N] and has in_features and out_features, or transformers' Conv1D, whose
    weight is [K, N]; a plain nn.Linear is computed together with the adapter. Its parameters stop requiring gradients, unless
    freeze_base is False: what requires them then trains with the adapter. dropout acts on the adapter's input in training.
    Raises TypeError or ValueError.
    """

    rank: int
    sub_rank: int
    operation = "linear"  # that computes base and adapter
    batch_invariant = False  # see `serving.freeze`
    ran = False  # in any forward that was not compiled
    path = "a layer"  # in the model; set by attach(), as is where it lies: see placement.places

    def __init__(self, base_layer: nn.Module, dropout: float, freeze_base: bool = True) -> None:
        super().__init__()
        if not is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}; it must be in [0, 1)")
        sizes = sizes_of(base_layer)
        if sizes is None:
            raise TypeError(
                f"base_layer is a {type(base_layer).__name__}; it must be a linear layer with in_features and out_features"
            )
        if isinstance(base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise TypeError(
                f"base_layer is a {type(base_layer).__name__}, which nn.MultiheadAttention reads and never runs"
            )
        self.base_layer = base_layer.requires_grad_(False) if freeze_base else base_layer
        self.in_features, self.out_features = sizes
        self.dropout = dropout
        self.model_tasks = Tasks()
        self.place: str | None = TEXT
        self.register_load_state_dict_pre_hook(check_loads)

    def check_load(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """RuntimeError if the layer cannot take what a state dict holds for it, under names that start with `prefix`."""

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise RuntimeError(
            "nn.DataParallel copies a model in every forward, and the copies' adapters would ask the original for their "
            "tasks; use DistributedDataParallel (torchrun), or make one GPU visible"
        )

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor of the dtype and on the device of the base weight, or of where accelerate brings it to."""
        like = getattr(self.base_layer, "weight", None)
        like = like if isinstance(like, Tensor) else None  # packed weights are behind a method
        dtype = like.dtype if like is not None and like.is_floating_point() else torch.get_default_dtype()
        device = None if like is None else like.device
        if hooks := offloading(self.base_layer):
            device = hooks[0].execution_device
        return torch.empty(*shape, dtype=dtype, device=device)

    def example(self) -> Tensor:
        """An uninitialised input [1, K] of the dtype and on the device that the base expects: for `explain`."""
        return self.empty(1, self.in_features)

    def unfused_reason(self) -> str | None:
        """Why the base product cannot be part of our operation; None if it can."""
        base = self._modules["base_layer"]
        if not is_plain(base):
            return f"the base is a {described(base)}"
        weight, bias = parameters_of(base)
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return "the base is being trained"
        if has_hooks(base):
            return "the base has hooks"
        return None

    def _adapted(
        self,
        x: Tensor,
        factors: Factors,
        scaling: float,
        p: float,
        args: tuple,
        kwargs: dict,
        task: Tensor | None = None,
        gate: Tensor | None = None,
        gate_row: Tensor | None = None,
        ranks: tuple[int, int] | None = None,
    ) -> Tensor:
        """base_layer(x) + the adapter of `factors`, in one operation where the base allows it."""
        base, weight, bias = self._modules["base_layer"], None, None
        apart = args or kwargs or self.unfused_reason() is not None
        if apart:
            if is_sharded(getattr(base, "weight", None)):  # FSDP2 has gathered it by now
                raise RuntimeError(
                    f"{self.path}: the base weight is a DTensor, split over processes as by tensor parallelism (tp_plan), which "
                    "adapters do not support; load the model without tp_plan, and use DDP or FSDP2"
                )
            y = base(x, *args, **kwargs)
            x = x if x.is_floating_point() else x.to(factors[0].dtype)
        else:
            weight, bias = parameters_of(base)
        cast = functional.autocast(x)
        functional.check_dtypes("linear", x, cast, weight)
        rest = task, gate, gate_row, functional.draw_seed(x.device) if p else None, scaling, p, ranks
        run = factors.in_blocks if self.batch_invariant else factors.run
        if apart:
            return y + run(delta, cast, (), *rest).to(y.dtype)
        return run(linear, cast, (weight, bias), *rest)


def check_loads(model: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Before anything of a state dict is written: `check_load` of all adapted layers of a model, or of the layer itself."""
    for name, layer in model.named_modules():
        if isinstance(layer, AdaptedLinear):
            layer.check_load(state, f"{prefix}{name}." if name else prefix)


@cache
def reads_weight(parent: type[nn.Module], name: str) -> bool:
    """Whether a module's code takes the weight of its layer `name` past the layer's forward, and so past an adapter.

    As Mamba's kernels do it, nn.MultiheadAttention, and torch's and transformers' layers with fast paths. What says
    something of the weight alone (its dtype, its device) is no such use; nor is a slice of it.
    """
    use = re.compile(
        rf"(?<!isinstance\()\bself\.{re.escape(name)}\.weight\b(?!\[|\.(dtype|device|shape|size|is_|requires_grad))"
    )
    return any(use.search(code_of(kind)) for kind in parent.__mro__[: parent.__mro__.index(nn.Module)])


@cache
def code_of(kind: type) -> str:
    """The code of a class's own methods, without those that build it."""
    found = []
    for key, method in vars(kind).items():
        if isfunction(method) and "init" not in key:
            with suppress(OSError, TypeError):  # made without a file
                found.append(getsource(method))
    return "\n".join(found)


def is_conv1d(base: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, as GPT-2 has it: a linear layer with a weight [K, N]."""
    return type(base).__name__ == "Conv1D" and hasattr(base, "nf")


def sizes_of(base: nn.Module) -> tuple[int, int] | None:
    """(K, N) of a linear layer; None for a module that does not tell them."""
    if is_conv1d(base):
        return base.nx, base.nf
    k, n = getattr(base, "in_features", None), getattr(base, "out_features", None)
    return None if k is None or n is None else (k, n)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def described(base: nn.Module) -> str:
    name = type(base).__name__
    return f"{name} of an {type(base.weight).__name__}" if type(base) is nn.Linear else name


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in module.__dict__


def version(parameter: Tensor) -> object:
    # Tensors made in inference mode count no versions: a copy gathered from them is never current.
    return object() if parameter.is_inference() else parameter._version


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor, which holds a part of its values; importing that class would take a second."""
    return hasattr(tensor, "full_tensor")
