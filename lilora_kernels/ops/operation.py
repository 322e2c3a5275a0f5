"""An operation with two doors: `lilora::<name>` for whatever has to see it whole, an autograd.Function for all other calls."""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

from .. import backends

# The types of arguments that need no dispatcher, by their kind in the schema; a subclass of Tensor may.
TENSORS, NONE = {Tensor, nn.Parameter}, {type(None)}
TENSORS_OR_NONE = TENSORS | NONE
PLAIN = {
    "Tensor": TENSORS,
    "Tensor?": TENSORS_OR_NONE,
    "float": {float, int},
    "SymInt[]?": {list, tuple} | NONE,
    "bool[]": {list, tuple},
}


class Operation:
    """Both doors save, differentiate and refuse in the same way, and compute so but where a CPU's plan is for gradients alone.

    `kinds`: the schema's arguments. `check` raises where they are wrong; `run` computes and `fake` makes empty results.
    setup_context, backward and vmap: of a torch.autograd.Function; vmap gets this operation first. bind: of the backend chosen.
    """

    def __init__(
        self,
        name: str,
        kinds: dict[str, str],
        results: str,
        check: Callable,
        run: Callable,
        fake: Callable,
        *,
        setup_context: Callable,
        backward: Callable,
        vmap: Callable,
        bind: Callable = lambda *_: None,
    ) -> None:
        self.name, self.kinds, self.check, self.run, self.bind = f"lilora::{name}", kinds, check, run, bind
        self.task_at, self.seed_at = (list(kinds).index(n) if n in kinds else None for n in ("task", "seed"))
        self.plain = [PLAIN[kind] for kind in kinds.values()]
        schema = ", ".join(f"{kind} {argument}" for argument, kind in kinds.items())
        self.registered = torch.library.custom_op(
            self.name, checked(check, run), mutates_args=(), schema=f"({schema}) -> {results}"
        )
        backward = one_by_one(backward)
        self.registered.register_fake(checked(check, fake))
        self.registered.register_autograd(backward, setup_context=setup_context)
        self.function = function_of(self, setup_context, backward, vmap)
        # Outside of torch.func all that Function.apply adds is to bind the arguments to a signature, for 35 us.
        self.apply = super(torch.autograd.Function, self.function).apply

    def __call__(self, *args, known: bool = False):
        """known: that the arguments are right; a caller who has had the same checked before need not wait for it again."""
        if torch.compiler.is_compiling() and forward_ad._current_level < 0:
            return self.registered(*args)
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            self.check(*args)
            return self.function.apply(*args)  # the registered one would drop the tangents of forward_ad without a word
        if self.is_watched(args):
            return self.registered(*args)
        if not known:
            self.check(*args)
            require_memory(*args)
        if not needs_graph(*args):
            return self.compute(*args)
        bound = self.bind(*args)  # as later calls of a layer will have it, bit by bit
        if bound is None:
            return self.apply(*args)
        return bound.with_h(*args[: self.task_at], args[self.task_at], args[self.seed_at])

    def compute(self, *args):
        """`run` as the dispatcher calls it, below autograd: every torch operation inside costs less."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.run(*args)

    def is_watched(self, args: tuple) -> bool:
        """Whether a mode, a tracer, a subclass of Tensor or the meta device takes part in the call."""
        return bool(
            is_any_watching() or not all(map(operator.contains, self.plain, map(type, args))) or args[0].is_meta
        )


def one_by_one(backward: Callable) -> Callable:
    """A backward for batches of gradients too (`autograd.grad` with is_grads_batched, a Jacobian with vectorize=True)."""

    @wraps(backward)
    def of_each(ctx, *grads):
        if any(dy is not None and is_legacy_batchedtensor(dy) for dy in grads):
            return of_batch(backward, ctx, *grads)
        return backward(ctx, *grads)

    return of_each


def of_batch(backward: Callable, ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """What `backward` gives for each of a batch of gradients, as it would alone.

    Neither kernels nor a seeded dropout know of torch's hidden batch dimension.
    """
    level, size = hidden_dimension(next(dy for dy in grads if dy is not None and is_legacy_batchedtensor(dy)))
    with outside_of_batches():
        plain = [dy if dy is None else torch._remove_batch_dim(dy, level, size, 0) for dy in grads]
        found = [backward(ctx, *[dy if dy is None else dy[at] for dy in plain]) for at in range(size)]
        stacked = [None if every[0] is None else torch.stack(every) for every in zip(*found, strict=True)]
        return tuple(t if t is None else torch._add_batch_dim(t, 0, level) for t in stacked)


def hidden_dimension(dy: Tensor) -> tuple[int, int]:
    """Level and size of the batch dimension that autograd has hidden."""
    for level in range(1, 9):
        plain = torch._remove_batch_dim(dy, level, 1, 0)
        if not is_legacy_batchedtensor(plain):
            return level, len(plain)
    raise NotImplementedError("a batch of batches of gradients is not implemented; loop over the outer one")


@contextmanager
def outside_of_batches() -> Iterator[None]:
    """Torch refuses random numbers while it batches."""
    depth = torch._C._vmapmode_increment_nesting()
    for _ in range(depth):
        torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        for _ in range(depth - 1):
            torch._C._vmapmode_increment_nesting()


def require_memory(*args) -> None:
    """Code that shards frees parameters outside of a model's forward; kernels take no address for not given."""
    for t in args:
        if not isinstance(t, Tensor) or t.layout is not torch.strided or is_functorch_wrapped_tensor(t):
            continue
        if t.data_ptr() == 0 and t.numel() > 0:
            raise RuntimeError(
                f"a tensor of the shape {list(t.shape)} has no memory: a sharded or offloaded layer has its parameters in the "
                "forward of its model only; call that"
            )


def is_transformed() -> bool:
    """Whether torch.compile, torch.func or forward-mode AD takes part in all calls."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def is_any_watching() -> bool:
    """Whether a mode or a tracer takes part in all calls."""
    return torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or torch._C._is_tracing()


def conditions(*tensors: Tensor | None) -> list:
    """What a bound call relies on: what is forced, and where its parameters lie. Sharding and offloading change the latter."""
    lying = [(t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_neg()) for t in tensors if t is not None]
    return [*backends.forced.values(), *lying]


def needs_graph(*args) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def checked(check: Callable, run: Callable) -> Callable:
    def both(*args):
        check(*args)
        return run(*args)

    return both


def function_of(operation: Operation, setup_context: Callable, backward: Callable, vmap: Callable) -> type:
    """The autograd.Function of an operation, by whose name profilers show it. Dynamo wants its methods to be functions."""

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return tuple((operation.registered if operation.is_watched(args) else operation.compute)(*args))

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx, *grads):
            return backward(ctx, *grads)

        @staticmethod
        def vmap(info, in_dims, *args):
            return vmap(operation, info, in_dims, *args)

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(
                f"{operation.name}: forward-mode derivatives are not implemented; "
                "use reverse mode (torch.func.vjp, grad or jacrev)"
            )

    return type(operation.name, (Plain,), {})
