"""What the operations of adapters receive, and how they are registered: schema, fake, autograd and the choice of a backend."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import compress
from operator import itemgetter
from typing import NamedTuple, NoReturn

from torch import Tensor

from .. import backends
from .operation import Operation, needs_graph

FACTORS = ("a", "b0", "u", "v", "fusion")
# Inputs that may want a gradient, in the order in which the backward operations return them.
DIFFERENTIABLE = ("x", *FACTORS, "gate")


class AdapterArgs(NamedTuple):
    """The adapter's side of one call; shapes in ops/README.md."""

    a: Tensor
    b0: Tensor
    u: Tensor | None
    v: Tensor | None
    fusion: Tensor | None
    task: Tensor | None
    gate: Tensor | None
    gate_row: Tensor | None
    seed: Tensor | None
    scaling: float
    p: float
    ranks: Sequence[int] | None

    @property
    def rank_sizes(self) -> tuple[int, int]:
        """R, and S or 0 without task factors."""
        return self.a.shape[-2], 0 if self.u is None else self.u.shape[-1]


def kinds_of(fields: Sequence[str], side: str = "") -> dict[str, str]:
    """Name, with the ending `side`, and type of these fields of AdapterArgs in a registered schema."""
    kinds = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", Sequence[int] | None: "SymInt[]?"}
    return {field + side: kinds[AdapterArgs.__annotations__[field]] for field in fields}


class Arguments:
    """Reads the arguments of an operation by name. Of two adapters, what each has of its own ends in _1 and _2."""

    def __init__(self, kinds: dict[str, str]) -> None:
        self.kinds = kinds
        self.sides = ("_1", "_2") if "a_1" in kinds else ("",)
        at = {name: i for i, name in enumerate(kinds)}

        def places(stem: str) -> list[int]:
            """For each side; the place after the last argument holds None."""
            return [at.get(stem + side, at.get(stem, len(at))) for side in self.sides]

        stems = dict.fromkeys(name.removesuffix("_1").removesuffix("_2") for name in at)
        others = [stem for stem in stems if stem not in AdapterArgs._fields]
        self._others = [itemgetter(*dict.fromkeys(places(stem))) for stem in others]
        self._adapters = [itemgetter(*own) for own in zip(*map(places, AdapterArgs._fields), strict=True)]

    def split(self, args: Sequence) -> tuple[list, list[AdapterArgs]]:
        """What is no adapter's, a pair where each side has its own; and the adapters."""
        args = (*args, None)
        return [get(args) for get in self._others], [tuple.__new__(AdapterArgs, get(args)) for get in self._adapters]


class AdapterOperation:
    """`lilora::<name>` -> y [M, N] and h [M, R] in x's dtype, and `lilora::<name>_backward`.

    h = D(x) A^T is saved for backward and not differentiable; two adapters have two y, then two h. Base weights are frozen.
    `kinds`: the schema's arguments. `check(op, x, [weight, bias,] adapter)` raises where they are wrong.
    """

    def __init__(self, name: str, kinds: dict[str, str], check: Callable) -> None:
        self.name, self.check_arguments, self.arguments = name, check, Arguments(kinds)
        self.sides = self.arguments.sides
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
        if backends.forced["plan"] == "recorded":
            raise backends.Unsupported(
                f"{self.name}: the plan 'recorded' takes calls whose gradients are wanted, outside of torch.compile, torch.func "
                "and dispatch modes"
            )
        return chosen.forward(*given, self.of_each(adapters))

    def bind(self, *args) -> Callable | None:
        """The call bound to what does not change, see `Implementation`."""
        given, adapters = self.arguments.split(args)
        chosen = backends.choose(self.name, given[0], *adapters[0].rank_sizes)
        return (chosen.bind_recorded if needs_graph(*args) else chosen.bind)(*given, self.of_each(adapters))

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
