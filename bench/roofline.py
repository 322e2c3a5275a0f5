"""Ceilings of an H200, launches with what they do, counted, and from both the ratios of a LoRA's orders of operations.

A launch is a torch operation that computes or copies, or one of our kernels. Nothing is measured. What is assumed:

- A launch takes as long as the slowest of its parts (bytes from memory, bytes issued to L2, products, dropout draws, loads that
  wait for each other), each at its ceiling: the parts overlap fully. A launch and a barrier have a price of their own.
- Nothing stays in the L2 cache from one launch or phase to the next, so the distinct bytes of each come from memory once.
- The library's products run at the rate of its large products, in waves of whole tiles over the processors, of the size that
  takes least time; one of fewer tiles than processors is split without a price. The result that a product adds to is read while
  it computes.
- Work items of a phase of ours are equal and go over the processors in waves; a processor has its share of the ceilings of L2,
  products and draws, while few processors can fill the memory. In the Triton kernels the empty items of a last chunk count too.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools.traffic import ceil

from .problems import SCALING, Problem

MEMORY = 4.3e12  # bytes per second of a copy, read and written ones together
CACHE = 5.5e12  # bytes per second that all processors together get from L2
PRODUCTS = 790e12  # operations per second of a large product of the library in bf16
WIDE_PRODUCTS = 50e12  # of one in fp32, which takes no tensor cores
PROCESSORS = 132
CLOCK = 1.755e9
INTEGERS = PROCESSORS * 64 * CLOCK  # operations per second on 32-bit integers: 64 a clock and processor
DRAW = 55 / 8  # of them for one element's share of a Philox call
LATENCY = 0.2e-6  # seconds until a load from L2 arrives, one that waits for the load before it
MEMORY_LATENCY = 0.7e-6  # and one from memory
START = {
    "launch": 2.5e-6,  # seconds from the end of a kernel to the first work of the next one in a CUDA graph
    "dependent": 1.5e-6,  # where the next one is resident by then (programmatic dependent launch)
    "arrival": 0.7e-6,  # until the last of the programs that share a tile knows that it is the last
    "refill": MEMORY_LATENCY,  # until the loads of a pipeline that begins anew have come from memory
    "panel": LATENCY,  # or from L2
    "barrier": 1.5e-6,  # until all programs of a launch know that all have come, and have begun the next phase
}
EAGER_LAUNCH = 5e-6  # seconds of the host for one launch outside of a graph
FUSED_TILE = 128, 256
TILES = FUSED_TILE, (256, 128), (128, 192), (192, 128), (128, 128)  # that the library has for a large product
DIRECTIONS = ("forward", "backward")
OPERANDS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # which argument is the left operand


@dataclass(frozen=True)
class Launch:
    """What one launch, or one phase of one, does.

    memory, issued: bytes from memory, and bytes that processors ask L2 for (0 where the library's rates have them in them).
    accumulated: bytes, among those of memory, of a result that it adds to. draws: elements whose dropout is drawn. loads: how
    often a processor waits for a load before it begins the next. waves: time of the busiest processor over the average one's.
    beside: seconds of the launches that run at the same time, which it waits for at its end. flight: seconds until the loads of
    one warp have come, those under way at once behind those before them, where that is counted.
    """

    name: str
    memory: float = 0
    flops: float = 0
    wide_flops: float = 0
    accumulated: float = 0
    issued: float = 0
    draws: float = 0
    loads: int = 0
    waves: float = 1
    beside: float = 0
    flight: float = 0
    start: str = "launch"

    def parts(self) -> dict[str, float]:
        """Seconds of each part, alone."""
        return {
            "memory": self.memory / MEMORY,
            "L2": self.waves * self.issued / CACHE,
            "products": self.waves * (self.flops / PRODUCTS + self.wide_flops / WIDE_PRODUCTS),
            "draws": self.waves * self.draws * DRAW / INTEGERS,
            "loads": self.loads * LATENCY,
            "beside": self.beside,
            "flight": self.flight,
        }

    def seconds(self) -> float:
        return START[self.start] + max(self.parts().values())

    def ideal_seconds(self, exposed: bool = False) -> float:
        """By the ceilings of memory and products alone. exposed: the result that it adds to is read before its products."""
        hidden = self.memory - (self.accumulated if exposed else 0)
        products = self.flops / PRODUCTS + self.wide_flops / WIDE_PRODUCTS
        return max(hidden / MEMORY, products) + (self.memory - hidden) / MEMORY


class Counter(TorchDispatchMode):
    """Counts what computes or copies as launches, with their bytes and operations; to be used with tensors on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.together: dict[int, Tensor] | None = None
        self.flops = 0  # of what is one launch

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
        touched = [*{id(t): t for t in given if t is not overwritten}.values(), *written]
        flops = wide_flops = accumulated = 0
        if plain in OPERANDS:
            left, right = args[OPERANDS[plain] :][:2]
            flops = 2 * left.numel() * right.shape[-1]
            if left.dtype == torch.float32:
                flops, wide_flops = 0, flops
            if name.endswith("_") and kwargs.get("beta", 1):
                accumulated = nbytes(args[0])
        if self.together is not None:
            self.together |= {storage(t): t for t in touched}
            self.flops += flops
        else:
            memory, waves = sum(map(nbytes, touched)), tiled(written[0].shape) if plain in OPERANDS else 1
            self.launches.append(Launch(name, memory, flops, wide_flops, accumulated, waves=waves))
        return result

    @contextmanager
    def one_launch(self, name: str) -> Iterator[None]:
        """What happens within is one launch, which reads or writes every tensor once."""
        self.together, self.flops = {}, 0
        yield
        self.launches.append(Launch(name, sum(map(nbytes, self.together.values())), self.flops))
        self.together = None


def waves(items: int) -> float:
    """Of equal work items over the processors."""
    return ceil(items, PROCESSORS) * PROCESSORS / max(items, 1)


def tiled(result: tuple[int, ...]) -> float:
    """Waves of a product [.., m, n] by the best size of tiles; those at the edges are computed whole."""
    found = []
    for height, width in TILES:
        count = math.prod(result[:-2]) * ceil(result[-2], height) * ceil(result[-1], width)
        found.append(waves(count) * count * height * width / math.prod(result) if count > PROCESSORS else 1)
    return min(found)


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
        counts = (getattr(call, direction).launches for direction in DIRECTIONS)
        seconds.append([sum(launch.ideal_seconds(exposed) for launch in found) for found in counts])
    (forward, backward), (base_forward, base_backward) = seconds
    both = (forward + backward) / (base_forward + base_backward)
    return forward / base_forward, backward / base_backward, both
