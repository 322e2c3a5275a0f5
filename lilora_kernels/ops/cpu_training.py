"""The plan one_launch on a CPU: each direction of an adapter, and of its base, in one call of the CPU kernels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import backends, cpu_library
from . import cpu_runtime
from .cpu_runtime import pointer
from .delta import eager
from .philox import keep_scale, threshold
from .schema import FACTORS, AdapterArgs

MOST_ROWS = 1024  # kMostRows of csrc/cpu/training.cpp
# Where the plan is not forced, up to here; time over composed's on one thread from bench.small_training,
# bench/results/small-training/avx2.json. Forward, by rows and by elements of x: 0.13 to 0.98; beyond, 0.3 to 1.6.
# Both directions, by multiplications of y = x W^T, h and h B0^T: 0.2 to 0.93; beyond, 0.8 to 1.2.
FORWARD_ROWS, FORWARD_X = 256, 2**20
MOST_PRODUCTS = 2**26
# Where the kernels outrun torch's products (avx512.json there), forward always, 0.15 to 0.72, and beyond MOST_PRODUCTS from
# so many rows both directions too, 0.47 to 0.81; below, 0.98 and 1.15.
OUTRUN_ROWS = 32
PLAN = {
    "one_launch": f"for fp32, forward up to {FORWARD_ROWS} rows, with AVX-512 on AMD {MOST_ROWS}, and backward of small products"
}
OPERANDS = ("x", *FACTORS)


def bind_forward(x: Tensor, *of: tuple | Tensor | AdapterArgs | None) -> Callable | None:
    """`cpu_runtime.bind`, and this plan for more rows and what decode does not take."""
    one, sides = cpu_runtime.sides_of(of)
    if not all(is_taken(frozen, adapter, x[:1]) for adapter, *frozen in sides):
        return cpu_runtime.bind(x, *of)
    calls = [Training(frozen, adapter, backward=False) for adapter, *frozen in sides]
    bare = AdapterArgs(*[None] * 9, *sides[0][0][-3:])  # neither parameters nor ids shall live on for this

    def bound(x: Tensor, task: Tensor | None = None, seed: Tensor | None = None) -> Tensor | list[Tensor] | None:
        adapter, ys = bare._replace(task=task, seed=seed), []
        for call in calls:
            found = call.forward(x, (), adapter)
            if found is None:
                return None
            ys.append(found[0])
        return ys[0] if one else ys

    return cpu_runtime.bind(x, *of, more=bound) or bound


def bind(x: Tensor, *of: Tensor | AdapterArgs | None) -> "Training | None":
    """See `Implementation.bind_gradients`. of: weight and bias of `linear`, and the adapter."""
    *base, adapter = of
    return Training(base, adapter) if is_taken(base, adapter, x[:1]) else None


def forward(x: Tensor, *of: Tensor | AdapterArgs | None) -> tuple[Tensor, Tensor] | None:
    """y [M, N] and h [M, R]; None where another plan has to run."""
    *base, adapter = of
    if not is_taken(base, adapter, x):
        return None
    found = Training(base, adapter, backward=False).forward(x, base, adapter)
    return found and found[:2]


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str]
) -> dict[str, Tensor] | None:
    """The gradients of `linear`, or with no weight of `delta`; None where another plan has to make them."""
    if not is_taken([weight], adapter, dy, x, h):
        return None
    names = [name for name in OPERANDS if name in needs]
    wanted = [name in needs for name in OPERANDS]
    found = Training([weight, None], adapter).backward(dy, x, weight, h, adapter, wanted)
    return None if found is None else dict(zip(names, found, strict=True))


def is_taken(base: Sequence[Tensor | None], adapter: AdapterArgs, *rows: Tensor | None) -> bool:
    """Raises Unsupported where the plan is forced and cannot run."""
    plan = backends.forced["plan"]
    if plan not in (None, "one_launch"):
        return False
    reason = unsupported_call(base, adapter, [t for t in rows if t is not None])
    if plan is not None and reason is not None:
        raise backends.Unsupported(f"the plan 'one_launch' cannot run here: {reason}")
    return reason is None


def unsupported_call(base: Sequence[Tensor | None], adapter: AdapterArgs, rows: list[Tensor]) -> str | None:
    if adapter.gate is not None or adapter.ranks is not None:
        return "it has neither gates nor ranks"
    if len(rows[0]) > MOST_ROWS:
        return f"it takes up to {MOST_ROWS} rows, here are {len(rows[0])}"
    if adapter.u is not None and adapter.u.numel() == 0:
        return "no task has factors"
    if adapter.task is not None and not adapter.task.is_contiguous():
        return "its ids must be contiguous"
    parameters = [t for t in (*base, *adapter[:5]) if t is not None]
    for t in (*parameters, *rows):
        if t.dtype != torch.float32:
            return f"it takes x and parameters all of torch.float32, here is {t.dtype}"
    for t in parameters:
        if not t.is_contiguous() or t.is_neg():
            return "its parameters must be contiguous"
        if t.data_ptr() == 0 and t.numel() > 0:
            return "its parameters must have memory"
    return None


class Training:
    """A call bound to where its parameters lie. Without `backward` it has the limits of a forward alone."""

    def __init__(self, base: Sequence[Tensor | None], adapter: AdapterArgs, backward: bool = True) -> None:
        a, b0, u, *_ = adapter
        self.library, self.p = cpu_library.load(), adapter.p
        self.columns, (self.outputs, self.rank) = a.shape[1], b0.shape
        weight, bias = base or (None, None)
        self.parameters = [pointer(t) for t in (weight, bias, *adapter[:5])]
        leading, sub_rank = ((), 0) if u is None else (u.shape[:-2], u.shape[-1])
        tasks = leading[0] if leading else 1
        of_tasks = (*leading, self.outputs, sub_rank), (*leading, sub_rank, self.rank), (tasks,)
        self.shapes = (
            (self.outputs, self.columns),
            None,
            (self.rank, self.columns),
            (self.outputs, self.rank),
            *of_tasks,
        )
        self.sizes = cpu_library.OF_SIZES.pack(
            self.columns, self.outputs, self.rank, sub_rank, tasks, self.library.parallel_for, self.library.instructions,
            adapter.scaling, keep_scale(adapter.p) if adapter.p and threshold(adapter.p) else 1.0,
        )  # fmt: skip
        products = 0 if weight is None else self.columns * self.outputs
        products += self.rank * (self.columns + self.outputs)
        most = min(MOST_ROWS, MOST_PRODUCTS // max(products, 1))
        if not backward:
            most = min(FORWARD_ROWS, FORWARD_X // max(self.columns, 1))
        if backends.forced["plan"] is not None:
            most = MOST_ROWS
        # Of which numbers of rows it is not.
        self.others = range(most + 1, (OUTRUN_ROWS if backward else 0) if self.library.outruns else MOST_ROWS + 1)

    def forward(
        self, x: Tensor, base: Sequence[Tensor | None], adapter: AdapterArgs
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """y [..., N] and h [M, R] for x [..., K], and what dropout keeps; None for too many rows and an id of no task."""
        rows, task = x.shape[:-1].numel(), adapter.task
        if (
            rows > MOST_ROWS
            or rows in self.others
            or (task is not None and (task.shape != (rows,) or not task.is_contiguous()))
        ):
            return None
        if not x.is_contiguous() or x.is_neg():
            x = x.resolve_neg().contiguous()
        x_at = x.data_ptr()
        if x_at == 0 and rows > 0:
            return None
        keep = eager.kept(rows, self.columns, self.p, adapter.seed)
        y, h = x.new_empty((*x.shape[:-1], self.outputs)), x.new_empty((rows, self.rank))
        call = cpu_library.OF_TRAINING.pack(
            rows, x_at, h.data_ptr(), y.data_ptr(), pointer(task), pointer(keep), 0, 0, 0, 0, 0, 0, *self.parameters
        )
        return None if self.library.train_forward(call + self.sizes) else (y, h, keep)

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        h: Tensor | None,
        adapter: AdapterArgs,
        needs: Sequence[bool],
        keep: Tensor | None = None,
    ) -> list[Tensor] | None:
        """Those of OPERANDS that are needed, in this order, for dy [..., N] and x [..., K]; None for what it does not take.

        Parameters may lie elsewhere by now: sharding, and hooks on saved tensors, bring them anew, perhaps as others.
        """
        a, b0, u, v, fusion, task, _, _, seed, *_ = adapter
        rows = dy.shape[:-1].numel()
        if rows > MOST_ROWS or rows in self.others or (task is not None and not task.is_contiguous()):
            return None
        parameters = []
        for t, shape in zip((weight, None, a, b0, u, v, fusion), self.shapes, strict=True):
            at = 0
            if t is not None:
                at = t.data_ptr()
                if at == 0 or t.shape != shape or t.dtype is not torch.float32 or not t.is_contiguous():
                    return None
            parameters.append(at)
        given: list[Tensor | None] = []  # keeps what is copied
        for t, width in ((x, self.columns), (h, self.rank), (dy, self.outputs)):
            if t is not None:
                if t.dtype is not torch.float32 or t.numel() != rows * width:
                    return None
                if not t.is_contiguous() or t.is_neg():
                    t = t.resolve_neg().contiguous()
                if t.data_ptr() == 0 and rows > 0:
                    return None
            given.append(t)
        if keep is None and (needs[0] or needs[1]):
            keep = eager.kept(rows, self.columns, self.p, seed)
        found, results = [], []
        for needed, t in zip(needs, (None, a, b0, u, v, fusion), strict=True):
            result = None
            if needed:
                result = dy.new_empty((*dy.shape[:-1], self.columns)) if t is None else torch.empty_like(t)
                found.append(result)
            results.append(pointer(result))
        call = cpu_library.OF_TRAINING.pack(
            rows, *map(pointer, given), pointer(task), pointer(keep), *results, *parameters
        )
        return None if self.library.train_backward(call + self.sizes) else found
