"""The Triton kernels around the library's products in the composed plan: every M_t, and what its gradient dM_t leads to.

For the tasks that occur, in the order of `ids` [tasks] int32, or all of them without it. BLOCK_R and BLOCK_S are R and S
padded to powers of two.
"""

import triton
import triton.language as tl

from .triton_rows import coefficients, narrowed, tile

SUM_BLOCK = tl.constexpr(1024)  # elements that one program adds up
COLUMNS = tl.constexpr(128)  # the most of R that one program sums over the outputs


@triton.jit
def task_at(ids, i):
    if ids is None:
        return i.to(tl.int64)
    else:
        return tl.load(ids + i).to(tl.int64)


@triton.jit(do_not_specialize=["fusion", "ids"])
def compose(
    b0, u, v, fusion, ids, m, N,
    R: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """m [tasks, N, R] = f B0 + e U_t V_t. One program: a tile of outputs of one task."""
    n, i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    r, s, t = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S), task_at(ids, i)
    f, e = coefficients(fusion, t)
    left = tile(u + t * N * S, n[:, None], s[None, :], N, S, m.dtype.element_ty)
    right = tile(v + t * S * R, s[:, None], r[None, :], S, R, m.dtype.element_ty)
    acc = f * tile(b0, n[:, None], r[None, :], N, R, tl.float32)
    acc += e * tl.dot(left, right, input_precision="ieee")
    at = m + i.to(tl.int64) * N * R + n[:, None] * R + r[None, :]
    tl.store(at, acc.to(m.dtype.element_ty), mask=(n < N)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["fusion", "ids"])
def u_gradient(
    dm, v, fusion, ids, du, N, scaling,
    R: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """du [T, N, S] = s e dM_t V_t^T, the product in TYPE. One program: a tile of outputs of one task."""
    n, i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    s, t = tl.arange(0, BLOCK_S), task_at(ids, i)
    _, e = coefficients(fusion, t)
    acc = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    for first in range(0, R, BLOCK_C):
        r = first + tl.arange(0, BLOCK_C)
        left, scale = narrowed(tile(dm + i.to(tl.int64) * N * R, n[:, None], r[None, :], N, R, tl.float32), TYPE)
        right = tile(v + t * S * R, s[None, :], r[:, None], S, R, TYPE)
        acc += scale * tl.dot(left, right, input_precision="ieee")
    at = du + t * N * S + n[:, None] * S + s[None, :]
    tl.store(at, (scaling * e * acc).to(du.dtype.element_ty), mask=(n < N)[:, None] & (s < S)[None, :])


@triton.jit(do_not_specialize=["ids", "share"])
def v_gradient_partials(
    dm, b0, u, v, ids, dv_partials, dfusion_partials, N, share,
    R: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Over `share` outputs: U_t^T dM_t into dv_partials [splits, tasks, S, R], and into dfusion_partials what dfusion sums up,
    <dM_t, B0> - <U_t^T dM_t, V_t>.

    The product in TYPE. One program: a share of the outputs of one task, BLOCK_C of the R columns.
    """
    split, i, tasks, c = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    r, s, t = c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S), task_at(ids, i)
    dv = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    with_b0 = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(split * share, tl.minimum(split * share + share, N), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        own = tile(dm + i.to(tl.int64) * N * R, n[:, None], r[None, :], N, R, tl.float32)
        left = tile(u + t * N * S, n[None, :], s[:, None], N, S, TYPE)
        right, scale = narrowed(own, TYPE)
        dv += scale * tl.dot(left, right, input_precision="ieee")
        if dfusion_partials is not None:
            with_b0 += tl.sum(own * tile(b0, n[:, None], r[None, :], N, R, tl.float32), axis=0)
    of_task = split * tasks + i
    if dv_partials is not None:
        at = dv_partials + of_task.to(tl.int64) * S * R + s[:, None] * R + r[None, :]
        tl.store(at, dv, mask=(s < S)[:, None] & (r < R)[None, :])
    if dfusion_partials is not None:
        with_v = tl.sum(dv * tile(v + t * S * R, s[:, None], r[None, :], S, R, tl.float32))
        tl.store(dfusion_partials + of_task * tl.num_programs(2) + c, tl.sum(with_b0) - with_v)


@triton.jit(do_not_specialize=["fusion", "ids", "splits", "columns", "tasks", "low_rank", "high_rank"])
def sum_gradients(
    dm, fusion, ids, dv_partials, dfusion_partials, db0, dv, dfusion,
    N, splits, columns, tasks, scaling, low_rank, high_rank, R: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """db0 [N, R] from dM_t over the tasks, dv [T, S, R] and dfusion [T] from their partial sums; programs in this order.

    columns: how many numbers each split has of a task's dfusion.
    """
    item, of_v = tl.program_id(0), tl.cdiv(S * R, SUM_BLOCK)
    b0s = tl.cdiv(N * R, SUM_BLOCK) if db0 is not None else 0
    vs = b0s + (tasks * of_v if dv is not None else 0)
    k = tl.arange(0, SUM_BLOCK)
    total = tl.zeros((SUM_BLOCK,), tl.float32)
    if item < b0s:
        if db0 is not None:
            at = item * SUM_BLOCK + k
            for i in range(tasks):
                f, _ = coefficients(fusion, task_at(ids, tl.cast(i, tl.int32)))
                total += f * tl.load(dm + tl.cast(i, tl.int64) * N * R + at, mask=at < N * R, other=0.0)
            total = tl.where((at % R >= low_rank) & (at % R < high_rank), scaling * total, 0.0)
            tl.store(db0 + at, total.to(db0.dtype.element_ty), mask=at < N * R)
    elif item < vs:
        if dv is not None:
            i, at = (item - b0s) // of_v, (item - b0s) % of_v * SUM_BLOCK + k
            t = task_at(ids, i)
            _, e = coefficients(fusion, t)
            for split in range(splits):
                own = dv_partials + tl.cast(split * tasks + i, tl.int64) * S * R
                total += tl.load(own + at, mask=at < S * R, other=0.0)
            tl.store(dv + t * S * R + at, (scaling * e * total).to(dv.dtype.element_ty), mask=at < S * R)
    else:
        if dfusion is not None:
            i = item - vs
            t = task_at(ids, i)
            f, e = coefficients(fusion, t)
            own = dfusion_partials + (k // columns * tasks + i) * columns + k % columns
            total = tl.load(own, mask=k < splits * columns, other=0.0)
            tl.store(dfusion + t, (scaling * f * e * tl.sum(total)).to(dfusion.dtype.element_ty))
