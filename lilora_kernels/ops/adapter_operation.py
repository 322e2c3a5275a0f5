"""How operations of adapters are registered: schema, fake, autograd, the choice of a backend, and calls bound to parameters."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import compress
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from .. import backends
from .operation import TENSORS, Operation, is_any_watching, is_transformed, needs_graph, of_batch
from .schema import DIFFERENTIABLE, AdapterArgs, Arguments


class AdapterOperation:
    """`lilora::<name>` -> y [M, N] and h [M, R] in x's dtype, and `lilora::<name>_backward`.

    h = D(x) A^T is saved for backward and not differentiable; two adapters have two y, then two h. Base weights are frozen.
    `kinds`: the schema's arguments. `check(op, x, [weight, bias,] adapter)` raises where they are wrong.
    """

    def __init__(self, name: str, kinds: dict[str, str], check: Callable) -> None:
        self.name, self.check_arguments, self.arguments = name, check, Arguments(kinds)
        self.sides = self.arguments.sides
        self.binds = len(self.sides) == 1 and "task" in kinds  # calls with gradients
        self.frozen = [n for n in kinds if n.startswith(("weight", "bias"))]
        # Inputs that may want a gradient: their names, and of which adapter they are which field.
        self.differentiable = {"x": (0, "x")}
        self.differentiable |= {
            f + side: (i, f) for i, side in enumerate(self.sides) for f in DIFFERENTIABLE if f + side in kinds
        }
        # What backward reads beside the adapters' arguments, and for the gradients of which inputs.
        self.readers = {"x": [f"a{side}" for side in self.sides]}
        self.readers |= {n: ["x"] for n in self.frozen if n.startswith("weight")}
        for i, side in enumerate(self.sides):
            self.readers[f"h{side}"] = [
                n for n, (at, f) in self.differentiable.items() if at == i and f not in ("x", "a")
            ]
        kept = {n: kind for n, kind in kinds.items() if n not in ("x", *self.frozen)}
        self.tensors = [n for n, kind in kept.items() if kind.startswith("Tensor")]
        self.numbers = [n for n, kind in kept.items() if not kind.startswith("Tensor")]
        self.wanted, self.saving = cache(self.wanted), cache(self.saving)

        read = {f"dy{side}": "Tensor" for side in self.sides} | dict.fromkeys(self.readers, "Tensor?")
        self.backward_arguments = Arguments({**read, **kept, "needs": "bool[]"})
        self.op = Operation(
            name, kinds, f"({', '.join(['Tensor'] * 2 * len(self.sides))})", self.check, self.forward, self.fake_forward,
            setup_context=self.setup_context, backward=self.differentiate, vmap=vmap_over_rows, bind=self.bind,
        )  # fmt: skip
        function = type(f"lilora::{name}", (BoundFunction,), {})
        self.apply_bound = super(torch.autograd.Function, function).apply  # as Operation.apply
        self.backward_op = Operation(
            f"{name}_backward", self.backward_arguments.kinds, "Tensor[]", lambda *_: None, self.backward, self.fake_backward,
            setup_context=lambda ctx, inputs, output: None, backward=self.differentiate_twice, vmap=vmap_over_rows,
        )  # fmt: skip

    def of_each(self, values: Sequence):
        """As backends take what each adapter has of its own: a pair, or bare where there is one."""
        return tuple(values) if len(self.sides) > 1 else values[0]

    def check(self, *args) -> None:
        given, adapters = self.arguments.split(args)
        self.check_arguments(f"lilora::{self.name}", *given, self.of_each(adapters))

    def forward(self, *args):
        given, adapters = self.arguments.split(args)
        chosen = backends.choose(self.name, given[0], *adapters[0].rank_sizes)
        return chosen.forward(*given, self.of_each(adapters))

    def bind(self, *args) -> Callable | None:
        """The call bound to what does not change, see `Implementation`; with its gradients where they are wanted."""
        given, adapters = self.arguments.split(args)
        chosen = backends.choose(self.name, given[0], *adapters[0].rank_sizes)
        if not needs_graph(*args):
            return chosen.bind(*given, self.of_each(adapters))
        x, *base = given
        adapter = adapters[0]
        if not self.binds or adapter.gate is not None or any(t is not None and t.requires_grad for t in base):
            return None
        return BoundGradients(self, chosen, adapter[-3:], chosen.bind_gradients(x, *base, adapter))

    def fake_forward(self, *args):
        given, adapters = self.arguments.split(args)
        widths = [*(adapter.b0.shape[-2] for adapter in adapters), *(adapter.a.shape[-2] for adapter in adapters)]
        return tuple(given[0].new_empty(given[0].shape[0], width) for width in widths)

    def wanted(self, needs: tuple[bool, ...]) -> tuple[list[tuple[int, str]], list[frozenset[str]]]:
        """Of which adapter's which fields gradients are wanted, in the order of `differentiable`; the same for each adapter."""
        asked = list(compress(self.differentiable.values(), needs))
        return asked, [frozenset(f for at, f in asked if f == "x" or at == side) for side in range(len(self.sides))]

    def backward(self, *args):
        """The gradients asked for by `needs`, in the order of `differentiable`."""
        (dy, *given, needs), adapters = self.backward_arguments.split(args)
        asked, wanted = self.wanted(tuple(needs))
        backend = backends.choose(self.name, args[0], *adapters[0].rank_sizes)
        grads = backend.backward(dy, *given, self.of_each(adapters), self.of_each(wanted))
        grads = grads if len(self.sides) > 1 else [grads]
        return [grads[side][field] for side, field in asked]

    def fake_backward(self, *args):
        (*_, needs), adapters = self.backward_arguments.split(args)
        dy, columns = args[0], adapters[0].a.shape[-1]
        like = [getattr(adapters[side], field, None) for side, field in self.wanted(tuple(needs))[0]]  # None: x
        return [dy.new_empty(dy.shape[0], columns) if t is None else t.new_empty(t.shape) for t in like]

    def saving(self, needs_input_grad: tuple[bool, ...]) -> tuple[Callable, list[bool], list[int]]:
        """What to save of (*inputs, *h, None), which of `differentiable` want gradients, and their places in the inputs."""
        names = (*self.arguments.kinds, *(f"h{side}" for side in self.sides))
        wanted = set(compress(names, needs_input_grad))
        if not wanted.isdisjoint(self.frozen):
            raise ValueError(
                f"lilora::{self.name}: weight or bias requires a gradient, but the base is frozen here; "
                "use F.linear(x, weight, bias) + delta(...) to train it"
            )
        read = [len(names) if wanted.isdisjoint(of) else names.index(name) for name, of in self.readers.items()]
        needs = [name in wanted for name in self.differentiable]
        places = [names.index(name) for name in compress(self.differentiable, needs)]
        return itemgetter(*read, *map(names.index, self.tensors)), needs, places

    def setup_context(self, ctx, inputs, output):
        hs = output[len(self.sides) :]
        saved, ctx.needs, ctx.places = self.saving(tuple(ctx.needs_input_grad))
        ctx.save_for_backward(*saved((*inputs, *hs, None)))
        ctx.numbers = inputs[-len(self.numbers) :]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*hs)

    def differentiate(self, ctx, *dys):
        given = [dy for dy in dys[: len(self.sides)] if dy is not None]
        found: list[Tensor | None] = [None] * len(self.arguments.kinds)
        if not given:
            return tuple(found)
        saved = ctx.saved_tensors
        if len(given) < len(self.sides):
            given = self.filled(dys, given[0], saved)
        for at, grad in zip(ctx.places, self.backward_op(*given, *saved, *ctx.numbers, ctx.needs), strict=True):
            found[at] = grad
        return tuple(found)

    def filled(self, dys: Sequence[Tensor | None], some: Tensor, saved: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients of both y, zeros for the one that nothing used."""
        named = dict(zip((*self.readers, *self.tensors), saved, strict=True))
        widths = [named[f"b0{side}"].shape[0] for side in self.sides]
        return [some.new_zeros(some.shape[0], n) if dy is None else dy for dy, n in zip(dys, widths, strict=False)]

    def differentiate_twice(self, ctx, *grads) -> NoReturn:
        raise NotImplementedError(
            f"lilora::{self.name}: second derivatives are not implemented; "
            "use lilora_kernels.ops.delta.reference, plain PyTorch, where you need them"
        )


class BoundGradients:
    """bound(x, [weight, bias,] *FACTORS, task, seed) -> y [..., N] for x [..., K] and ids [M], with its gradients.

    What the operation does, without what is settled by then; by `bound`, of `Implementation.bind_gradients`, where that takes it.
    It has no tensors: graphs keep it, and must let go of what they have saved. numbers: scaling, p and ranks.
    """

    def __init__(
        self, operation: AdapterOperation, backend: backends.Implementation, numbers: tuple, bound: Any
    ) -> None:
        self.operation, self.backend, self.numbers, self.bound = operation, backend, numbers, bound

    def __call__(self, *args: Tensor | None) -> Tensor:
        return self.with_h(*args)[0]

    def with_h(self, *args: Tensor | None) -> tuple[Tensor, Tensor]:
        """y and h, as the operation returns them."""
        return self.operation.apply_bound(self, *args)

    def forward(self, x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """y [..., N], h [M, R], and what dropout keeps, if `bound` has drawn it."""
        *base, a, b0, u, v, fusion, task, seed = others
        adapter = AdapterArgs(a, b0, u, v, fusion, task, None, None, seed, *self.numbers)
        found = self.bound and self.bound.forward(x, base, adapter)
        if found is not None:
            return found
        with torch._C._AutoDispatchBelowAutograd():
            y, h = self.backend.forward(x.reshape(-1, x.shape[-1]), *base, adapter)
            # Autograd would let nobody write to a view.
            return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]]), h, None

    def backward(
        self, dy: Tensor, saved: tuple[Tensor | None, ...], needs: tuple[bool, ...], shape: torch.Size
    ) -> list[Tensor]:
        """Those of x and FACTORS that are needed, in this order; shape: that of x."""
        x, weight, h, keep, *factors, task, seed = saved
        adapter = AdapterArgs(*factors, task, None, None, seed, *self.numbers)
        watched = torch.is_grad_enabled() or type(dy) not in TENSORS or is_any_watching() or is_transformed()
        if self.bound and not watched:
            found = self.bound.backward(dy, x, weight, h, adapter, needs, keep)
            if found is not None:
                return found
        given = dy.reshape(-1, dy.shape[-1]), x if x is None else x.reshape(-1, shape[-1]), weight, h
        given = given if self.operation.frozen else (*given[:2], h)
        if watched:
            grads = self.operation.backward_op(*given, *adapter, (*needs, False))
        else:
            asked, (wanted,) = self.operation.wanted((*needs, False))
            with torch._C._AutoDispatchBelowAutograd():
                found = self.backend.backward(*given, adapter, wanted)
            grads = [found[field] for _, field in asked]
        return [grads[0].reshape(shape), *grads[1:]] if needs[0] else grads


class BoundFunction(torch.autograd.Function):
    """An operation has one of its own, by whose name profilers show it."""

    @staticmethod
    def forward(ctx: Any, bound: BoundGradients, x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        """others: weight and bias of `linear`, FACTORS, task and seed."""
        y, h, keep = bound.forward(x, *others)
        ctx.needs = needs = ctx.needs_input_grad[1], *ctx.needs_input_grad[-7:-2]
        ctx.save_for_backward(
            x if needs[1] else None,
            others[0] if needs[0] and bound.operation.frozen else None,
            h if True in needs[2:] else None,
            keep if needs[0] or needs[1] else None,
            *others[-7:],
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(h)
        ctx.bound, ctx.shape, ctx.check = bound, x.shape, None
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> Any:
        of_base = (None,) * len(ctx.bound.operation.frozen)
        if dy is None:
            return (None,) * 9 + of_base
        if is_legacy_batchedtensor(dy):
            return of_batch(BoundFunction.backward, ctx, dy, None)
        if ctx.check is not None:
            ctx.check()
        grads = iter(ctx.bound.backward(dy, ctx.saved_tensors, ctx.needs, ctx.shape))
        dx, *of_factors = [next(grads) if needed else None for needed in ctx.needs]
        return None, dx, *of_base, *of_factors, None, None


def before_backward(y: Tensor, check: Callable[[], None]) -> None:
    """Let `check` run before the backward of y; it may raise. A hook costs the host as much as a small layer."""
    node = y.grad_fn
    if issubclass(getattr(node, "_forward_cls", object), BoundFunction):
        node.check = check
    else:
        y.register_hook(lambda _: check())


def vmap_over_rows(operation: Operation, info, in_dims, *args):
    """torch.func.vmap over x alone, and over dy for the gradient of x: the rows of all samples are one batch."""
    given, dims = (dict(zip(operation.kinds, values, strict=True)) for values in (args, in_dims))
    rows = [name for name in operation.kinds if name.startswith("dy")] or ["x"]
    batched = [name for name, dim in dims.items() if isinstance(dim, int)]
    if "ends" in given:
        raise NotImplementedError(
            f"{operation.name}: torch.func.vmap would need the rows of all samples in one order; loop over the samples instead"
        )
    if not set(batched) <= set(rows) or given["p"] > 0 or any(given.get("needs", ())[1:]):
        raise NotImplementedError(
            f"{operation.name}: torch.func.vmap works over x alone, without dropout and for no gradient but that of x; "
            "loop over the samples instead"
        )
    size = info.batch_size
    for name in rows:
        t = given[name]
        given[name] = (t.movedim(dims[name], 0) if name in batched else t.expand(size, *t.shape)).flatten(0, 1)
    for name in ("task", "gate_row"):
        if given.get(name) is not None:
            given[name] = given[name].repeat(size)
    results = operation(*given.values())
    return tuple(t.unflatten(0, (size, len(t) // size)) for t in results), (0,) * len(results)
