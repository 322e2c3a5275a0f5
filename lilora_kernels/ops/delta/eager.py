"""The composed plan in torch operations: dense products over all rows, and a second factor for every run of rows of one task.

A task's M_t = f B0 + e U V is formed where its rows are many (that costs N R S); else the factors are applied one after the
other (about (N + R) S a row).
"""

from collections.abc import Callable
from functools import cache, wraps
from itertools import accumulate
from math import exp
from typing import NamedTuple

import torch
from torch import Tensor

from ..philox import keep_mask, keep_scale, threshold
from ..schema import AdapterArgs

LONG_RUN = 32  # mean rows per run of equal ids from which a product per run is cheaper than permuting [M, N]


def in_given_dtypes(function: Callable) -> Callable:
    """Autocast has cast the activations before; inside, it would round what is kept in fp32 on purpose."""

    @wraps(function)
    def run(*args):
        x = args[0] if isinstance(args[0], Tensor) else args[0][0]
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return function(*args)
        with torch.autocast(x.device.type, enabled=False):
            return function(*args)

    return run


@in_given_dtypes
def forward(x: Tensor, adapter: AdapterArgs, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y = bias + delta, and h."""
    wide = cast(x, working_dtype(x))
    h = shrink(wide, adapter)
    y = expand(gated(h, adapter), adapter, bias)
    return cast(y, x.dtype), cast(h, x.dtype)


@in_given_dtypes
def backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str]
) -> dict[str, Tensor]:
    dtype = dy.dtype
    dy, x, h = (t if t is None else cast(t, working_dtype(t)) for t in (dy, x, h))
    grads, dh = backward_up(dy, h, adapter, needs)
    if "x" in needs or "a" in needs:
        keep = dropout_mask(dy.shape[0], adapter.a.shape[1], dy.dtype, adapter)
        if keep is not None:
            dh = dh * keep_scale(adapter.p)
        if "x" in needs:
            grads["x"] = cast(dx_part(dh, keep, adapter), dtype)
        if "a" in needs:
            grads["a"] = da(dh, dropped(x, keep), adapter)
    return grads


def working_dtype(x: Tensor) -> torch.dtype:
    """x's dtype; fp32 on a CPU whose 16-bit products take several times as long as fp32's and a copy together."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not has_fast_products(x.dtype):
        return torch.float32
    return x.dtype


@cache
def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether torch hands 16-bit products of this CPU to oneDNN; without, it has only a plain loop."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is None or supported()


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As `to`, which takes microseconds to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


# --- the shared first factor ---------------------------------------------------------------------------------------


def dropout_mask(rows: int, columns: int, dtype: torch.dtype, adapter: AdapterArgs) -> Tensor | None:
    """1 where the element is kept, [rows, columns] in `dtype`; None without dropout."""
    if threshold(adapter.p) == 0:
        return None
    if adapter.seed.device.type != "cpu":
        return keep_mask(adapter.seed, rows, columns, adapter.p).to(dtype)
    # Four 16-bit draws from each 64-bit word: bernoulli_ takes one word or more for every element.
    generator = torch.Generator().manual_seed(int(adapter.seed))
    words = torch.empty((rows * columns + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    draws = words.view(torch.int16)[: rows * columns].view(rows, columns)
    return (draws >= threshold(adapter.p) - 32768).to(dtype)


def shrink(x: Tensor, adapter: AdapterArgs) -> Tensor:
    """h = D(x) A^T, [M, R] in x's dtype."""
    return scaled_h(dropped(x, dropout_mask(*x.shape, x.dtype, adapter)), adapter)


def dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    """D(x) without its scale. Overwrites keep."""
    return x if keep is None else keep.mul_(x)


def scaled_h(dropped_x: Tensor, adapter: AdapterArgs) -> Tensor:
    h = dropped_x @ cast(adapter.a, dropped_x.dtype).T
    return h if threshold(adapter.p) == 0 else h.mul_(keep_scale(adapter.p))  # the scale on [M, R], not on [M, K]


def gated(h: Tensor, adapter: AdapterArgs) -> Tensor:
    """q = h * g."""
    if adapter.gate is None:
        return h
    return h * row_gates(adapter).to(h.dtype)


def row_gates(adapter: AdapterArgs) -> Tensor:
    return adapter.gate if adapter.gate_row is None else adapter.gate[adapter.gate_row]


def dx_part(dh: Tensor, keep: Tensor | None, adapter: AdapterArgs) -> Tensor:
    """D'(dh A), [M, K]; dh carries the keep-scale."""
    dx = dh @ cast(adapter.a, dh.dtype)
    return dx if keep is None else dx.mul_(keep)


def da(dh: Tensor, dropped_x: Tensor, adapter: AdapterArgs) -> Tensor:
    """dh^T D(x), [R, K] in a's dtype; dh carries the keep-scale."""
    if adapter.ranks is None:
        return cast(dh.T @ dropped_x, adapter.a.dtype)
    lo, hi = adapter.ranks
    grad = adapter.a.new_zeros(adapter.a.shape)
    grad[lo:hi] = dh[:, lo:hi].T @ dropped_x
    return grad


# --- the second factor, per task -----------------------------------------------------------------------------------


class Run(NamedTuple):
    """Rows of one task: a slice on a CPU; elsewhere, where the host would have to wait for ids, all rows and a mask [M, 1]."""

    task: int
    rows: slice = slice(None)
    mask: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Its rows of a tensor [M, ...]."""
        return tensor if self.rows == slice(None) else tensor[self.rows]

    def masked(self, tensor: Tensor) -> Tensor:
        return tensor if self.mask is None else tensor * self.mask


def runs_of(adapter: AdapterArgs) -> tuple[Tensor | None, list[Run]]:
    """The runs of rows of one task, none for rows without a task, and the permutation that makes each task one run.

    Raises ValueError for ids of no task; where the host does not see them their rows become NaN (see `base_part`).
    """
    if adapter.task is None:
        return None, [Run(0)]
    tasks = adapter.u.shape[0]
    if not seen_by_host(adapter.task):
        return None, [Run(t, mask=(adapter.task == t).unsqueeze(1)) for t in range(tasks)]
    order, runs = None, consecutive(adapter.task)
    if len({run.task for run in runs}) < len(runs):
        order = torch.argsort(adapter.task, stable=True)
        runs = consecutive(adapter.task[order])
    for run in runs:
        if not -1 <= run.task < tasks:
            raise ValueError(
                f"task has the id {run.task}; ids must be in 0..{tasks - 1}, or -1 for rows without an adapter"
            )
    return order, runs


def seen_by_host(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def consecutive(task: Tensor) -> list[Run]:
    ids, counts = torch.unique_consecutive(task, return_counts=True)
    lengths = counts.tolist()
    return [Run(t, slice(end - n, end)) for t, n, end in zip(ids.tolist(), lengths, accumulate(lengths), strict=True)]


def sigmoid(t: float) -> float:
    return 1 / (1 + exp(-t)) if t >= 0 else exp(t) / (1 + exp(t))


def shares(adapter: AdapterArgs, runs: list[Run]) -> dict[int, tuple]:
    """f and e of the runs' tasks: numbers on a CPU, elsewhere scalars in fp32 at least, which the host need not wait for."""
    tasks = list({run.task for run in runs if run.task >= 0})
    if adapter.fusion is None:
        return dict.fromkeys(tasks, (1.0, 1.0))
    if seen_by_host(adapter.fusion):
        chosen = adapter.fusion if len(tasks) == len(adapter.fusion) == 1 else adapter.fusion[tasks]
        found = [sigmoid(t) for t in chosen.tolist()]
    else:
        found = mixing(adapter)[tasks]
    return {t: (f, 1 - f) for t, f in zip(tasks, found, strict=True)}


def mixing(adapter: AdapterArgs) -> Tensor:
    """f of every task, [T] in fp32 at least."""
    if adapter.fusion is None:
        return adapter.b0.new_ones(len(adapter.u), dtype=torch.promote_types(adapter.b0.dtype, torch.float32))
    return torch.sigmoid(cast(adapter.fusion, torch.promote_types(adapter.fusion.dtype, torch.float32)))


def scaled(tensor: Tensor, alpha: float, share: float | Tensor) -> tuple[Tensor, float]:
    """The two factors of tensor * share * alpha: a product takes a number as its alpha."""
    return (tensor, alpha * share) if isinstance(share, float) else (tensor * cast(share, tensor.dtype), alpha)


def product(left: Tensor, right: Tensor, alpha: float, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """bias + alpha left right."""
    start = left.new_empty(1) if bias is None else cast(bias, left.dtype)
    return torch.addmm(start, left, right, beta=0 if bias is None else 1, alpha=alpha, out=out)


def compose(adapter: AdapterArgs, t: int, share: float | Tensor) -> tuple[Tensor, Tensor]:
    """M_t and U_t V_t, [N, R] in fp32 at least."""
    dtype = torch.promote_types(adapter.b0.dtype, torch.float32)
    b0, uv = cast(adapter.b0, dtype), cast(adapter.u[t], dtype) @ cast(adapter.v[t], dtype)
    return b0 + uv if adapter.fusion is None else torch.lerp(uv, b0, share), uv


def composes(adapter: AdapterArgs, rows: int, runs: list[Run]) -> bool:
    tasks = {run.task for run in runs if run.task >= 0}
    return rows >= adapter.a.shape[0] * len(tasks) and all(run.mask is None for run in runs)


def base_part(rows: Tensor, adapter: AdapterArgs, of: dict[int, tuple]) -> tuple[Tensor, float]:
    """(rows [M, ...], alpha), which together are s f_t of its task times each row.

    Zero for rows without a task, NaN for ids of no task.
    """
    if adapter.task is None:
        return scaled(rows, adapter.scaling, of[0][0])
    f = mixing(adapter)
    table = cast(torch.cat([f, f.new_tensor([torch.nan, 0])]), rows.dtype)
    return rows * table[adapter.task.clamp(-2, len(f))].unsqueeze(1), adapter.scaling


def with_task(rows: Tensor, adapter: AdapterArgs) -> Tensor:
    """Without factors of tasks: zero for rows without a task."""
    return rows if adapter.task is None else rows * (adapter.task >= 0).unsqueeze(1)


def expand(q: Tensor, adapter: AdapterArgs, bias: Tensor | None) -> Tensor:
    """bias + s q M_t^T, [M, N]."""
    b0, s = cast(adapter.b0, q.dtype).T, adapter.scaling
    if adapter.u is None:
        return product(with_task(q, adapter), b0, s, bias)
    order, runs = runs_of(adapter)
    if order is not None and len(order) >= LONG_RUN * len(stretches := consecutive(adapter.task)):
        order, runs = None, sorted(stretches)
    if order is not None:
        adapter, q = adapter._replace(task=adapter.task[order]), q[order]
    of = shares(adapter, runs)
    if composes(adapter, len(q), runs):
        y, composed = q.new_empty(len(q), b0.shape[1]), -1
        for run in runs:
            if run.task < 0:
                run.of(y)[:] = 0 if bias is None else bias
                continue
            if run.task != composed:
                composed, m = run.task, cast(compose(adapter, run.task, of[run.task][0])[0], q.dtype).T
            product(run.of(q), m, s, bias, out=run.of(y))
    else:
        left, alpha = base_part(q, adapter, of)
        y = product(left, b0, alpha, bias)
        if (batch := batched(runs)) is not None:
            tasks, rows = batch
            u, v = cast(adapter.u[tasks], q.dtype), cast(adapter.v[tasks], q.dtype)
            z = torch.bmm(q[rows].view(len(u), -1, q.shape[1]), v.mT)
            if adapter.fusion is not None:
                z = z * cast(1 - mixing(adapter)[tasks], z.dtype).view(-1, 1, 1)
            y[rows].view(len(u), -1, y.shape[1]).baddbmm_(z, u.mT, alpha=s)
        else:
            for run in runs:
                if run.task >= 0:
                    add_second(run.of(y), run.masked(run.of(q)), adapter, run, of[run.task][1])
    return y if order is None else torch.empty_like(y).index_copy_(0, order, y)


def add_second(y: Tensor, q: Tensor, adapter: AdapterArgs, run: Run, share: float | Tensor) -> None:
    """y += s e (q V_t^T) U_t^T."""
    z, alpha = scaled(q @ cast(adapter.v[run.task], q.dtype).T, adapter.scaling, share)
    y.addmm_(z, cast(adapter.u[run.task], q.dtype).T, alpha=alpha)


def batched(runs: list[Run]) -> tuple[slice | list[int], slice] | None:
    """Runs of equal length side by side: their tasks, for an index that copies nothing if it can, and all their rows."""
    runs = [run for run in runs if run.task >= 0]
    if len(runs) < 2 or runs[0].mask is not None:
        return None
    first, last = runs[0], runs[-1]
    rows = slice(first.rows.start, last.rows.stop)
    length = first.rows.stop - first.rows.start
    if any(run.rows != slice(rows.start + i * length, rows.start + (i + 1) * length) for i, run in enumerate(runs)):
        return None
    tasks = [run.task for run in runs]
    together = slice(first.task, first.task + len(runs))
    return together if tasks == list(range(together.start, together.stop)) else tasks, rows


def backward_up(
    dy: Tensor, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Gradients of b0, u, v, fusion and gate, as far as asked for, and dh [M, R] for those of x and a."""
    q = None if h is None else gated(h, adapter)
    wants_dq = not needs.isdisjoint(("x", "a", "gate"))
    if adapter.u is None:
        grads, dq = plain_backward(dy, q, adapter, needs, wants_dq)
    else:
        order, runs = runs_of(adapter)
        ordered = adapter
        if order is not None:
            ordered, dy = adapter._replace(task=adapter.task[order]), dy[order]
            q = None if q is None else q[order]
        through = through_m if composes(adapter, len(dy), runs) else through_factors
        grads, dq = through(dy, q, ordered, runs, needs, wants_dq)
        if order is not None and dq is not None:
            dq = torch.empty_like(dq).index_copy_(0, order, dq)
        if "b0" in grads and adapter.ranks is not None:
            lo, hi = adapter.ranks
            grads["b0"][:, :lo], grads["b0"][:, hi:] = 0, 0
    grads = {name: cast(grad, getattr(adapter, name).dtype) for name, grad in grads.items()}
    if dq is None:
        return grads, None
    if "gate" in needs:
        grads["gate"] = dgate(dq, h, adapter)
    return grads, dq if adapter.gate is None else dq * row_gates(adapter).to(dq.dtype)


def dgate(dq: Tensor, h: Tensor, adapter: AdapterArgs) -> Tensor:
    """Sum of dq * h over the rows of each gate; on a GPU as a matrix product: its order is fixed, unlike that of atomics."""
    products = cast(dq, torch.promote_types(dq.dtype, torch.float32)) * h
    if adapter.gate_row is None:
        return products.sum(0, keepdim=True).to(adapter.gate.dtype)
    if dq.device.type == "cpu":
        sums = products.new_zeros(adapter.gate.shape)
        return sums.index_add_(0, adapter.gate_row, products).to(adapter.gate.dtype)
    one_hot = adapter.gate_row == torch.arange(adapter.gate.shape[0], device=dq.device).unsqueeze(1)
    return (cast(one_hot, products.dtype) @ products).to(adapter.gate.dtype)


def plain_backward(
    dy: Tensor, q: Tensor | None, adapter: AdapterArgs, needs: frozenset[str], wants_dq: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Without factors of tasks."""
    grads, s = {}, adapter.scaling
    if "b0" in needs:
        left = with_task(dy, adapter).T
        if adapter.ranks is None:
            grads["b0"] = product(left, q, s)
        else:
            lo, hi = adapter.ranks
            grads["b0"] = dy.new_zeros(adapter.b0.shape)
            grads["b0"][:, lo:hi] = product(left, q[:, lo:hi], s)
    return grads, with_task(product(dy, cast(adapter.b0, dy.dtype), s), adapter) if wants_dq else None


def of_tasks(adapter: AdapterArgs, needs: frozenset[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Room for the gradients of u, v and fusion, as far as asked for; a task without rows keeps the zeros."""
    dtypes = {"u": dtype, "v": dtype, "fusion": torch.promote_types(dtype, torch.float32)}
    wanted = {name: getattr(adapter, name) for name in dtypes if name in needs}
    make = torch.empty_like if adapter.task is None else torch.zeros_like
    return {
        name: make(like, dtype=dtypes[name], memory_format=torch.contiguous_format) for name, like in wanted.items()
    }


def through_m(
    dy: Tensor, q: Tensor | None, adapter: AdapterArgs, runs: list[Run], needs: frozenset[str], wants_dq: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Through the gradient of M_t; ops/README.md has the chain."""
    s, of = adapter.scaling, shares(adapter, runs)
    grads, db0 = of_tasks(adapter, needs, dy.dtype), None
    dq = dy.new_empty(len(dy), adapter.a.shape[0]) if wants_dq else None
    for run in runs:
        t = run.task
        if t < 0:
            if wants_dq:
                run.of(dq).zero_()
            continue
        f, e = of[t]
        if wants_dq or "fusion" in needs:
            m, uv = compose(adapter, t, f)
        if wants_dq:
            product(run.of(dy), cast(m, dy.dtype), s, out=run.of(dq))
        if not grads and "b0" not in needs:
            continue
        dm = run.of(dy).T @ run.of(q)  # [N, R], without s
        if "u" in needs:
            right, alpha = scaled(cast(adapter.v[t], dm.dtype).T, s, e)
            product(dm, right, alpha, out=grads["u"][t])
        if "v" in needs:
            left, alpha = scaled(cast(adapter.u[t], dm.dtype).T, s, e)
            product(left, dm, alpha, out=grads["v"][t])
        if "fusion" in needs:
            slope = dot(dm, adapter.b0 - uv, grads["fusion"].dtype)
            torch.mul(slope, s * f * e, out=grads["fusion"][t])
        if "b0" in needs:
            term = cast(dm, torch.promote_types(dm.dtype, torch.float32)) * (s * f)
            db0 = term if db0 is None else db0.add_(term)
    if "b0" in needs:
        grads["b0"] = torch.zeros_like(adapter.b0) if db0 is None else db0
    return grads, dq


def dot(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.dot(cast(left, dtype).reshape(-1), cast(right, dtype).reshape(-1))


def through_factors(
    dy: Tensor, q: Tensor | None, adapter: AdapterArgs, runs: list[Run], needs: frozenset[str], wants_dq: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """M_t never formed: P = dy B0 dense over all rows, Q = dy U_t and z = q V_t^T per task."""
    s, of = adapter.scaling, shares(adapter, runs)
    grads = of_tasks(adapter, needs, dy.dtype)
    p_rows = dy @ cast(adapter.b0, dy.dtype) if wants_dq or "fusion" in needs else None
    if wants_dq:
        left, alpha = base_part(p_rows, adapter, of)
        dq = left * alpha
    if "b0" in needs:
        grads["b0"] = product(dy.T, *base_part(q, adapter, of))
    for run in runs:
        t = run.task
        if t < 0:
            continue
        f, e = of[t]
        u, v, rows = cast(adapter.u[t], dy.dtype), cast(adapter.v[t], dy.dtype), run.of(dy)
        if wants_dq or "v" in grads or "fusion" in grads:
            q_rows = run.masked(rows @ u)
            q_mixed, alpha = scaled(q_rows, s, e)
        if wants_dq:
            run.of(dq).addmm_(q_mixed, v, alpha=alpha)
        if "u" in grads or "fusion" in grads:
            z = run.masked(run.of(q) @ v.T)
        if "u" in grads:
            product(rows.T, *scaled(z, s, e), out=grads["u"][t])
        if "v" in grads:
            product(q_mixed.T, run.of(q), alpha, out=grads["v"][t])
        if "fusion" in grads:
            wide = grads["fusion"].dtype
            slope = dot(run.of(p_rows), run.masked(run.of(q)), wide) - dot(q_rows, z, wide)
            torch.mul(slope, s * f * e, out=grads["fusion"][t])
    return grads, dq if wants_dq else None
