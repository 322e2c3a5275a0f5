"""The fast torch path: dense h over all rows whatever the mix of tasks, and a second factor per group of rows."""

from collections.abc import Callable
from functools import cache, wraps
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..philox import keep_mask, keep_scale, threshold
from ..schema import AdapterArgs

Group = tuple[int, slice, Tensor | None]
FEW_ROWS = 64  # up to here tasks of unequal length are padded to one batched product
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
    wide = x.to(working_dtype(x))
    h = shrink(wide, adapter)
    y = wide.new_empty(x.shape[0], adapter.b0.shape[0])
    expand(gated(h, adapter), adapter, bias, y)
    return y.to(x.dtype), h.to(x.dtype)


@in_given_dtypes
def backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str]
) -> dict[str, Tensor]:
    dtype = dy.dtype
    dy, x, h = (t if t is None else t.to(working_dtype(t)) for t in (dy, x, h))
    grads, dh = backward_up(dy, h, adapter, needs)
    if "x" in needs or "a" in needs:
        keep = dropout_mask(dy.shape[0], adapter.a.shape[1], dy.dtype, adapter)
        if keep is not None:
            dh = dh * keep_scale(adapter.p)
        if "x" in needs:
            grads["x"] = dx_part(dh, keep, adapter).to(dtype)
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
    h = dropped_x @ adapter.a.to(dropped_x.dtype).T
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
    dx = dh @ adapter.a.to(dh.dtype)
    return dx if keep is None else dx.mul_(keep)


def da(dh: Tensor, dropped_x: Tensor, adapter: AdapterArgs) -> Tensor:
    """dh^T D(x), [R, K] in a's dtype; dh carries the keep-scale."""
    if adapter.ranks is None:
        return (dh.T @ dropped_x).to(adapter.a.dtype)
    lo, hi = adapter.ranks
    grad = adapter.a.new_zeros(adapter.a.shape)
    grad[lo:hi] = dh[:, lo:hi].T @ dropped_x
    return grad


# --- the second factor, per task -----------------------------------------------------------------------------------


def row_groups(adapter: AdapterArgs) -> tuple[Tensor | None, list[Group]]:
    """Rows of each task as (task, rows, mask), and the permutation that makes tasks contiguous, if one is needed.

    On a CPU the rows of a task are a slice. Elsewhere that would need the host to wait for the device, so every task
    gets all rows and a mask [M, 1]; the second factor then costs T times as much.
    """
    if adapter.task is None:
        return None, [(0, slice(None), None)]
    tasks = 1 if adapter.u is None else adapter.u.shape[0]
    if adapter.task.device.type != "cpu":
        return None, [(t, slice(None), (adapter.task == t).unsqueeze(1)) for t in range(tasks)]
    order, groups = None, runs(adapter.task)
    if len({t for t, _, _ in groups}) < len(groups):
        order = torch.argsort(adapter.task, stable=True)
        groups = runs(adapter.task[order])
    for t, _, _ in groups:
        if not -1 <= t < tasks and adapter.u is not None:
            raise ValueError(f"task has the id {t}; ids must be in 0..{tasks - 1}, or -1 for rows without an adapter")
    return order, groups


def runs(task: Tensor) -> list[Group]:
    """Stretches of rows with equal ids, in the order of the rows."""
    ids, counts = torch.unique_consecutive(task, return_counts=True)
    ends = accumulate(lengths := counts.tolist())
    return [(t, slice(end - n, end), None) for t, n, end in zip(ids.tolist(), lengths, ends, strict=True)]


def mixing(adapter: AdapterArgs) -> tuple[Tensor | None, Tensor | None]:
    """f [T] and e [T], in fp32 at least; (None, None) stands for 1 and 1."""
    if adapter.fusion is None:
        return None, None
    f = torch.sigmoid(adapter.fusion.to(torch.promote_types(adapter.fusion.dtype, torch.float32)))
    return f, 1 - f


def compose(adapter: AdapterArgs, t: int, f: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """M_t and, with fusion, U_t V_t; both [N, R] in fp32 at least."""
    dtype = torch.promote_types(adapter.b0.dtype, torch.float32)
    b0, u, v = adapter.b0.to(dtype), adapter.u[t].to(dtype), adapter.v[t].to(dtype)
    if f is None:
        return torch.addmm(b0, u, v), None
    uv = u @ v
    return torch.lerp(uv, b0, f[t].to(dtype)), uv


def composing_pays(adapter: AdapterArgs, rows: int, groups: list[Group]) -> bool:
    """Composing M_t costs N R S per task; keeping it factored costs about (N + R) S per row."""
    tasks = {t for t, _, _ in groups if t >= 0}
    return adapter.u is None or (all(mask is None for _, _, mask in groups) and rows >= adapter.a.shape[0] * len(tasks))


def base_share(q: Tensor, adapter: AdapterArgs, f: Tensor | None) -> Tensor:
    """f q per row, zero for rows without an adapter."""
    if adapter.task is None:
        return q if f is None else q * f.to(q.dtype)
    if f is None:
        return q * (adapter.task >= 0).unsqueeze(1)
    shares = torch.cat([f.to(q.dtype), q.new_tensor([torch.nan, 0])])  # an id of no task gets NaN, -1 the last
    return q * shares[adapter.task.clamp(-2, len(f))].unsqueeze(1)


def expand(q: Tensor, adapter: AdapterArgs, bias: Tensor | None, y: Tensor) -> None:
    """Overwrite y [M, N] with bias + s q M_t^T."""

    def product(rows: slice, left: Tensor, right: Tensor) -> None:
        if bias is None:
            torch.addmm(out[rows], left, right, beta=0, alpha=adapter.scaling, out=out[rows])
        else:
            torch.addmm(bias.to(q.dtype), left, right, alpha=adapter.scaling, out=out[rows])

    order, groups = row_groups(adapter)
    if order is not None and len(order) >= LONG_RUN * len(stretches := runs(adapter.task)):
        order, groups = None, sorted(stretches, key=lambda group: group[0])
    if order is not None:
        adapter, q = sorted_rows(adapter, order), q[order]
    out = y if order is None else torch.empty_like(y)
    f, e = mixing(adapter)
    if adapter.u is None:
        product(slice(None), base_share(q, adapter, None), adapter.b0.to(q.dtype).T)
    elif composing_pays(adapter, q.shape[0], groups):
        composed, m = None, None
        for t, rows, _ in groups:
            if t < 0:
                out[rows] = 0 if bias is None else bias.to(q.dtype)
                continue
            if t != composed:
                composed, m = t, compose(adapter, t, f)[0].to(q.dtype)
            product(rows, q[rows], m.T)
    else:
        product(slice(None), base_share(q, adapter, f), adapter.b0.to(q.dtype).T)
        together = batched(groups, q.shape[0])
        if together is not None:
            add_batched(out, q, adapter, e, *together)
        for t, rows, mask in groups if together is None else ():
            if t >= 0:
                z = scaled(q[rows] @ adapter.v[t].to(q.dtype).T, e, t, mask)
                out[rows].addmm_(z, adapter.u[t].to(q.dtype).T, alpha=adapter.scaling)
    if order is not None:
        y.index_copy_(0, order, out)


def batched(groups: list[Group], rows: int) -> tuple[list[int], slice | Tensor, Tensor | None] | None:
    """Several tasks as one batch: the tasks, their rows, and which of these count; None where a loop is better.

    Rows are a slice, the same number of each task, or [tasks, longest] with rows of others in the places that do not count.
    """
    groups = [group for group in groups if group[0] >= 0]
    tasks = [t for t, _, _ in groups]
    if len(set(tasks)) < 2 or len(tasks) > len(set(tasks)) or groups[0][2] is not None:
        return None
    counts = [at.stop - at.start for _, at, _ in groups]
    longest = max(counts)
    adjacent = all(before.stop == after.start for (_, before, _), (_, after, _) in pairwise(groups))
    if longest == min(counts) and adjacent:
        return tasks, slice(groups[0][1].start, groups[-1][1].stop), None
    if rows > FEW_ROWS or longest * len(tasks) > 2 * rows:
        return None
    places = torch.arange(longest)
    starts = torch.tensor([[at.start] for _, at, _ in groups])
    return tasks, (starts + places).clamp(max=rows - 1), places < torch.tensor(counts).unsqueeze(1)


def add_batched(
    out: Tensor,
    q: Tensor,
    adapter: AdapterArgs,
    e: Tensor | None,
    tasks: list[int],
    rows: slice | Tensor,
    counted: Tensor | None,
) -> None:
    """Add s e_t (q V_t^T) U_t^T to the rows of every task."""
    adjacent = tasks == list(range(tasks[0], tasks[0] + len(tasks)))
    which = slice(tasks[0], tasks[0] + len(tasks)) if adjacent else tasks  # a slice copies nothing
    u, v = adapter.u[which].to(q.dtype), adapter.v[which].to(q.dtype)
    z = torch.bmm(q[rows].view(len(tasks), -1, q.shape[1]), v.transpose(1, 2))
    if e is not None:
        z = z * e[which].to(z.dtype).view(-1, 1, 1)
    if counted is None:
        out[rows].view(len(tasks), -1, out.shape[1]).baddbmm_(z, u.transpose(1, 2), alpha=adapter.scaling)
    else:
        out.index_add_(0, rows[counted], torch.bmm(z, u.transpose(1, 2))[counted], alpha=adapter.scaling)


def scaled(rows: Tensor, e: Tensor | None, t: int, mask: Tensor | None) -> Tensor:
    if e is not None:
        rows = rows * e[t].to(rows.dtype)
    return rows if mask is None else rows * mask


def sorted_rows(adapter: AdapterArgs, order: Tensor) -> AdapterArgs:
    return adapter._replace(task=adapter.task[order])


def backward_up(
    dy: Tensor, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Gradients of b0, u, v, fusion and gate, as far as asked for, and dh [M, R] for those of x and a."""
    q = None if h is None else gated(h, adapter)
    order, groups = row_groups(adapter)
    sorted_adapter = adapter
    if order is not None:
        sorted_adapter, dy = sorted_rows(adapter, order), dy[order]
        q = None if q is None else q[order]
    wants_dq = bool(needs & {"x", "a", "gate"})
    if composing_pays(adapter, dy.shape[0], groups):
        grads, dq = composed_backward(dy, q, sorted_adapter, groups, needs, wants_dq)
    else:
        grads, dq = factored_backward(dy, q, sorted_adapter, groups, needs, wants_dq)
    if "b0" in grads and adapter.ranks is not None:
        lo, hi = adapter.ranks
        grads["b0"][:, :lo] = 0
        grads["b0"][:, hi:] = 0
    grads = {name: grad.to(getattr(adapter, name).dtype) for name, grad in grads.items()}
    if not wants_dq:
        return grads, None
    if order is not None:
        dq = torch.empty_like(dq).index_copy_(0, order, dq)
    if "gate" in needs:
        grads["gate"] = dgate(dq, h, adapter)
    return grads, dq if adapter.gate is None else dq * row_gates(adapter).to(dq.dtype)


def dgate(dq: Tensor, h: Tensor, adapter: AdapterArgs) -> Tensor:
    """Sum of dq * h over the rows of each gate; on a GPU as a matrix product: its order is fixed, unlike that of atomics."""
    products = dq.to(torch.promote_types(dq.dtype, torch.float32)) * h
    if adapter.gate_row is None:
        return products.sum(0, keepdim=True).to(adapter.gate.dtype)
    if dq.device.type == "cpu":
        sums = products.new_zeros(adapter.gate.shape)
        return sums.index_add_(0, adapter.gate_row, products).to(adapter.gate.dtype)
    one_hot = adapter.gate_row == torch.arange(adapter.gate.shape[0], device=dq.device).unsqueeze(1)
    return (one_hot.to(products.dtype) @ products).to(adapter.gate.dtype)


def gradient_buffers(adapter: AdapterArgs, dtype: torch.dtype, needs: frozenset[str]) -> dict[str, Tensor]:
    """Zeros for every parameter asked for: a task without rows keeps them. Sums over tasks run in fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    dtypes = {"b0": wide, "u": dtype, "v": dtype, "fusion": wide}
    shapes = {name: getattr(adapter, name) for name in dtypes if name in needs}
    return {name: t.new_zeros(t.shape, dtype=dtypes[name]) for name, t in shapes.items()}


def composed_backward(
    dy: Tensor, q: Tensor | None, adapter: AdapterArgs, groups: list[Group], needs: frozenset[str], wants_dq: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Through the gradient of M_t; ops/README.md has the chain."""
    grads = gradient_buffers(adapter, dy.dtype, needs)
    dq = dy.new_empty(dy.shape[0], adapter.a.shape[0]) if wants_dq else None
    f, e = mixing(adapter)
    s = adapter.scaling
    if adapter.u is None:
        if wants_dq:
            torch.mm(dy, adapter.b0.to(dy.dtype), out=dq)
            dq = base_share(dq, adapter, None) * s
        if "b0" in needs:
            lo, hi = adapter.ranks or (0, adapter.a.shape[0])
            grads["b0"][:, lo:hi] = dy.T @ (base_share(q[:, lo:hi], adapter, None) * s)
        return grads, dq
    for t, rows, _ in groups:
        if t < 0:
            if wants_dq:
                dq[rows] = 0
            continue
        if wants_dq or "fusion" in grads:
            m, uv = compose(adapter, t, f)
        if wants_dq:
            torch.addmm(dq[rows], dy[rows], m.to(dy.dtype), beta=0, alpha=s, out=dq[rows])
        if not grads:
            continue
        dm = dy[rows].T @ q[rows]  # [N, R], without s
        fs, es = (s, s) if f is None else (s * f[t].to(dm.dtype), s * e[t].to(dm.dtype))
        if "u" in grads:
            torch.mm(dm, (es * adapter.v[t].to(dm.dtype)).T, out=grads["u"][t])
        if "v" in grads:
            torch.mm(adapter.u[t].to(dm.dtype).T, dm, out=grads["v"][t]).mul_(es)
        if "fusion" in grads:
            wide = grads["fusion"].dtype
            grads["fusion"][t] = s * f[t].to(wide) * e[t].to(wide) * dot(dm, adapter.b0 - uv, wide)
        if "b0" in grads:
            grads["b0"].add_(dm.mul_(fs))
    return grads, dq


def dot(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.dot(left.to(dtype).reshape(-1), right.to(dtype).reshape(-1))


def factored_backward(
    dy: Tensor, q: Tensor | None, adapter: AdapterArgs, groups: list[Group], needs: frozenset[str], wants_dq: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """M_t never formed: P = dy B0 dense over all rows, Q = dy U_t and z = q V_t^T per task."""
    grads = gradient_buffers(adapter, dy.dtype, needs)
    f, e = mixing(adapter)
    s = adapter.scaling
    p_rows = dy @ adapter.b0.to(dy.dtype) if wants_dq or "fusion" in needs else None
    dq = base_share(p_rows, adapter, f) if wants_dq else None
    if "b0" in grads:
        grads["b0"].copy_(dy.T @ (base_share(q, adapter, f) * s))
    for t, rows, mask in groups:
        if t < 0:
            continue
        u, v = adapter.u[t].to(dy.dtype), adapter.v[t].to(dy.dtype)
        if wants_dq or "v" in grads or "fusion" in grads:
            q_rows = dy[rows] @ u
            q_mixed = scaled(q_rows, e, t, mask)
        if wants_dq:
            dq[rows].addmm_(q_mixed, v)
        if "u" in grads or "fusion" in grads:
            z = q[rows] @ v.T
        if "u" in grads:
            grads["u"][t] = dy[rows].T @ (scaled(z, e, t, mask) * s)
        if "v" in grads:
            grads["v"][t] = (q_mixed * s).T @ q[rows]
        if "fusion" in grads:
            wide = grads["fusion"].dtype
            chosen = q[rows] if mask is None else q[rows] * mask
            slope = dot(p_rows[rows], chosen, wide) - dot(q_rows, z if mask is None else z * mask, wide)
            grads["fusion"][t] = s * f[t].to(wide) * e[t].to(wide) * slope
    return grads, dq.mul_(s) if wants_dq else None
