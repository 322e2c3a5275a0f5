"""The Triton kernels of a forward: `shrink` and `expand`, and `delta_forward`, which is both in one launch."""

from typing import NamedTuple

import triton
import triton.language as tl

from .triton_rows import (
    END,
    Dropout,
    Rows,
    arrives_last,
    coefficients,
    dropout_mask,
    gated_rows,
    grid_barrier,
    next_task,
    row_gates,
    rows_from,
    task_ids,
    tile,
)


class ForwardSizes(NamedTuple):
    """BLOCK_R and BLOCK_S: R and S padded to powers of two; S 0 without task factors. BLOCK_K, SPLIT_K: shrink, K in that many
    ranges. BLOCK_N, TILES_N: expand, the tiles of outputs that an item works on."""

    R: int
    S: int
    BLOCK_R: int
    BLOCK_S: int
    BLOCK_M: int
    BLOCK_K: int
    SPLIT_K: int
    BLOCK_N: int
    TILES_N: int


class Shrunk(NamedTuple):
    """Of one adapter: reads a [R, K] and v [T, S, R] or None; stores h [M, R], z [M, S] or None, by way of partials
    [SPLIT_K, M, R] fp32, None for SPLIT_K = 1. All None where there is no other adapter."""

    a: object
    v: object
    h: object
    z: object
    partials: object


class Expanded(NamedTuple):
    """b0 [N, R], u [T, N, S] or None, bias [N] or None, h, z: stores y [M, N]."""

    b0: object
    u: object
    bias: object
    h: object
    z: object
    y: object


# --- shrink --------------------------------------------------------------------------------------------------------


@triton.jit
def store_h(acc, own, fusion, rows, scale, row, m, count, c: tl.constexpr):
    """Store h, and z = e q V_t^T for every task of the tile."""
    r, s = tl.arange(0, c.BLOCK_R), tl.arange(0, c.BLOCK_S)
    q = (acc * scale).to(own.h.dtype.element_ty)
    tl.store(own.h + row * c.R + m[:, None] * c.R + r[None, :], q, mask=(m < count)[:, None] & (r < c.R)[None, :])
    if own.v is not None:
        if rows.gate is not None:
            q = (q.to(tl.float32) * row_gates(rows, row, m, m < count, c)).to(q.dtype)
        ids = task_ids(rows, row, m, count, c)
        t = next_task(ids, -1)
        while t < rows.T:
            _, e = coefficients(fusion, t)
            vt = tile(own.v + t.to(tl.int64) * c.S * c.R, s[None, :], r[:, None], c.S, c.R, q.dtype)
            zt = e * tl.dot(q, vt, input_precision="ieee")
            at = own.z + row * c.S + m[:, None] * c.S + s[None, :]
            tl.store(at, zt.to(q.dtype), mask=(ids == t)[:, None] & (s < c.S)[None, :])
            t = next_task(ids, t)


@triton.jit
def partials_at(partials, split, M, row, m, c: tl.constexpr):
    r = tl.arange(0, c.BLOCK_R)
    return partials + (split * M.to(tl.int64) + row) * c.R + m[:, None] * c.R + r[None, :]


@triton.jit
def h_of_all(partials, M, row, m, count, c: tl.constexpr):
    """The sum over the ranges of K, in order."""
    inside = (m < count)[:, None] & (tl.arange(0, c.BLOCK_R) < c.R)[None, :]
    acc = tl.full((c.BLOCK_M, c.BLOCK_R), 0.0, tl.float32)
    SPLITS: tl.constexpr = c.SPLIT_K
    for split in tl.static_range(SPLITS):
        at = partials_at(partials, split, M, row, m, c)
        acc += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
    return acc


@triton.jit
def shrink_tile(item, x, own, other, fusion, fusion_2, rows, dropout, state, K, x_stride, c: tl.constexpr):
    """One tile of rows over one range of K; the last range of a tile adds up those of all."""
    block, split = item // c.SPLIT_K, item % c.SPLIT_K
    row = block.to(tl.int64) * c.BLOCK_M
    count = rows_from(row, rows.M)
    share = tl.cdiv(tl.cdiv(K, c.BLOCK_K), c.SPLIT_K) * c.BLOCK_K
    m, r, k = tl.arange(0, c.BLOCK_M), tl.arange(0, c.BLOCK_R), tl.arange(0, c.BLOCK_K)
    acc = tl.full((c.BLOCK_M, c.BLOCK_R), 0.0, tl.float32)
    acc_2 = tl.full((c.BLOCK_M, c.BLOCK_R), 0.0, tl.float32)
    for first in range(split * share, tl.minimum(split * share + share, K), c.BLOCK_K):
        columns = first + k
        inside = (m < count)[:, None] & (columns < K)[None, :]
        block_x = tl.load(x + row * x_stride + m[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
        if dropout.seed is not None:
            block_x = tl.where(dropout_mask(dropout, row, m, first, c.BLOCK_K), block_x, 0.0)
        right = tile(own.a, r[None, :], columns[:, None], c.R, K, block_x.dtype)
        acc = tl.dot(block_x, right, acc, input_precision="ieee")
        if other.h is not None:
            right = tile(other.a, r[None, :], columns[:, None], c.R, K, block_x.dtype)
            acc_2 = tl.dot(block_x, right, acc_2, input_precision="ieee")
    if c.SPLIT_K == 1:
        store_h(acc, own, fusion, rows, dropout.scale, row, m, count, c)
        if other.h is not None:
            store_h(acc_2, other, fusion_2, rows, dropout.scale, row, m, count, c)
    else:
        inside = (m < count)[:, None] & (r < c.R)[None, :]
        tl.store(partials_at(own.partials, split, rows.M, row, m, c), acc, mask=inside)
        if other.h is not None:
            tl.store(partials_at(other.partials, split, rows.M, row, m, c), acc_2, mask=inside)
        if arrives_last(state, block, c.SPLIT_K):
            acc = h_of_all(own.partials, rows.M, row, m, count, c)
            store_h(acc, own, fusion, rows, dropout.scale, row, m, count, c)
            if other.h is not None:
                acc = h_of_all(other.partials, rows.M, row, m, count, c)
                store_h(acc, other, fusion_2, rows, dropout.scale, row, m, count, c)


@triton.jit
def shrink_tiles(x, own, other, fusion, fusion_2, rows, dropout, state, K, x_stride, c: tl.constexpr):
    for item in range(tl.program_id(0), tl.cdiv(rows.M, c.BLOCK_M) * c.SPLIT_K, tl.num_programs(0)):
        shrink_tile(
            tl.cast(item, tl.int32), x, own, other, fusion, fusion_2, rows, dropout, state, K, x_stride, c
        )  # fmt: skip


@triton.jit(do_not_specialize=["task", "gate_row", "fusion", "fusion_2", "seed", "state", "M", "T", "G", "threshold"])
def shrink(
    own, other, x, gate, task, gate_row, fusion, fusion_2, seed, state,
    M, K, T, G, x_stride, threshold, scale, c: tl.constexpr,
):  # fmt: skip
    """h = D(x) A^T and z = e q V_t^T; `other`: of a second adapter of the same x too. An item: a tile of rows, a range of K."""
    rows, dropout = Rows(task, gate, gate_row, M, T, G), Dropout(seed, threshold, scale)
    shrink_tiles(x, own, other, fusion, fusion_2, rows, dropout, state, K, x_stride, c)


# --- expand --------------------------------------------------------------------------------------------------------


@triton.jit
def expand_tile(item, own, fusion, rows, N, shares, scaling, c: tl.constexpr):
    """One tile of rows and TILES_N tiles of outputs, for every `shares`-th of the tasks that occur."""
    groups = tl.cdiv(N, c.BLOCK_N * c.TILES_N)
    share, item = item % shares, item // shares
    row, start = (item // groups).to(tl.int64) * c.BLOCK_M, item % groups * (c.BLOCK_N * c.TILES_N)
    count = rows_from(row, rows.M)
    m, r, s, n = tl.arange(0, c.BLOCK_M), tl.arange(0, c.BLOCK_R), tl.arange(0, c.BLOCK_S), tl.arange(0, c.BLOCK_N)
    ids = task_ids(rows, row, m, count, c)
    t = tl.min(ids, axis=0)
    for _ in range(share):
        t = next_task(ids, t)
    if t < END:
        q = gated_rows(own.h, rows, row, m, m < count, c)
        if c.TILES_N == 1:  # the shared product once, however many tasks the tile has
            shared = tl.dot(q, tile(own.b0, (start + n)[None, :], r[:, None], N, c.R, q.dtype), input_precision="ieee")
        while t < END:
            mine = ids == t
            exists = (t >= 0) & (t < rows.T)
            known = tl.where(exists, t, 0)
            f, _ = coefficients(fusion, known)
            if own.u is not None:
                inside = (mine & exists)[:, None] & (s < c.S)[None, :]
                zt = tl.load(own.z + row * c.S + m[:, None] * c.S + s[None, :], mask=inside, other=0.0)
            for first in range(start, tl.minimum(start + c.BLOCK_N * c.TILES_N, N), c.BLOCK_N):
                columns = first + n
                if c.TILES_N == 1:
                    acc = f * shared
                else:
                    right = tile(own.b0, columns[None, :], r[:, None], N, c.R, q.dtype)
                    acc = f * tl.dot(q, right, input_precision="ieee")
                if own.u is not None:
                    right = tile(own.u + known.to(tl.int64) * N * c.S, columns[None, :], s[:, None], N, c.S, q.dtype)
                    acc = tl.dot(zt, right, acc, input_precision="ieee")
                # Rows without an adapter get none; ids that do not exist give NaN, for the host cannot look at them.
                acc = tl.where(exists, acc * scaling, tl.where(t < 0, 0.0, float("nan")))
                if own.bias is not None:
                    acc += tl.load(own.bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
                at = own.y + row * N + m[:, None] * N + columns[None, :]
                tl.store(at, acc.to(own.y.dtype.element_ty), mask=mine[:, None] & (columns < N)[None, :])
            for _ in range(shares):
                t = next_task(ids, t)


@triton.jit
def expand_tiles(own, fusion, rows, N, shares, scaling, c: tl.constexpr):
    items = tl.cdiv(rows.M, c.BLOCK_M) * tl.cdiv(N, c.BLOCK_N * c.TILES_N) * shares
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        expand_tile(tl.cast(item, tl.int32), own, fusion, rows, N, shares, scaling, c)


@triton.jit(do_not_specialize=["task", "gate_row", "fusion", "M", "T", "G", "shares"])
def expand(own, gate, task, gate_row, fusion, M, N, T, G, shares, scaling, c: tl.constexpr):
    """y = bias + s (f q B0^T + z U_t^T). An item: a tile of rows, TILES_N tiles of outputs, a share of the tile's tasks."""
    expand_tiles(own, fusion, Rows(task, gate, gate_row, M, T, G), N, shares, scaling, c)


@triton.jit(
    do_not_specialize=["task", "gate_row", "fusion", "seed", "state", "M", "T", "G", "shares", "threshold"]
)  # fmt: skip
def delta_forward(
    shrunk, expanded, x, gate, task, gate_row, fusion, seed, state,
    M, K, N, T, G, x_stride, shares, threshold, scaling, scale, c: tl.constexpr,
):  # fmt: skip
    """`shrink`, then `expand`, in one launch of programs that are all resident."""
    rows, dropout = Rows(task, gate, gate_row, M, T, G), Dropout(seed, threshold, scale)
    no_other = Shrunk(None, None, None, None, None)
    shrink_tiles(x, shrunk, no_other, fusion, None, rows, dropout, state, K, x_stride, c)
    grid_barrier(state)
    expand_tiles(expanded, fusion, rows, N, shares, scaling, c)
