"""The Triton kernels of a backward: `from_dy`, `from_x`, `add_partials`, and `delta_backward`, which is all in one launch.

Rows come in chunks of CHUNK. Sums over rows go to fp32 partial sums of each chunk in memory, which `add_partials` adds up in
order. A gradient that is None is not computed.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .triton_rows import (
    END,
    ID_BLOCK,
    Dropout,
    Rows,
    arrives_last,
    coefficients,
    dropout_mask,
    gated_rows,
    grid_barrier,
    ids_from,
    narrowed,
    next_run,
    next_task,
    row_gates,
    rows_from,
    span,
    task_ids,
    tile,
)

SUM_BLOCK = tl.constexpr(2048)  # elements of a gradient that one item adds up


class BackwardSizes(NamedTuple):
    """BLOCK_R and BLOCK_S: R and S padded to powers of two; S 0 without task factors. BLOCK_N, SPLIT_N: from_dy, N in that many
    ranges for dh. BLOCK_K: from_x."""

    R: int
    S: int
    BLOCK_R: int
    BLOCK_S: int
    BLOCK_M: int
    BLOCK_N: int
    SPLIT_N: int
    BLOCK_K: int


class Upper(NamedTuple):
    """What from_dy reads beside dy [M, N]: b0 [N, R], u [T, N, S] and v [T, S, R] or None, h [M, R]."""

    b0: object
    u: object
    v: object
    h: object


class Thinned(NamedTuple):
    """What from_dy makes of dy, each or None: dh [M, R]; the summands of dgate, dq * h [M, R] fp32; those of dv, s e dy U_t
    [M, S]; those of dfusion [M] fp32. By way of partials [SPLIT_N, M, R + S] fp32, None for SPLIT_N = 1."""

    dh: object
    dq_h: object
    scaled_q_u: object
    dfusion_rows: object
    partials: object


class UpperSums(NamedTuple):
    """Partial sums, or None: db0 [chunks, N, R], du [chunks, T, N, S]; present [chunks, T] int32, whether a task has rows
    there."""

    db0: object
    du: object
    present: object


class Lower(NamedTuple):
    """Of one adapter: a [R, K], dh [M, R]; stores partial sums da [chunks, R, K] or None. All None for none."""

    a: object
    dh: object
    da: object


class RowSums(NamedTuple):
    """Sums over rows: of h [M, R] and scaled_q_u the partial sums dv [chunks, T, S, R]; of dfusion_rows dfusion [T]; of dq_h
    dgate [G, R]."""

    h: object
    scaled_q_u: object
    dv: object
    dfusion_rows: object
    dfusion: object
    dq_h: object
    dgate: object


class PartialSums(NamedTuple):
    """da [chunks, R, K], db0 [chunks, N, R], du [chunks, T, N, S], dv [chunks, T, S, R], fp32, or None."""

    da: object
    db0: object
    du: object
    dv: object


class Gradients(NamedTuple):
    """Of the parameters of these names, in their shapes and types, or None."""

    a: object
    b0: object
    u: object
    v: object


# --- from dy -------------------------------------------------------------------------------------------------------


@triton.jit
def store_dh(p, q_u, t, mine, upper, thinned, fusion, rows, scaling, row, m, c: tl.constexpr):
    """From P = dy B0 and Q = dy U_t of the rows of task t: dh, and what the gradients of v, fusion and gate sum up."""
    r, s = tl.arange(0, c.BLOCK_R), tl.arange(0, c.BLOCK_S)
    dtype = thinned.dh.dtype.element_ty
    exists = (t >= 0) & (t < rows.T)
    known = tl.where(exists, t, 0)
    f, e = coefficients(fusion, known)
    stored = mine[:, None] & (r < c.R)[None, :]
    at = row * c.R + m[:, None] * c.R + r[None, :]
    dq = f * p
    if upper.v is not None:
        vt = tile(upper.v + known.to(tl.int64) * c.S * c.R, s[:, None], r[None, :], c.S, c.R, dtype)
        qv = tl.dot(q_u.to(dtype), vt, input_precision="ieee")
        dq += e * qv
        if thinned.scaled_q_u is not None:
            left = thinned.scaled_q_u + row * c.S + m[:, None] * c.S + s[None, :]
            tl.store(left, (scaling * e * q_u).to(dtype), mask=mine[:, None] & (s < c.S)[None, :])
        if thinned.dfusion_rows is not None:
            q = gated_rows(upper.h, rows, row, m, mine, c).to(tl.float32)
            tl.store(thinned.dfusion_rows + row + m, scaling * f * e * tl.sum((p - qv) * q, axis=1), mask=mine)
    dq = tl.where(exists, dq * scaling, tl.where(t < 0, 0.0, float("nan")))
    if rows.gate is not None:
        if thinned.dq_h is not None:
            h = tl.load(upper.h + at, mask=stored, other=0.0).to(tl.float32)
            tl.store(thinned.dq_h + at, dq * h, mask=stored)
        dq *= row_gates(rows, row, m, mine, c)
    tl.store(thinned.dh + at, dq.to(dtype), mask=stored)


@triton.jit
def partials_from(partials, split, M, row, m, c: tl.constexpr):
    return partials + (split * M.to(tl.int64) + row) * (c.R + c.S) + m[:, None] * (c.R + c.S)


@triton.jit
def finish_dh(upper, thinned, fusion, rows, scaling, row, count, c: tl.constexpr, SUM_ROWS: tl.constexpr):
    """P and Q of SUM_ROWS rows, summed over the ranges of N in order, and what follows from them."""
    m, r, s = tl.arange(0, SUM_ROWS), tl.arange(0, c.BLOCK_R), tl.arange(0, c.BLOCK_S)
    p = tl.full((SUM_ROWS, c.BLOCK_R), 0.0, tl.float32)
    q_u = tl.full((SUM_ROWS, c.BLOCK_S), 0.0, tl.float32)
    SPLITS: tl.constexpr = c.SPLIT_N
    for split in tl.static_range(SPLITS):
        at = partials_from(thinned.partials, split, rows.M, row, m, c)
        inside = (m < count)[:, None] & (r < c.R)[None, :]
        p += tl.load(at + r[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        if upper.u is not None:
            inside = (m < count)[:, None] & (s < c.S)[None, :]
            q_u += tl.load(at + c.R + s[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    ids = task_ids(rows, row, m, count, c)
    t = tl.min(ids, axis=0)
    while t < END:
        store_dh(p, q_u, t, ids == t, upper, thinned, fusion, rows, scaling, row, m, c)
        t = next_task(ids, t)


@triton.jit
def shrink_dy(item, dy, upper, thinned, fusion, rows, state, N, scaling, c: tl.constexpr):
    """P = dy B0 and Q = dy U_t of one tile of rows over one range of N; the last range of a tile adds up those of all."""
    block, split = item // c.SPLIT_N, item % c.SPLIT_N
    row = block.to(tl.int64) * c.BLOCK_M
    share = tl.cdiv(tl.cdiv(N, c.BLOCK_N), c.SPLIT_N) * c.BLOCK_N
    m, r, s, n = tl.arange(0, c.BLOCK_M), tl.arange(0, c.BLOCK_R), tl.arange(0, c.BLOCK_S), tl.arange(0, c.BLOCK_N)
    count = rows_from(row, rows.M)
    ids = task_ids(rows, row, m, count, c)
    t = tl.min(ids, axis=0)
    while t < END:
        mine = ids == t
        ut = upper.u
        if upper.u is not None:
            ut = upper.u + tl.where((t >= 0) & (t < rows.T), t, 0).to(tl.int64) * N * c.S
        p = tl.full((c.BLOCK_M, c.BLOCK_R), 0.0, tl.float32)
        q_u = tl.full((c.BLOCK_M, c.BLOCK_S), 0.0, tl.float32)
        for first in range(split * share, tl.minimum(split * share + share, N), c.BLOCK_N):
            columns = first + n
            inside = mine[:, None] & (columns < N)[None, :]
            block_dy = tl.load(dy + row * N + m[:, None] * N + columns[None, :], mask=inside, other=0.0)
            right = tile(upper.b0, columns[:, None], r[None, :], N, c.R, block_dy.dtype)
            p = tl.dot(block_dy, right, p, input_precision="ieee")
            if upper.u is not None:
                right = tile(ut, columns[:, None], s[None, :], N, c.S, block_dy.dtype)
                q_u = tl.dot(block_dy, right, q_u, input_precision="ieee")
        if c.SPLIT_N == 1:
            store_dh(p, q_u, t, mine, upper, thinned, fusion, rows, scaling, row, m, c)
        else:
            at = partials_from(thinned.partials, split, rows.M, row, m, c)
            tl.store(at + r[None, :], p, mask=mine[:, None] & (r < c.R)[None, :])
            if upper.u is not None:
                tl.store(at + c.R + s[None, :], q_u, mask=mine[:, None] & (s < c.S)[None, :])
        t = next_task(ids, t)
    if c.SPLIT_N > 1 and arrives_last(state, block, c.SPLIT_N):
        SUM_ROWS: tl.constexpr = 32 if c.BLOCK_M > 32 else c.BLOCK_M  # more at once would spill
        for first in range(0, tl.minimum(count, c.BLOCK_M), SUM_ROWS):
            finish_dh(upper, thinned, fusion, rows, scaling, row + first, count - first, c, SUM_ROWS)


@triton.jit
def up_gradients(
    chunk, block, dy, upper, sums, fusion, rows, N, CHUNK, scaling, low_rank, high_rank, c: tl.constexpr
):  # fmt: skip
    """The share of db0 and du of one chunk of rows and one tile of outputs, through dM_t = dy^T q."""
    r, s, m = tl.arange(0, c.BLOCK_R), tl.arange(0, c.BLOCK_S), tl.arange(0, c.BLOCK_M)
    columns = block * c.BLOCK_N + tl.arange(0, c.BLOCK_N)
    chunk_row = chunk.to(tl.int64) * CHUNK
    chunk_count = tl.minimum(rows_from(chunk_row, rows.M), CHUNK)
    total = tl.full((c.BLOCK_N, c.BLOCK_R), 0.0, tl.float32)
    t, low, high = next_run(rows, chunk_row, chunk_count, tl.full((), -1, tl.int32), c)
    while t < END:
        f, e = coefficients(fusion, t)
        dm = tl.full((c.BLOCK_N, c.BLOCK_R), 0.0, tl.float32)
        for first in range(low, high + 1, c.BLOCK_M):
            row = chunk_row + first
            mine = task_ids(rows, row, m, chunk_count - first, c) == t
            inside = mine[None, :] & (columns < N)[:, None]
            dyt = tl.load(dy + row * N + m[None, :] * N + columns[:, None], mask=inside, other=0.0)
            dm = tl.dot(dyt, gated_rows(upper.h, rows, row, m, mine, c), dm, input_precision="ieee")
        if sums.db0 is not None:
            total += f * dm
        if sums.du is not None:
            dtype = dy.dtype.element_ty
            vt = tile(upper.v + t.to(tl.int64) * c.S * c.R, s[None, :], r[:, None], c.S, c.R, dtype)
            left, scale = narrowed(dm, dtype)
            du = scaling * e * scale * tl.dot(left, vt, input_precision="ieee")
            at = sums.du + (chunk.to(tl.int64) * rows.T + t) * N * c.S + columns[:, None] * c.S + s[None, :]
            tl.store(at, du, mask=(columns < N)[:, None] & (s < c.S)[None, :])
        t, low, high = next_run(rows, chunk_row, chunk_count, t, c)
    if sums.db0 is not None:
        at = sums.db0 + chunk.to(tl.int64) * N * c.R + columns[:, None] * c.R + r[None, :]
        total = tl.where(((r >= low_rank) & (r < high_rank))[None, :], scaling * total, 0.0)
        tl.store(at, total, mask=(columns < N)[:, None] & (r < c.R)[None, :])


@triton.jit
def mark_tasks(chunk, present, rows, CHUNK, c: tl.constexpr):
    """present[chunk, t] = whether task t has rows in the chunk."""
    row = chunk.to(tl.int64) * CHUNK
    count = tl.minimum(rows_from(row, rows.M), CHUNK)
    done = tl.full((), 0, tl.int32)
    t, _, _ = next_run(rows, row, count, done - 1, c)
    while t < END:
        for absent in range(done, t):
            tl.store(present + chunk * rows.T + absent, 0)
        tl.store(present + chunk * rows.T + t, 1)
        done = t + 1
        t, _, _ = next_run(rows, row, count, t, c)
    for absent in range(done, rows.T):
        tl.store(present + chunk * rows.T + absent, 0)


@triton.jit
def dy_items(
    dy, upper, thinned, sums, fusion, rows, state, N, CHUNK, scaling, low_rank, high_rank, c: tl.constexpr
):  # fmt: skip
    """The items of a chunk follow each other, so that the second read of its dy finds it in the L2 cache."""
    shrinks = CHUNK // c.BLOCK_M * c.SPLIT_N if thinned.dh is not None else 0
    ups = tl.cdiv(N, c.BLOCK_N) if sums.db0 is not None or sums.du is not None else 0
    each = shrinks + ups + (1 if sums.present is not None else 0)
    for work in range(tl.program_id(0), tl.cdiv(rows.M, CHUNK) * each, tl.num_programs(0)):
        chunk, item = tl.cast(work, tl.int32) // each, tl.cast(work, tl.int32) % each
        if item < shrinks:
            if thinned.dh is not None:
                item += chunk * shrinks
                if item // c.SPLIT_N < tl.cdiv(rows.M, c.BLOCK_M):
                    shrink_dy(item, dy, upper, thinned, fusion, rows, state, N, scaling, c)
        elif item < shrinks + ups:
            if sums.db0 is not None or sums.du is not None:
                up_gradients(
                    chunk, item - shrinks, dy, upper, sums, fusion, rows, N, CHUNK, scaling, low_rank, high_rank, c
                )  # fmt: skip
        else:
            if sums.present is not None:
                mark_tasks(chunk, sums.present, rows, CHUNK, c)


@triton.jit(
    do_not_specialize=["task", "gate_row", "fusion", "state", "M", "T", "G", "CHUNK", "low_rank", "high_rank"]
)  # fmt: skip
def from_dy(
    upper, thinned, sums, dy, gate, task, gate_row, fusion, state,
    M, N, T, G, CHUNK, scaling, low_rank, high_rank, c: tl.constexpr,
):  # fmt: skip
    """All that reads dy. Items: a tile of rows and a range of N for dh, a chunk and a tile of outputs for db0 and du."""
    rows = Rows(task, gate, gate_row, M, T, G)
    dy_items(dy, upper, thinned, sums, fusion, rows, state, N, CHUNK, scaling, low_rank, high_rank, c)


# --- from x, and sums over rows ------------------------------------------------------------------------------------


@triton.jit
def load_dh(dh, row, m, count, c: tl.constexpr):
    r = tl.arange(0, c.BLOCK_R)
    at = dh + row * c.R + m[:, None] * c.R + r[None, :]
    return tl.load(at, mask=(m < count)[:, None] & (r < c.R)[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def store_da(da, partials, chunk, columns, K, low_rank, high_rank, c: tl.constexpr):
    r = tl.arange(0, c.BLOCK_R)
    da = tl.where(((r >= low_rank) & (r < high_rank))[:, None], da, 0.0)
    at = partials + chunk.to(tl.int64) * c.R * K + r[:, None] * K + columns[None, :]
    tl.store(at, da, mask=(r < c.R)[:, None] & (columns < K)[None, :])


@triton.jit
def down_gradients(
    chunk, block, x, dx, own, other, dropout, M, K, x_stride, CHUNK, low_rank, high_rank, c: tl.constexpr
):  # fmt: skip
    """dx of one chunk of rows and one tile of columns, and its share of da; of two adapters at once, with one mask."""
    r, m = tl.arange(0, c.BLOCK_R), tl.arange(0, c.BLOCK_M)
    columns = block * c.BLOCK_K + tl.arange(0, c.BLOCK_K)
    chunk_row = chunk.to(tl.int64) * CHUNK
    chunk_count = tl.minimum(rows_from(chunk_row, M), CHUNK)
    dtype = own.dh.dtype.element_ty
    reads_x: tl.constexpr = own.da is not None or other.da is not None
    da = tl.full((c.BLOCK_R, c.BLOCK_K), 0.0, tl.float32)
    da_2 = tl.full((c.BLOCK_R, c.BLOCK_K), 0.0, tl.float32)
    if dx is not None:
        right = tile(own.a, r[:, None], columns[None, :], c.R, K, dtype)
        if other.dh is not None:
            right_2 = tile(other.a, r[:, None], columns[None, :], c.R, K, dtype)
    for first in range(0, chunk_count, c.BLOCK_M):
        row = chunk_row + first
        count = chunk_count - first
        inside = (m < count)[:, None] & (columns < K)[None, :]
        left = load_dh(own.dh, row, m, count, c)
        if other.dh is not None:
            left_2 = load_dh(other.dh, row, m, count, c)
        if dropout.seed is not None:
            keep = dropout_mask(dropout, row, m, block * c.BLOCK_K, c.BLOCK_K)
        if reads_x:
            xt = tl.load(x + row * x_stride + m[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
            if dropout.seed is not None:
                xt = tl.where(keep, xt, 0.0)
            if own.da is not None:
                da = tl.dot(tl.trans(left), xt, da, input_precision="ieee")
            if other.da is not None:
                da_2 = tl.dot(tl.trans(left_2), xt, da_2, input_precision="ieee")
        if dx is not None:
            dxt = tl.dot(left, right, input_precision="ieee")
            if other.dh is not None:
                dxt = tl.dot(left_2, right_2, dxt, input_precision="ieee")
            dxt *= dropout.scale
            if dropout.seed is not None:
                dxt = tl.where(keep, dxt, 0.0)
            tl.store(dx + row * K + m[:, None] * K + columns[None, :], dxt.to(dx.dtype.element_ty), mask=inside)
    if own.da is not None:
        store_da(da * dropout.scale, own.da, chunk, columns, K, low_rank, high_rank, c)
    if other.da is not None:
        store_da(da_2 * dropout.scale, other.da, chunk, columns, K, low_rank, high_rank, c)


@triton.jit
def v_gradient(chunk, t, sums, rows, CHUNK, c: tl.constexpr):
    """The share of one chunk of rows in dv of one task, if it has any."""
    r, s, m = tl.arange(0, c.BLOCK_R), tl.arange(0, c.BLOCK_S), tl.arange(0, c.BLOCK_M)
    chunk_row = chunk.to(tl.int64) * CHUNK
    chunk_count = tl.minimum(rows_from(chunk_row, rows.M), CHUNK)
    low, high = span(rows.task, chunk_row, chunk_count, t, False)
    if low <= high:
        dv = tl.full((c.BLOCK_S, c.BLOCK_R), 0.0, tl.float32)
        for first in range(low, high + 1, c.BLOCK_M):
            row = chunk_row + first
            mine = task_ids(rows, row, m, chunk_count - first, c) == t
            left = sums.scaled_q_u + row * c.S + m[None, :] * c.S + s[:, None]
            qt = tl.load(left, mask=mine[None, :] & (s < c.S)[:, None], other=0.0, cache_modifier=".cg")
            dv = tl.dot(qt, gated_rows(sums.h, rows, row, m, mine, c), dv, input_precision="ieee")
        at = sums.dv + (chunk.to(tl.int64) * rows.T + t) * c.S * c.R + s[:, None] * c.R + r[None, :]
        tl.store(at, dv, mask=(s < c.S)[:, None] & (r < c.R)[None, :])


@triton.jit
def fusion_gradient(t, sums, rows):
    """The sum of dfusion_rows over the rows of task t."""
    total = tl.full((ID_BLOCK,), 0.0, tl.float32)
    for first in range(0, rows.M, ID_BLOCK):
        m = first + tl.arange(0, ID_BLOCK)
        mine = ids_from(rows.task, 0, m, rows.M, False) == t
        total += tl.load(sums.dfusion_rows + m, mask=mine, other=0.0, cache_modifier=".cg")
    tl.store(sums.dfusion + t, tl.sum(total, 0).to(sums.dfusion.dtype.element_ty))


@triton.jit
def gate_gradient(i, sums, rows, c: tl.constexpr):
    """The sum of dq * h over the rows of gate i."""
    r, m = tl.arange(0, c.BLOCK_R), tl.arange(0, c.BLOCK_M)
    total = tl.full((c.BLOCK_M, c.BLOCK_R), 0.0, tl.float32)
    low, high = tl.full((), 0, tl.int32), rows.M - 1
    if rows.gate_row is not None:
        low, high = span(rows.gate_row, 0, rows.M, i, False)
    for first in range(low, high + 1, c.BLOCK_M):
        row = tl.cast(first, tl.int64)
        mine = ids_from(rows.gate_row, row, m, rows.M - first, False) == i
        at = sums.dq_h + row * c.R + m[:, None] * c.R + r[None, :]
        total += tl.load(at, mask=mine[:, None] & (r < c.R)[None, :], other=0.0, cache_modifier=".cg")
    tl.store(sums.dgate + i * c.R + r, tl.sum(total, 0).to(sums.dgate.dtype.element_ty), mask=r < c.R)


@triton.jit
def x_items(
    x, dx, own, other, sums, rows, dropout, K, x_stride, CHUNK, low_rank, high_rank, c: tl.constexpr
):  # fmt: skip
    chunks, blocks = tl.cdiv(rows.M, CHUNK), tl.cdiv(K, c.BLOCK_K)
    vs = chunks * rows.T if sums.dv is not None else 0
    fusions = vs + (rows.T if sums.dfusion is not None else 0)
    gates = fusions + (rows.G if sums.dgate is not None else 0)
    for work in range(tl.program_id(0), gates + (chunks * blocks if own.dh is not None else 0), tl.num_programs(0)):
        item = tl.cast(work, tl.int32)
        if item < vs:
            if sums.dv is not None:
                v_gradient(item // rows.T, item % rows.T, sums, rows, CHUNK, c)
        elif item < fusions:
            if sums.dfusion is not None:
                fusion_gradient(item - vs, sums, rows)
        elif item < gates:
            if sums.dgate is not None:
                gate_gradient(item - fusions, sums, rows, c)
        else:
            if own.dh is not None:
                chunk, block = (item - gates) // blocks, (item - gates) % blocks
                down_gradients(
                    chunk, block, x, dx, own, other, dropout, rows.M, K, x_stride, CHUNK, low_rank, high_rank, c
                )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "task", "gate_row", "seed", "M", "T", "G", "CHUNK", "threshold", "low_rank", "high_rank",
    ]
)  # fmt: skip
def from_x(
    own, other, sums, x, dx, gate, task, gate_row, seed,
    M, K, T, G, x_stride, CHUNK, threshold, scale, low_rank, high_rank, c: tl.constexpr,
):  # fmt: skip
    """All that reads x or dh, and the sums over rows. Items: a chunk and a tile of columns for dx and da, of one adapter or
    of two of the same x; a chunk and a task for dv; a task; a gate."""
    rows, dropout = Rows(task, gate, gate_row, M, T, G), Dropout(seed, threshold, scale)
    x_items(x, dx, own, other, sums, rows, dropout, K, x_stride, CHUNK, low_rank, high_rank, c)


# --- sums of partial sums ------------------------------------------------------------------------------------------


@triton.jit
def add_up(item, partials, present, grad, chunks, T, size):
    """grad [T, size] = the sum of partials [chunks, T, size] over the chunks, for one block of elements of one task.

    With `present`, those of tasks without rows in a chunk were never written.
    """
    per_task = tl.cdiv(size, SUM_BLOCK)
    t, at = (item // per_task).to(tl.int64), item % per_task * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    total = tl.full((SUM_BLOCK,), 0.0, tl.float32)
    for chunk in range(chunks):
        inside = at < size
        if present is not None:
            inside &= tl.load(present + chunk * T + t, cache_modifier=".cg") != 0
        total += tl.load(partials + (chunk * T + t) * size + at, mask=inside, other=0.0, cache_modifier=".cg")
    tl.store(grad + t * size + at, total.to(grad.dtype.element_ty), mask=at < size)


@triton.jit
def sum_items(partials, grads, present, M, K, N, T, CHUNK, c: tl.constexpr):
    chunks = tl.cdiv(M, CHUNK)
    a_s = tl.cdiv(c.R * K, SUM_BLOCK) if grads.a is not None else 0
    b0s = a_s + (tl.cdiv(N * c.R, SUM_BLOCK) if grads.b0 is not None else 0)
    us = b0s + (T * tl.cdiv(N * c.S, SUM_BLOCK) if grads.u is not None else 0)
    vs = us + (T * tl.cdiv(c.S * c.R, SUM_BLOCK) if grads.v is not None else 0)
    for work in range(tl.program_id(0), vs, tl.num_programs(0)):
        item = tl.cast(work, tl.int32)
        if item < a_s:
            if grads.a is not None:
                add_up(item, partials.da, None, grads.a, chunks, 1, c.R * K)
        elif item < b0s:
            if grads.b0 is not None:
                add_up(item - a_s, partials.db0, None, grads.b0, chunks, 1, N * c.R)
        elif item < us:
            if grads.u is not None:
                add_up(item - b0s, partials.du, present, grads.u, chunks, T, N * c.S)
        else:
            if grads.v is not None:
                add_up(item - us, partials.dv, present, grads.v, chunks, T, c.S * c.R)


@triton.jit(do_not_specialize=["present", "M", "T", "CHUNK"])
def add_partials(partials, grads, present, M, K, N, T, CHUNK, c: tl.constexpr):
    """The gradients of a, b0, u and v from the partial sums of their chunks."""
    sum_items(partials, grads, present, M, K, N, T, CHUNK, c)


@triton.jit(
    do_not_specialize=[
        "task", "gate_row", "fusion", "seed", "state",
        "M", "T", "G", "CHUNK", "threshold", "low_rank", "high_rank",
    ]
)  # fmt: skip
def delta_backward(
    upper, thinned, upper_sums, own, sums, partials, grads, dy, x, dx, gate, task, gate_row, fusion, seed, state,
    M, K, N, T, G, x_stride, CHUNK, threshold, scaling, scale, low_rank, high_rank, c: tl.constexpr,
):  # fmt: skip
    """`from_dy`, `from_x` and `add_partials` in one launch of programs that are all resident."""
    rows, dropout = Rows(task, gate, gate_row, M, T, G), Dropout(seed, threshold, scale)
    dy_items(dy, upper, thinned, upper_sums, fusion, rows, state, N, CHUNK, scaling, low_rank, high_rank, c)
    if own.dh is not None or sums.dv is not None or sums.dfusion is not None or sums.dgate is not None:
        grid_barrier(state)
        x_items(x, dx, own, Lower(None, None, None), sums, rows, dropout, K, x_stride, CHUNK, low_rank, high_rank, c)
    if grads.a is not None or grads.b0 is not None or grads.u is not None or grads.v is not None:
        grid_barrier(state)
        sum_items(partials, grads, upper_sums.present, M, K, N, T, CHUNK, c)
