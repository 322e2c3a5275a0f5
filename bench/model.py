"""Time of an adapted linear on an H200 from counted operations and bytes, with named ceilings.

Nothing here is measured. What is assumed, in plain sentences:

- A launch takes as long as the slowest of its parts, the products and the bytes, each at its ceiling: the parts overlap fully.
- A launch of the library (a torch operation) reads every operand from memory once and writes every result once; nothing stays
  in the L2 cache between two launches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .problems import SCALING, Problem

MEMORY = 4.3e12  # bytes per second of a copy, read and written ones together
PRODUCTS = 790e12  # operations per second of a large product of the library in bf16
WIDE_PRODUCTS = 50e12  # of one in fp32, which takes no tensor cores
DIRECTIONS = ("forward", "backward")
OPERANDS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # which argument is the left operand


@dataclass(frozen=True)
class Launch:
    """What one launch does. `accumulated`: bytes, among those of memory, of a result that it adds to."""

    name: str
    memory: float = 0
    flops: float = 0
    wide_flops: float = 0
    accumulated: float = 0

    def seconds(self, exposed: bool = False) -> float:
        """exposed: the result that it adds to is read before its products begin."""
        hidden = self.memory - (self.accumulated if exposed else 0)
        parts = hidden / MEMORY, self.flops / PRODUCTS + self.wide_flops / WIDE_PRODUCTS
        return max(parts) + (self.memory - hidden) / MEMORY


class Counter(TorchDispatchMode):
    """Counts what computes or copies as launches, with their bytes and operations; to be used with tensors on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.together: dict[int, Tensor] | None = None

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        name = operation.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        shared = set(map(storage, written)) <= set(map(storage, given))
        view = written and shared and not operation._schema.is_mutable
        if view or name.startswith(("empty", "new_empty")):
            return result
        plain = name.removesuffix("_")
        overwritten = kwargs.get("out", args[0] if name in ("copy_", "fill_", "zero_") else None)
        read = {id(t): t for t in given if t is not overwritten}.values()
        flops = wide_flops = accumulated = 0
        if plain in OPERANDS:
            left, right = args[OPERANDS[plain] :][:2]
            flops = 2 * left.numel() * right.shape[-1]
            if left.dtype == torch.float32:
                flops, wide_flops = 0, flops
            if name.endswith("_") and kwargs.get("beta", 1):
                accumulated = nbytes(args[0])
        if self.together is not None:
            self.together |= {storage(t): t for t in (*read, *written)}
            self.flops += flops
        else:
            memory = sum(map(nbytes, (*read, *written)))
            self.launches.append(Launch(name, memory, flops, wide_flops, accumulated))
        return result

    @contextmanager
    def one_launch(self, name: str) -> Iterator[None]:
        """What happens within is one launch, which reads or writes every tensor once."""
        self.together, self.flops = {}, 0
        yield
        self.launches.append(Launch(name, sum(map(nbytes, self.together.values())), self.flops))
        self.together = None

    def seconds(self, exposed: bool = False) -> float:
        return sum(launch.seconds(exposed) for launch in self.launches)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def nbytes(tensor: Tensor) -> int:
    """Of a tensor or of what it is a view of, such as a column that stands for many."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


# --- what others do ---------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """Operands of one call without data, and what its two directions do."""

    problem: Problem

    def __post_init__(self) -> None:
        p = self.problem
        self.x, self.weight, self.dy = made(p.rows, p.columns), made(p.outputs, p.columns), made(p.rows, p.outputs)
        self.a, self.b = made(p.rank, p.columns), made(p.outputs, p.rank)
        self.forward, self.backward = Counter(), Counter()


def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def base(call: Call) -> None:
    with call.forward:
        call.x @ call.weight.T
    with call.backward:
        call.dy @ call.weight


def floor(call: Call) -> None:
    """Base and adapter in one launch each way: nothing but the operations and the bytes that have to be."""
    with call.forward, call.forward.one_launch("all"):
        h = call.x @ call.a.T
        call.x @ call.weight.T
        h @ call.b.T
    with call.backward, call.backward.one_launch("all"):
        call.dy @ call.weight
        dh = call.dy @ call.b
        call.dy.T @ h
        dh.T @ call.x
        dh @ call.a


def peft(call: Call) -> None:
    """As peft's Linear writes it; backward is what autograd makes of that."""
    x, a, b = (t.requires_grad_() for t in (call.x, call.a, call.b))
    with call.forward:
        y = F.linear(x, call.weight)
        dropped = x
        if call.problem.p:
            dropped, _ = torch.native_dropout(x, call.problem.p, True)  # what F.dropout is on a GPU
        y = y + F.linear(F.linear(dropped, a), b) * SCALING
    with call.backward:
        torch.autograd.grad(y, (x, a, b), call.dy)


def addmm_after(call: Call) -> None:
    """The order of unsloth and axolotl: the adapter's product is added to the base's; backward as unsloth's, h again."""
    with call.forward:
        y = call.x @ call.weight.T
        y.addmm_(call.x @ call.a.T, call.b.T)
    with call.backward:
        dx = call.dy @ call.weight
        call.dy.T @ (call.x @ call.a.T)
        (call.dy @ call.b).T @ call.x
        dx.addmm_(call.dy @ call.b, call.a)


def expand_first(call: Call, apart: bool = False) -> None:
    """The base's product is added to the adapter's. One launch reads dy for dh and db, or two where they are `apart`."""
    with call.forward:
        h = call.x @ call.a.T
        y = h @ call.b.T
        y.addmm_(call.x, call.weight.T)
    with call.backward as count:
        if apart:
            dh, _ = call.dy @ call.b, call.dy.T @ h
        else:
            with count.one_launch("dh, db"):
                dh, _ = call.dy @ call.b, call.dy.T @ h
        dh.T @ call.x
        dx = dh @ call.a
        dx.addmm_(call.dy, call.weight)


def ratios(
    implementation: Callable[[Call], None], problem: Problem, exposed: bool = False
) -> tuple[float, float, float]:
    """Time over the base's: forward, backward, both, from the ceilings alone."""
    seconds = []
    for each in (implementation, base):
        call = Call(problem)
        each(call)
        seconds.append([getattr(call, direction).seconds(exposed) for direction in DIRECTIONS])
    (forward, backward), (base_forward, base_backward) = seconds
    both = (forward + backward) / (base_forward + base_backward)
    return forward / base_forward, backward / base_backward, both
