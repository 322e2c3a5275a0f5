"""The composed plan in torch operations: dense products over all rows, and a second factor for every run of rows of one task.

A task's M_t = f B0 + e U V is formed where its rows are many (that costs N R S); else the factors are applied one after the
other (about (N + R) S a row).
"""

from collections.abc import Callable, Sequence
from functools import cache, wraps
from math import exp
from typing import NamedTuple

import torch
from torch import Tensor

from ..philox import keep_mask, keep_scale, threshold
from ..schema import AdapterArgs
from . import task_rows
from .task_rows import Group, Layout


def in_given_dtypes(function: Callable) -> Callable:
    """Autocast has cast the activations before; inside, it would round what is kept in fp32 on purpose."""

    @wraps(function)
    def run(*args):
        if not torch._C._is_any_autocast_enabled():
            return function(*args)
        x = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with torch.autocast(x.device.type, enabled=False):
            return function(*args)

    return run


class Parts(NamedTuple):
    """The steps of the plan for which a device may have kernels of its own.

    shrink(x, adapters) -> the h [M, R] of each, in x's dtype. expand_by_m(q, adapter, layout, bias) -> bias + s q M_t^T.
    through_m(dy, q, adapter, layout, needs, wants_dq) -> the gradients of b0, u, v and fusion among `needs`, and dq.
    down(x, dhs, adapters, needs) -> of each the gradients of x and a among its `needs`; all of x is in the first.
    forms_m(rows, layout, adapter) -> whether every M_t is formed for rows [M, ...] of y or dy. working_dtype(x) -> that of
    the products.
    """

    shrink: Callable
    expand_by_m: Callable
    through_m: Callable
    down: Callable
    forms_m: Callable
    working_dtype: Callable


def forward(
    x: Tensor, adapter: AdapterArgs, bias: Tensor | None = None, parts: Parts | None = None
) -> tuple[Tensor, Tensor]:
    """y = bias + delta, and h."""
    return forward_of_all(x, (None,), (bias,), (adapter,), parts)


def backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    adapter: AdapterArgs,
    needs: frozenset[str],
    parts: Parts | None = None,
) -> dict[str, Tensor]:
    (grads,) = backward_of_all((dy,), x, (None,), (h,), (adapter,), (needs,), parts)
    return grads


@in_given_dtypes
def forward_of_all(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    adapters: Sequence[AdapterArgs],
    parts: Parts | None = None,
) -> tuple[Tensor, ...]:
    """The y, then the h of adapters of one x with one dropout mask, their bases included where given."""
    parts, ys, hs = parts or TORCH, [], []
    found = parts.shrink(cast(x, parts.working_dtype(x)), adapters)
    for h, weight, bias, adapter in zip(found, weights, biases, adapters, strict=True):
        y = cast(expand(gated(h, adapter), adapter, bias, parts), x.dtype)
        ys.append(y if weight is None else y.addmm_(x, cast(weight, x.dtype).T))
        hs.append(cast(h, x.dtype))
    return *ys, *hs


@in_given_dtypes
def backward_of_all(
    dys: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor | None],
    hs: Sequence[Tensor | None],
    adapters: Sequence[AdapterArgs],
    needs: Sequence[frozenset[str]],
    parts: Parts | None = None,
) -> tuple[dict[str, Tensor], ...]:
    parts = parts or TORCH
    dtype = parts.working_dtype(dys[0])
    x, *hs = (t if t is None else cast(t, dtype) for t in (x, *hs))
    found = [
        backward_up(cast(dy, dtype), h, adapter, wanted, parts) if wanted else ({}, None)
        for dy, h, adapter, wanted in zip(dys, hs, adapters, needs, strict=True)
    ]
    grads, dhs = zip(*found, strict=True)
    if any(wanted & {"x", "a"} for wanted in needs):
        for own, of_x in zip(grads, parts.down(x, dhs, adapters, needs), strict=True):
            own |= of_x
    if "x" in needs[0]:
        dx = grads[0]["x"] = cast(grads[0]["x"], dys[0].dtype)
        for dy, weight in zip(dys, weights, strict=True):
            if weight is not None:
                dx.addmm_(dy, cast(weight, dy.dtype))
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
    keep = kept(rows, columns, adapter.p, adapter.seed)
    return keep if keep is None else keep.to(dtype)


def kept(rows: int, columns: int, p: float, seed: Tensor | None) -> Tensor | None:
    """Which elements of x [rows, columns] dropout keeps, bool; None without dropout."""
    if seed is None or p == 0 or threshold(p) == 0:
        return None
    if seed.device.type != "cpu":
        return keep_mask(seed, rows, columns, p)
    # Four 16-bit draws from each 64-bit word: bernoulli_ takes one word or more for every element.
    generator = torch.Generator().manual_seed(int(seed))
    words = torch.empty((rows * columns + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    draws = words.view(torch.int16)[: rows * columns].view(rows, columns)
    return draws >= threshold(p) - 32768


def shrink(x: Tensor, adapters: Sequence[AdapterArgs]) -> list[Tensor]:
    """h = D(x) A^T, [M, R] in x's dtype, of each adapter."""
    if adapters[0].p == 0:
        hs = []
        for adapter in adapters:  # a comprehension would be one more call
            hs.append(x @ cast(adapter.a, x.dtype).T)
        return hs
    rows = dropped(x, dropout_mask(*x.shape, x.dtype, adapters[0]))
    return [scaled_h(rows, adapter) for adapter in adapters]


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
    """[M, R], or [1, R] of all rows. For rows of gate that do not exist IndexError, or NaN where the host does not see them."""
    gate, at = adapter.gate, adapter.gate_row
    if at is None:
        return gate
    if task_rows.seen_by_host(at):
        return gate.index_select(0, at)  # indexing counts negative ones from the end
    last = len(gate) - 1
    missing = (at < 0) | (at > last)
    return gate.index_select(0, at.clamp(0, last)).masked_fill_(missing.unsqueeze(1), torch.nan)


def down(
    x: Tensor | None,
    dhs: Sequence[Tensor | None],
    adapters: Sequence[AdapterArgs],
    needs: Sequence[frozenset[str]],
) -> list[dict[str, Tensor]]:
    """dx = D'(sum of dh A), [M, K], and every da; dh may be None where neither is wanted."""
    like = next(dh for dh in dhs if dh is not None)
    keep = dropout_mask(like.shape[0], adapters[0].a.shape[1], like.dtype, adapters[0])
    if keep is not None:
        dhs = [dh if dh is None else dh * keep_scale(adapters[0].p) for dh in dhs]
    grads: list[dict[str, Tensor]] = [{} for _ in dhs]
    if "x" in needs[0]:
        dx = dhs[0] @ cast(adapters[0].a, like.dtype)
        for dh, adapter in zip(dhs[1:], adapters[1:], strict=True):
            dx.addmm_(dh, cast(adapter.a, like.dtype))
        grads[0]["x"] = dx if keep is None else dx.mul_(keep)
    if any("a" in wanted for wanted in needs):
        rows = dropped(x, keep)
        for grad, dh, adapter, wanted in zip(grads, dhs, adapters, needs, strict=True):
            if "a" in wanted:
                grad["a"] = da(dh, rows, adapter)
    return grads


def da(dh: Tensor, dropped_x: Tensor, adapter: AdapterArgs) -> Tensor:
    """dh^T D(x), [R, K] in a's dtype; dh carries the keep-scale."""
    if adapter.ranks is None:
        return cast(sum_over_rows(dh, dropped_x, adapter.a), adapter.a.dtype)
    lo, hi = adapter.ranks
    grad = adapter.a.new_zeros(adapter.a.shape)
    grad[lo:hi] = sum_over_rows(dh[:, lo:hi], dropped_x, adapter.a)
    return grad


# --- the second factor, per task -----------------------------------------------------------------------------------


def sigmoid(t: float) -> float:
    return 1 / (1 + exp(-t)) if t >= 0 else exp(t) / (1 + exp(t))


def share(adapter: AdapterArgs, t: int) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """f and e of a task: numbers on a CPU, elsewhere [1, 1] in fp32 at least, for which the host need not wait."""
    if adapter.fusion is None:
        return 1.0, 1.0
    own = adapter.fusion if adapter.fusion.numel() == 1 else adapter.fusion[t]
    f = sigmoid(own.item()) if task_rows.seen_by_host(own) else torch.sigmoid(cast(own, wide(own.dtype))).view(1, 1)
    return f, 1 - f


def shares(adapter: AdapterArgs, layout: Layout, dtype: torch.dtype) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """f and e of all rows: as `share` where they belong to one task, else [M, 1] in `dtype`.

    Zero for rows without a task, NaN for ids of no task.
    """
    if layout.one:
        return share(adapter, layout.runs[0].tasks)
    seen = layout.is_seen
    if seen and adapter.fusion is None and not layout.bare:
        return 1.0, 1.0
    like = adapter.b0 if adapter.fusion is None else adapter.fusion
    if adapter.fusion is None:
        f = like.new_ones(len(adapter.u), dtype=wide(like.dtype))
    else:
        f = torch.sigmoid(cast(like, wide(like.dtype)))
    task = adapter.task if layout.order is None else layout.task
    if seen and not layout.bare:
        f = f.index_select(0, task)
    else:
        f = torch.cat([f, f.new_full((1,), torch.nan), f.new_zeros(1)])[task.clamp(-1, len(f))]
    f = f.unsqueeze(1)
    return cast(f, dtype), cast(f if adapter.fusion is None else torch.rsub(f, 1), dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def scaled(tensor: Tensor, alpha: float, share: float | Tensor) -> tuple[Tensor, float]:
    """The two factors of tensor * share * alpha: a product takes a number as its alpha."""
    return (tensor, alpha * share) if isinstance(share, float) else (tensor * cast(share, tensor.dtype), alpha)


def product(left: Tensor, right: Tensor, alpha: float, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """bias + alpha left right, of matrices or of batches of them."""
    multiply = torch.addmm if left.dim() == 2 else torch.baddbmm
    start = left.new_empty(1) if bias is None else cast(bias, left.dtype)
    return multiply(start, left, right, beta=0 if bias is None else 1, alpha=alpha, out=out)


def times(left: Tensor, right: Tensor) -> Tensor:
    """left right, of matrices or of batches of them; `@` first looks for broadcasting."""
    return torch.mm(left, right) if left.dim() == 2 else torch.bmm(left, right)


def wide_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left right in fp32 at least: sums over many rows leave fp16's range before what is made of them does."""
    multiply, dtype = torch.mm if left.dim() == 2 else torch.bmm, wide(left.dtype)
    if not left.is_cpu and left.dtype != dtype:
        return multiply(left, right, out_dtype=dtype, out=out)
    return multiply(cast(left, dtype), cast(right, dtype), out=out)


def sum_over_rows(left: Tensor, right: Tensor, parameter: Tensor, alpha: float = 1) -> Tensor:
    """alpha left^T right, not rounded to the rows' type where the parameter whose gradient it is has a wider one."""
    if left.dtype != wide(left.dtype) and parameter.dtype == wide(left.dtype):
        return wide_product(left.mT, right).mul_(alpha)
    return left.mT @ right if alpha == 1 else product(left.mT, right, alpha)


def add_product(result: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """result += alpha left right."""
    (result.addmm_ if left.dim() == 2 else result.baddbmm_)(left, right, alpha=alpha)


def compose(adapter: AdapterArgs, run: Group, f: float | Tensor, e: float | Tensor) -> Tensor:
    """M_t, [N, R] in fp32 at least."""
    dtype = wide(adapter.b0.dtype)
    b0, u, v = cast(adapter.b0, dtype), run.own(adapter.u, dtype), run.own(adapter.v, dtype)
    return torch.addmm(b0, u, v, beta=f, alpha=e) if isinstance(f, float) else torch.lerp(u @ v, b0, cast(f, dtype))


def with_task(rows: Tensor, adapter: AdapterArgs) -> Tensor:
    """Zero for rows without a task, whatever they hold: 0 times a value that is not finite is NaN."""
    return rows if adapter.task is None else torch.where((adapter.task >= 0).unsqueeze(1), rows, 0)


def expand(q: Tensor, adapter: AdapterArgs, bias: Tensor | None, parts: Parts) -> Tensor:
    """bias + s q M_t^T, [M, N]."""
    s = adapter.scaling
    if adapter.u is None:
        seen = adapter.task is not None and task_rows.seen_by_host(adapter.task)
        y = product(q if seen else with_task(q, adapter), cast(adapter.b0, q.dtype).T, s, bias)
        if seen:
            y[adapter.task < 0] = of_bare_rows(q, bias)
        return y
    layout = task_rows.layout_of(adapter)
    if parts.forms_m(q, layout, adapter):
        return parts.expand_by_m(q, adapter, layout, bias)
    q = layout.ordered(q if layout.is_seen else with_task(q, adapter))
    f, e = shares(adapter, layout, q.dtype)
    left, alpha = scaled(q, s, f)
    y = product(left, cast(adapter.b0, q.dtype).T, alpha, bias)
    q_e, alpha = scaled(q, s, e)
    for group in layout.groups:
        z = times(group.masked(group.of(q_e)), group.own(adapter.v, q.dtype).mT)
        add_product(group.of(y), z, group.own(adapter.u, q.dtype).mT, alpha)
    for rows in layout.bare:
        y[rows] = of_bare_rows(q, bias)
    return layout.restored(y)


def of_bare_rows(q: Tensor, bias: Tensor | None) -> float | Tensor:
    """y of rows without a task, whatever 0 times B0 is."""
    return 0.0 if bias is None else cast(bias, q.dtype)


def expand_by_m(q: Tensor, adapter: AdapterArgs, layout: Layout, bias: Tensor | None) -> Tensor:
    order, runs = (layout.order, layout.runs) if layout.stretches is None else (None, layout.stretches)
    q = q if order is None else q[order]
    y = q.new_empty(len(q), len(adapter.b0))
    if layout.bare:
        y[:] = 0 if bias is None else bias
    composed = None
    for run in runs:
        if run.tasks != composed:
            composed, m = run.tasks, cast(compose(adapter, run, *share(adapter, run.tasks)), q.dtype).T
        product(run.of(q), m, adapter.scaling, bias, out=run.of(y))
    return y if order is None else layout.restored(y)


def backward_up(
    dy: Tensor, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str], parts: Parts
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Gradients of b0, u, v, fusion and gate, as far as asked for, and dh [M, R] for those of x and a."""
    q = None if h is None else gated(h, adapter)
    wants_dq = not needs.isdisjoint(("x", "a", "gate"))
    if adapter.u is None:
        grads, dq = plain_backward(dy, q, adapter, needs, wants_dq)
    else:
        layout = task_rows.layout_of(adapter)
        through = parts.through_m if parts.forms_m(dy, layout, adapter) else through_factors
        left = dy
        if through is through_factors and (layout.bare or not layout.is_seen):
            left, q = with_task(dy, adapter), q if q is None else with_task(q, adapter)
        grads, dq = through(layout.ordered(left), layout.ordered(q), adapter, layout, needs, wants_dq)
        for name in needs & {"b0", "u", "v", "fusion"} - grads.keys():  # no row has a task
            grads[name] = torch.zeros_like(getattr(adapter, name), memory_format=torch.contiguous_format)
        if dq is not None:
            for rows in layout.bare:
                dq[rows] = 0
            dq = layout.restored(dq) if layout.is_seen else with_task(dq, adapter)
        if "b0" in grads and adapter.ranks is not None:
            lo, hi = adapter.ranks
            grads["b0"][:, :lo], grads["b0"][:, hi:] = 0, 0
    grads = {name: cast(grad, getattr(adapter, name).dtype) for name, grad in grads.items()}
    if dq is None:
        return grads, None
    if "gate" in needs:
        grads["gate"] = dgate(dq, with_task(h, adapter), adapter)
    return grads, dq if adapter.gate is None else dq * row_gates(adapter).to(dq.dtype)


def dgate(dq: Tensor, h: Tensor, adapter: AdapterArgs) -> Tensor:
    """Sum of dq * h over the rows of each gate; on a GPU as a matrix product: its order is fixed, unlike that of atomics."""
    products = cast(dq, wide(dq.dtype)) * h
    if adapter.gate_row is None:
        return products.sum(0, keepdim=True).to(adapter.gate.dtype)
    if dq.device.type == "cpu":
        sums = products.new_zeros(adapter.gate.shape)
        return sums.index_add_(0, adapter.gate_row, products).to(adapter.gate.dtype)
    one_hot = adapter.gate_row == torch.arange(adapter.gate.shape[0], device=dq.device).unsqueeze(1)
    return (cast(one_hot, products.dtype) @ products).to(adapter.gate.dtype)


def place(grads: dict[str, Tensor], name: str, group: Group, value: float | Tensor, like: Tensor) -> None:
    """Make `value` the gradient of a group's tasks in that of `like`; a task without rows keeps zeros."""
    if not isinstance(value, Tensor) and len(like) == 1:
        grads[name] = torch.full_like(like, value)
        return
    if isinstance(value, Tensor) and value.numel() == like.numel() and not isinstance(group.tasks, Tensor):
        grads[name] = value.view(like.shape)
        return
    if name not in grads:
        grads[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
    # Indexing with a tensor does not cast.
    grads[name][group.tasks] = cast(value, like.dtype) if isinstance(group.tasks, Tensor) else value


def through_m(
    dy: Tensor, q: Tensor | None, adapter: AdapterArgs, layout: Layout, needs: frozenset[str], wants_dq: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Through the gradient of M_t; ops/README.md has the chain."""
    s, grads = adapter.scaling, {}
    dq = dy.new_empty(dy.shape[0], adapter.a.shape[0]) if wants_dq else None
    for run in layout.runs:
        f, e = share(adapter, run.tasks)
        if wants_dq:
            product(run.of(dy), cast(compose(adapter, run, f, e), dy.dtype), s, out=run.of(dq))
        if needs.isdisjoint(("b0", "u", "v", "fusion")):
            continue
        dm = wide_product(run.of(dy).T, run.of(q))  # [N, R], without s
        v = run.own(adapter.v, dm.dtype)
        if "u" in needs:
            right, alpha = scaled(v.T, s, e)
            place(grads, "u", run, product(dm, right, alpha), adapter.u)
        if "v" in needs or "fusion" in needs:
            dv = run.own(adapter.u, dm.dtype).T @ dm  # without s e
        if "v" in needs:
            place(grads, "v", run, dv * (s * e), adapter.v)
        if "fusion" in needs:
            place(grads, "fusion", run, s * f * e * (dot(dm, adapter.b0) - dot(dv, v)), adapter.fusion)
        if "b0" in needs:
            term = dm * (s * f)
            grads["b0"] = term if "b0" not in grads else grads["b0"].add_(term)
    return grads, dq


def dot(left: Tensor, right: Tensor) -> float | Tensor:
    """<left, right> in fp32 at least: a number on a CPU, elsewhere a tensor []."""
    dtype = wide(left.dtype)
    found = (cast(left, dtype) * cast(right, dtype)).sum()
    return found.item() if task_rows.seen_by_host(found) else found


def through_factors(
    dy: Tensor, q: Tensor | None, adapter: AdapterArgs, layout: Layout, needs: frozenset[str], wants_dq: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """M_t never formed: s f dy B0 dense over all rows, dy U_t and q V_t^T per task."""
    s, grads, dq = adapter.scaling, {}, None
    f, e = shares(adapter, layout, dy.dtype)
    if wants_dq or "fusion" in needs:
        b0 = cast(adapter.b0, dy.dtype)
        dq = product(dy, b0, s * f) if isinstance(f, float) else product(dy, b0, s).mul_(f)
    if q is not None:
        q_e, alpha = scaled(q, s, e)
    if "b0" in needs:
        right, alpha_b0 = scaled(q, s, f)
        grads["b0"] = sum_over_rows(dy, right, adapter.b0, alpha_b0)
    if "fusion" in needs and not isinstance(f, float):
        of_rows = (dq * q).sum(1, keepdim=True, dtype=wide(q.dtype)) * e
    for group in layout.groups:
        u, v, rows = group.own(adapter.u, dy.dtype), group.own(adapter.v, dy.dtype), group.of(dy)
        if wants_dq or "v" in needs or "fusion" in needs:
            dz = group.masked(times(rows, u))  # without s e
        if not needs.isdisjoint(("u", "v", "fusion")):
            own_q = group.masked(group.of(q_e))
        if "u" in needs or "fusion" in needs:
            z = times(own_q, v.mT)
        if "u" in needs:
            place(grads, "u", group, sum_over_rows(rows, z, adapter.u, alpha), adapter.u)
        if "v" in needs:
            place(grads, "v", group, sum_over_rows(dz, own_q, adapter.v, alpha), adapter.v)
        if "fusion" in needs:
            if isinstance(f, float):
                slope = e * dot(dq, q) - alpha * f * dot(dz, z)
            else:
                own = (dz * z).sum(-1, keepdim=True, dtype=wide(z.dtype)) * (alpha * group.of(f))
                slope = (group.masked(group.of(of_rows)) - own).sum((-2, -1))
            place(grads, "fusion", group, slope, adapter.fusion)
        if wants_dq:
            own, factor = scaled(dz, s, e if isinstance(e, float) else group.of(e))
            add_product(group.of(dq), own, v, factor)
    return grads, dq if wants_dq else None


def plain_backward(
    dy: Tensor, q: Tensor | None, adapter: AdapterArgs, needs: frozenset[str], wants_dq: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Without factors of tasks."""
    grads, s = {}, adapter.scaling
    if "b0" in needs:
        left, q = with_task(dy, adapter), with_task(q, adapter)  # neither's NaN in rows without a task
        if adapter.ranks is None:
            grads["b0"] = sum_over_rows(left, q, adapter.b0, s)
        else:
            lo, hi = adapter.ranks
            grads["b0"] = torch.zeros_like(adapter.b0, memory_format=torch.contiguous_format)
            grads["b0"][:, lo:hi] = sum_over_rows(left, q[:, lo:hi], adapter.b0, s)
    return grads, with_task(product(dy, cast(adapter.b0, dy.dtype), s), adapter) if wants_dq else None


def forms_m(rows: Tensor, layout: Layout, adapter: AdapterArgs) -> bool:
    """Whether the rows [M, ...] are so many that forming every M_t costs less than two more factors for each of them.

    In bytes: U_t costs another pass over y or dy, 2 N a row. M_t on a CPU, where f and e are numbers, is read and written
    once, 2 N R; elsewhere and in 16 bits it is made in fp32 and rounded, about 14 N R forward and 50 N R backward.
    """
    # bench.model counts launches too, about 40 a task: us of a GPU for both directions of gate and up, by M_t / by factors:
    # one task 2048 rows 701 / 685, 8192 rows 2251 / 2371; 8 tasks 16384 rows 5422 / 4613.
    rank = adapter.a.shape[0]
    per_task = rank if rows.is_cpu else 16 * rank
    return rows.shape[0] >= per_task * len(layout.runs) and layout.is_seen


TORCH = Parts(shrink, expand_by_m, through_m, down, forms_m, working_dtype)
