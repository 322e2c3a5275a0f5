"""An operation with two doors: `lilora::<name>` for whatever has to see it whole, an autograd.Function for all other calls."""

import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# The types of arguments that need no dispatcher, by their kind in the schema; a subclass of Tensor may.
TENSORS, NONE = {Tensor, nn.Parameter}, {type(None)}
PLAIN = {
    "Tensor": TENSORS,
    "Tensor?": TENSORS | NONE,
    "float": {float, int},
    "SymInt[]?": {list, tuple} | NONE,
    "bool[]": {list, tuple},
}


class Operation:
    """Both doors call `run`, and save, differentiate and refuse in the same way. Without a gradient `run` is called at once.

    `kinds`: the schema's arguments. `run` computes and `fake` makes empty results; both check the arguments.
    setup_context, backward and vmap: of a torch.autograd.Function; vmap gets this operation first.
    """

    def __init__(
        self,
        name: str,
        kinds: dict[str, str],
        results: str,
        run: Callable,
        fake: Callable,
        *,
        setup_context: Callable,
        backward: Callable,
        vmap: Callable,
    ) -> None:
        self.name, self.kinds, self.run = f"lilora::{name}", kinds, run
        self.plain = [PLAIN[kind] for kind in kinds.values()]
        schema = ", ".join(f"{kind} {argument}" for argument, kind in kinds.items())
        self.registered = torch.library.custom_op(self.name, run, mutates_args=(), schema=f"({schema}) -> {results}")
        self.registered.register_fake(fake)
        self.registered.register_autograd(backward, setup_context=setup_context)
        self.function = function_of(self, setup_context, backward, vmap)
        # Outside of torch.func all that Function.apply adds is to bind the arguments to a signature, for 35 us.
        self.apply = super(torch.autograd.Function, self.function).apply

    def __call__(self, *args):
        if forward_ad._current_level >= 0:
            return self.function.apply(*args)  # the registered one would drop tangents without a word
        if torch.compiler.is_compiling():
            return self.registered(*args)
        if torch._C._are_functorch_transforms_active():
            return self.function.apply(*args)
        if self.is_watched(args):
            return self.registered(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self.apply(*args)
        return self.run(*args)

    def is_watched(self, args: tuple) -> bool:
        """Whether a mode, a tracer, a subclass of Tensor or the meta device takes part in the call."""
        return bool(
            torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch._C._is_tracing()
            or not all(map(operator.contains, self.plain, map(type, args)))
            or args[0].is_meta
        )


def function_of(operation: Operation, setup_context: Callable, backward: Callable, vmap: Callable) -> type:
    """The autograd.Function of an operation, by whose name profilers show it. Dynamo wants its methods to be functions."""

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return tuple((operation.registered if operation.is_watched(args) else operation.run)(*args))

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
