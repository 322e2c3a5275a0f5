"""The Triton kernels of `delta`. ops/README.md has the formula and, under "The Triton kernels", the phases.

Each kernel runs the phases FIRST..LAST over a list of work items; between two phases of one launch all programs meet at a
barrier. A launch of one phase needs no barrier, so the same code is one launch or several. Within a tile of rows the
tasks that occur are visited one by one in ascending order, with loads and stores masked to the rows of the task: a row
never sees another task's factors. Sums over rows or columns that are split among items go to fp32 planes in memory,
and a later phase adds the planes in order.

A tile of rows is given by its first row (int64) and the number of rows that exist from there on; offsets within a tile
are int32. BLOCK_R and BLOCK_S are R and S padded to powers of two (at least 16); both lie whole in every tile.

do_not_specialize names what may differ between two calls of the same shapes and is read an element at a time: ids cut out
of longer ones, a stream's barrier. Another variant would be compiled and loaded, which a graph capture does not survive.
"""

import triton
import triton.language as tl
from triton.language.random import philox_impl

END = tl.constexpr(2**31 - 1)  # behind the last task id
ID_BLOCK = tl.constexpr(2048)  # rows whose ids are looked at together
SUM_BLOCK = tl.constexpr(2048)  # elements of a gradient that one item adds up


# --- rows: tasks, gates, dropout -----------------------------------------------------------------------------------


@triton.jit
def rows_from(row, M):
    """How many rows exist from `row` on, as int32."""
    return tl.minimum(M - row, END).to(tl.int32)


@triton.jit
def task_ids(task, u, row, m, count):
    """The task of each row; END behind the last row. Without task factors all ids from 0 on are one."""
    if task is None:
        return tl.where(m < count, 0, END)
    else:
        ids = tl.minimum(tl.load(task + row + m, mask=m < count, other=0), END - 1)
        if u is None:
            ids = tl.where(ids >= 0, 0, ids)
        return tl.where(m < count, ids, END)


@triton.jit
def next_task(ids, t):
    """The smallest id above t."""
    return tl.min(tl.where(ids > t, ids, END), axis=0)


@triton.jit
def coefficients(fusion, t):
    """f and e of task t."""
    if fusion is None:
        return 1.0, 1.0
    else:
        f = tl.sigmoid(tl.load(fusion + t).to(tl.float32))
        return f, 1.0 - f


@triton.jit
def row_gates(gate, gate_row, G, row, m, mine, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """g of each row [m, BLOCK_R] in fp32; NaN for rows of gate that do not exist."""
    r = tl.arange(0, BLOCK_R)
    at = tl.zeros_like(m)
    if gate_row is not None:
        at = tl.load(gate_row + row + m, mask=mine, other=0)
    exists = (at >= 0) & (at < G)
    g = tl.load(gate + at[:, None] * R + r[None, :], mask=(mine & exists)[:, None] & (r < R)[None, :], other=0.0)
    return tl.where((mine & (exists == 0))[:, None], float("nan"), g.to(tl.float32))


@triton.jit
def gated_rows(h, gate, gate_row, G, row, m, mine, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """q = h * g [m, BLOCK_R] in h's dtype; zero where not mine."""
    r = tl.arange(0, BLOCK_R)
    q = tl.load(h + row * R + m[:, None] * R + r[None, :], mask=mine[:, None] & (r < R)[None, :], other=0.0)
    if gate is not None:
        q = (q.to(tl.float32) * row_gates(gate, gate_row, G, row, m, mine, R, BLOCK_R)).to(q.dtype)
    return q


@triton.jit
def kept(seed, row, m, first, drop_below, BLOCK_K: tl.constexpr):
    """Which elements of [row + m, first : first + BLOCK_K] survive dropout; first is a multiple of 8."""
    key = tl.load(seed).to(tl.uint64)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    rows = (row + m).to(tl.uint64)[:, None]
    block = (first // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.uint32)[None, :]
    c0, c1 = (rows & 0xFFFFFFFF).to(tl.uint32), (rows >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox_impl(c0, c1, block, tl.zeros_like(block), low, high, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # flattened: w0 w1 w2 w3
    draws = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(draws, (m.shape[0], BLOCK_K)) >= drop_below


@triton.jit
def tile(base, i, j, height, width, TYPE: tl.constexpr):
    """base[i, j] of a row-major [height, width] parameter in TYPE, zero outside. i is a column and j a row, or the reverse."""
    return tl.load(base + i * width + j, mask=(i < height) & (j < width), other=0.0).to(TYPE)


@triton.jit
def narrowed(wide, TYPE: tl.constexpr):
    """`wide` over a power of two, in TYPE, and that power: sums over many rows leave fp16's range."""
    scale = 1.0
    if TYPE == tl.float16:  # noqa: SIM300
        largest = tl.max(tl.max(tl.abs(wide), axis=1), axis=0)
        scale = tl.exp2(tl.ceil(tl.log2(tl.maximum(largest, 1e-30))))
    return (wide / scale).to(TYPE), scale


@triton.jit
def meet(state, programs):
    """All programs of the launch arrive before any goes on. state [2] int32 zeros: arrivals, generation."""
    tl.debug_barrier()
    generation = tl.atomic_add(state + 1, 0, sem="relaxed")
    if tl.atomic_add(state, 1, sem="acq_rel") == programs - 1:
        tl.atomic_xchg(state, 0, sem="relaxed")
        tl.atomic_add(state + 1, 1, sem="release")
    else:
        while tl.atomic_add(state + 1, 0, sem="acquire") == generation:
            pass
    tl.debug_barrier()


# --- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def finish_h(
    acc, row, m, count, T, keep_scale, task, gate, gate_row, G, fusion, v, h, z,
    R: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Store h, and z = e q V_t^T for every task of the tile."""
    r, s = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    q = (acc * keep_scale).to(h.dtype.element_ty)
    tl.store(h + row * R + m[:, None] * R + r[None, :], q, mask=(m < count)[:, None] & (r < R)[None, :])
    if v is not None:
        if gate is not None:
            q = (q.to(tl.float32) * row_gates(gate, gate_row, G, row, m, m < count, R, BLOCK_R)).to(q.dtype)
        ids = task_ids(task, v, row, m, count)
        t = next_task(ids, -1)
        while t < T:
            _, e = coefficients(fusion, t)
            vt = tile(v + t.to(tl.int64) * S * R, s[None, :], r[:, None], S, R, q.dtype)
            zt = e * tl.dot(q, vt, input_precision="ieee")
            at = z + row * S + m[:, None] * S + s[None, :]
            tl.store(at, zt.to(q.dtype), mask=(ids == t)[:, None] & (s < S)[None, :])
            t = next_task(ids, t)


@triton.jit
def store_h(
    acc, row, m, count, split, M, T, keep_scale, task, gate, gate_row, G, fusion, v, h, z, planes,
    R: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Store one tile of h, or its plane when the columns of x are split."""
    r = tl.arange(0, BLOCK_R)
    if SPLIT_K > 1:
        at = planes + (split.to(tl.int64) * M + row) * R + m[:, None] * R + r[None, :]
        tl.store(at, acc, mask=(m < count)[:, None] & (r < R)[None, :])
    else:
        finish_h(acc, row, m, count, T, keep_scale, task, gate, gate_row, G, fusion, v, h, z, R, S, BLOCK_R, BLOCK_S)


@triton.jit
def shrink(
    item, x, a, task, gate, gate_row, G, fusion, v, seed, h, z, planes, a_2, fusion_2, v_2, h_2, z_2, planes_2,
    M, K, T, x_stride, drop_below, keep_scale,
    R: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """h = D(x) A^T of one tile of rows, or its share over one of SPLIT_K ranges of columns; of two adapters at once."""
    row, split = (item // SPLIT_K).to(tl.int64) * BLOCK_M, item % SPLIT_K
    count = rows_from(row, M)
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    m, r, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc_2 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(split * share, tl.minimum(split * share + share, K), BLOCK_K):
        columns = first + k
        inside = (m < count)[:, None] & (columns < K)[None, :]
        block = tl.load(x + row * x_stride + m[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
        if seed is not None:
            block = tl.where(kept(seed, row, m, first, drop_below, BLOCK_K), block, 0.0)
        acc = tl.dot(block, tile(a, r[None, :], columns[:, None], R, K, block.dtype), acc, input_precision="ieee")
        if a_2 is not None:
            right = tile(a_2, r[None, :], columns[:, None], R, K, block.dtype)
            acc_2 = tl.dot(block, right, acc_2, input_precision="ieee")
    store_h(
        acc, row, m, count, split, M, T, keep_scale, task, gate, gate_row, G, fusion, v, h, z, planes,
        R, S, BLOCK_R, BLOCK_S, SPLIT_K,
    )  # fmt: skip
    if a_2 is not None:
        store_h(
            acc_2, row, m, count, split, M, T, keep_scale, task, gate, gate_row, G, fusion_2, v_2, h_2, z_2, planes_2,
            R, S, BLOCK_R, BLOCK_S, SPLIT_K,
        )  # fmt: skip


@triton.jit
def sum_h(
    item, task, gate, gate_row, G, fusion, v, h, z, planes, M, T, keep_scale,
    R: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """h of one tile of rows from its planes."""
    row = item.to(tl.int64) * BLOCK_M
    count = rows_from(row, M)
    m, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for split in tl.static_range(SPLIT_K):
        at = planes + (split * M.to(tl.int64) + row) * R + m[:, None] * R + r[None, :]
        acc += tl.load(at, mask=(m < count)[:, None] & (r < R)[None, :], other=0.0, cache_modifier=".cg")
    finish_h(acc, row, m, count, T, keep_scale, task, gate, gate_row, G, fusion, v, h, z, R, S, BLOCK_R, BLOCK_S)


@triton.jit
def expand(
    item, b0, u, fusion, task, gate, gate_row, G, bias, h, z, y, M, N, T, scaling,
    R: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_N: tl.constexpr,
):  # fmt: skip
    """y = bias + s (f q B0^T + z U_t^T) of one tile of rows and TILES_N tiles of outputs."""
    groups = tl.cdiv(N, BLOCK_N * TILES_N)
    row, start = (item // groups).to(tl.int64) * BLOCK_M, item % groups * (BLOCK_N * TILES_N)
    count = rows_from(row, M)
    m, r, s, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_N)
    q = gated_rows(h, gate, gate_row, G, row, m, m < count, R, BLOCK_R)
    if TILES_N == 1:  # the shared product once, however many tasks the tile has
        shared = tl.dot(q, tile(b0, (start + n)[None, :], r[:, None], N, R, q.dtype), input_precision="ieee")
    ids = task_ids(task, u, row, m, count)
    t = tl.min(ids, axis=0)
    while t < END:
        mine = ids == t
        exists = (t >= 0) & (t < T)
        known = tl.where(exists, t, 0)
        f, _ = coefficients(fusion, known)
        if u is not None:
            inside = (mine & exists)[:, None] & (s < S)[None, :]
            zt = tl.load(z + row * S + m[:, None] * S + s[None, :], mask=inside, other=0.0)
        for first in range(start, tl.minimum(start + BLOCK_N * TILES_N, N), BLOCK_N):
            columns = first + n
            if TILES_N == 1:
                acc = f * shared
            else:
                acc = f * tl.dot(q, tile(b0, columns[None, :], r[:, None], N, R, q.dtype), input_precision="ieee")
            if u is not None:
                ut = tile(u + known.to(tl.int64) * N * S, columns[None, :], s[:, None], N, S, q.dtype)
                acc = tl.dot(zt, ut, acc, input_precision="ieee")
            # Rows without an adapter get none; ids that do not exist give NaN, for the host cannot look at them.
            acc = tl.where(exists, acc * scaling, tl.where(t < 0, 0.0, float("nan")))
            if bias is not None:
                acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
            at = y + row * N + m[:, None] * N + columns[None, :]
            tl.store(at, acc.to(y.dtype.element_ty), mask=mine[:, None] & (columns < N)[None, :])
        t = next_task(ids, t)


@triton.jit(
    do_not_specialize=[
        "fusion", "task", "gate_row", "seed", "fusion_2", "state",
        "M", "T", "G", "drop_below",
    ]
)  # fmt: skip
def delta_forward(
    x, a, b0, u, v, fusion, task, gate, gate_row, bias, seed,
    h, z, planes, y, a_2, fusion_2, v_2, h_2, z_2, planes_2, state,
    M, K, N, T, G, x_stride, scaling, drop_below, keep_scale,
    R: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr, TILES_N: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Phases: 0 shrink, 1 sum the planes of h (with SPLIT_K > 1), 2 expand. Phase 0 may serve a second adapter as well."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(M, BLOCK_M)
    if FIRST == 0:
        for item in range(program, blocks * SPLIT_K, programs):
            shrink(
                tl.cast(item, tl.int32), x, a, task, gate, gate_row, G, fusion, v, seed, h, z, planes,
                a_2, fusion_2, v_2, h_2, z_2, planes_2, M, K, T, x_stride, drop_below, keep_scale,
                R, S, BLOCK_R, BLOCK_S, BLOCK_M, BLOCK_K, SPLIT_K,
            )  # fmt: skip
    if FIRST <= 1 and LAST >= 1 and SPLIT_K > 1:
        if FIRST < 1:
            meet(state, programs)
        for item in range(program, blocks, programs):
            sum_h(
                tl.cast(item, tl.int32), task, gate, gate_row, G, fusion, v, h, z, planes, M, T, keep_scale,
                R, S, BLOCK_R, BLOCK_S, BLOCK_M, SPLIT_K,
            )  # fmt: skip
    if LAST == 2:
        if FIRST < 2:
            meet(state, programs)
        for item in range(program, blocks * tl.cdiv(N, BLOCK_N * TILES_N), programs):
            expand(
                tl.cast(item, tl.int32), b0, u, fusion, task, gate, gate_row, G, bias, h, z, y, M, N, T, scaling,
                R, S, BLOCK_R, BLOCK_S, BLOCK_M, BLOCK_N, TILES_N,
            )  # fmt: skip


# --- backward ------------------------------------------------------------------------------------------------------


@triton.jit
def finish_dh(
    p, q_u, t, mine, row, m, T, scaling, gate, gate_row, G, fusion, v, h, dh, dq_h, scaled_q_u, dfusion_rows,
    R: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """From P = dy B0 and Q = dy U_t of the rows of task t: dh, and what the gradients of v, fusion and gate sum up."""
    r, s = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    exists = (t >= 0) & (t < T)
    known = tl.where(exists, t, 0)
    f, e = coefficients(fusion, known)
    stored = mine[:, None] & (r < R)[None, :]
    at = row * R + m[:, None] * R + r[None, :]
    dq = f * p
    if v is not None:
        vt = tile(v + known.to(tl.int64) * S * R, s[:, None], r[None, :], S, R, dh.dtype.element_ty)
        qv = tl.dot(q_u.to(dh.dtype.element_ty), vt, input_precision="ieee")
        dq += e * qv
        if scaled_q_u is not None:
            left = scaled_q_u + row * S + m[:, None] * S + s[None, :]
            tl.store(left, (scaling * e * q_u).to(dh.dtype.element_ty), mask=mine[:, None] & (s < S)[None, :])
        if dfusion_rows is not None:
            q = gated_rows(h, gate, gate_row, G, row, m, mine, R, BLOCK_R).to(tl.float32)
            tl.store(dfusion_rows + row + m, scaling * f * e * tl.sum((p - qv) * q, axis=1), mask=mine)
    dq = tl.where(exists, dq * scaling, tl.where(t < 0, 0.0, float("nan")))
    if gate is not None:
        if dq_h is not None:
            tl.store(dq_h + at, dq * tl.load(h + at, mask=stored, other=0.0).to(tl.float32), mask=stored)
        dq *= row_gates(gate, gate_row, G, row, m, mine, R, BLOCK_R)
    tl.store(dh + at, dq.to(dh.dtype.element_ty), mask=stored)


@triton.jit
def shrink_dy(
    item, dy, b0, u, v, fusion, task, gate, gate_row, G, h, dh, dq_h, scaled_q_u, dfusion_rows, planes,
    M, N, T, scaling,
    R: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_N: tl.constexpr,
):  # fmt: skip
    """P = dy B0 and Q = dy U_t of one tile of rows, or its share over one of SPLIT_N ranges of outputs."""
    row, split = (item // SPLIT_N).to(tl.int64) * BLOCK_M, item % SPLIT_N
    share = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLIT_N) * BLOCK_N
    m, r, s, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_N)
    ids = task_ids(task, u, row, m, rows_from(row, M))
    t = tl.min(ids, axis=0)
    while t < END:
        mine = ids == t
        ut = u
        if u is not None:
            ut = u + tl.where((t >= 0) & (t < T), t, 0).to(tl.int64) * N * S
        p = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        q_u = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
        for first in range(split * share, tl.minimum(split * share + share, N), BLOCK_N):
            columns = first + n
            inside = mine[:, None] & (columns < N)[None, :]
            block = tl.load(dy + row * N + m[:, None] * N + columns[None, :], mask=inside, other=0.0)
            p = tl.dot(block, tile(b0, columns[:, None], r[None, :], N, R, block.dtype), p, input_precision="ieee")
            if u is not None:
                right = tile(ut, columns[:, None], s[None, :], N, S, block.dtype)
                q_u = tl.dot(block, right, q_u, input_precision="ieee")
        if SPLIT_N > 1:
            at = planes + (split.to(tl.int64) * M + row) * (R + S) + m[:, None] * (R + S)
            tl.store(at + r[None, :], p, mask=mine[:, None] & (r < R)[None, :])
            if u is not None:
                tl.store(at + R + s[None, :], q_u, mask=mine[:, None] & (s < S)[None, :])
        else:
            finish_dh(
                p, q_u, t, mine, row, m, T, scaling, gate, gate_row, G, fusion, v, h, dh, dq_h, scaled_q_u, dfusion_rows,
                R, S, BLOCK_R, BLOCK_S,
            )  # fmt: skip
        t = next_task(ids, t)


@triton.jit
def sum_dh(
    item, u, v, fusion, task, gate, gate_row, G, h, dh, dq_h, scaled_q_u, dfusion_rows, planes, M, T, scaling,
    R: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, SPLIT_N: tl.constexpr,
):  # fmt: skip
    """dh of one tile of rows from the planes of P and Q."""
    row = item.to(tl.int64) * BLOCK_M
    count = rows_from(row, M)
    m, r, s = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    p = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    q_u = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
    for split in tl.static_range(SPLIT_N):
        at = planes + (split * M.to(tl.int64) + row) * (R + S) + m[:, None] * (R + S)
        p += tl.load(at + r[None, :], mask=(m < count)[:, None] & (r < R)[None, :], other=0.0, cache_modifier=".cg")
        if u is not None:
            inside = (m < count)[:, None] & (s < S)[None, :]
            q_u += tl.load(at + R + s[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    ids = task_ids(task, u, row, m, count)
    t = tl.min(ids, axis=0)
    while t < END:
        finish_dh(
            p, q_u, t, ids == t, row, m, T, scaling, gate, gate_row, G, fusion, v, h, dh, dq_h, scaled_q_u, dfusion_rows,
            R, S, BLOCK_R, BLOCK_S,
        )  # fmt: skip
        t = next_task(ids, t)


@triton.jit
def span(index, u, row, count, i):
    """The first and last of `count` rows whose id is i, counted from `row`; count and -1 without one."""
    first, last = count, tl.full((), -1, tl.int32)
    for at in range(0, count, ID_BLOCK):
        m = at + tl.arange(0, ID_BLOCK)
        equal = task_ids(index, u, row, m, count) == i
        first = tl.minimum(first, tl.min(tl.where(equal, m, END), 0))
        last = tl.maximum(last, tl.max(tl.where(equal, m, -1), 0))
    return first, last


@triton.jit
def next_run(task, u, row, count, t, T):
    """The smallest existing id above t among `count` rows from `row`, with its first and last row; END without one."""
    if task is None:
        return tl.where((t < 0) & (count > 0), 0, END).to(tl.int32), tl.full((), 0, tl.int32), count - 1
    else:
        found, first, last = tl.full((), END, tl.int32), count, tl.full((), -1, tl.int32)
        for at in range(0, count, ID_BLOCK):
            ids = task_ids(task, u, row, at + tl.arange(0, ID_BLOCK), count)
            found = tl.minimum(found, next_task(tl.where(ids < T, ids, END), t))
        if found < END:
            first, last = span(task, u, row, count, found)
        return found, first, last


@triton.jit
def mark_tasks(chunk, task, u, present, M, T, CHUNK):
    """present[chunk, t] = whether task t has rows in the chunk."""
    row = chunk.to(tl.int64) * CHUNK
    count = tl.minimum(rows_from(row, M), CHUNK)
    done = tl.full((), 0, tl.int32)
    t, _, _ = next_run(task, u, row, count, done - 1, T)
    while t < END:
        for absent in range(done, t):
            tl.store(present + chunk * T + absent, 0)
        tl.store(present + chunk * T + t, 1)
        done = t + 1
        t, _, _ = next_run(task, u, row, count, t, T)
    for absent in range(done, T):
        tl.store(present + chunk * T + absent, 0)


@triton.jit
def up_gradients(
    chunk, block, dy, v, u, fusion, task, gate, gate_row, G, h, db0_planes, du_planes,
    M, N, T, CHUNK, scaling, low_rank, high_rank,
    R: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The share of db0 and du of one chunk of rows and one tile of outputs, through dM_t = dy^T q."""
    r, s, m = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_M)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk_row = chunk.to(tl.int64) * CHUNK
    chunk_count = tl.minimum(rows_from(chunk_row, M), CHUNK)
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    t, low, high = next_run(task, u, chunk_row, chunk_count, tl.full((), -1, tl.int32), T)
    while t < END:
        f, e = coefficients(fusion, t)
        dm = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for first in range(low, high + 1, BLOCK_M):
            row = chunk_row + first
            mine = task_ids(task, u, row, m, chunk_count - first) == t
            inside = mine[None, :] & (columns < N)[:, None]
            dyt = tl.load(dy + row * N + m[None, :] * N + columns[:, None], mask=inside, other=0.0)
            q = gated_rows(h, gate, gate_row, G, row, m, mine, R, BLOCK_R)
            dm = tl.dot(dyt, q, dm, input_precision="ieee")
        if db0_planes is not None:
            total += f * dm
        if du_planes is not None:
            type = dy.dtype.element_ty
            vt = tile(v + t.to(tl.int64) * S * R, s[None, :], r[:, None], S, R, type)
            left, scale = narrowed(dm, type)
            du = scaling * e * scale * tl.dot(left, vt, input_precision="ieee")
            at = du_planes + (chunk.to(tl.int64) * T + t) * N * S + columns[:, None] * S + s[None, :]
            tl.store(at, du, mask=(columns < N)[:, None] & (s < S)[None, :])
        t, low, high = next_run(task, u, chunk_row, chunk_count, t, T)
    if db0_planes is not None:
        at = db0_planes + chunk.to(tl.int64) * N * R + columns[:, None] * R + r[None, :]
        total = tl.where(((r >= low_rank) & (r < high_rank))[None, :], scaling * total, 0.0)
        tl.store(at, total, mask=(columns < N)[:, None] & (r < R)[None, :])


@triton.jit
def load_dh(dh, row, m, count, R: tl.constexpr, BLOCK_R: tl.constexpr):
    r = tl.arange(0, BLOCK_R)
    at = dh + row * R + m[:, None] * R + r[None, :]
    return tl.load(at, mask=(m < count)[:, None] & (r < R)[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def store_da(da, planes, chunk, columns, K, low_rank, high_rank, R: tl.constexpr, BLOCK_R: tl.constexpr):
    r = tl.arange(0, BLOCK_R)
    da = tl.where(((r >= low_rank) & (r < high_rank))[:, None], da, 0.0)
    at = planes + chunk.to(tl.int64) * R * K + r[:, None] * K + columns[None, :]
    tl.store(at, da, mask=(r < R)[:, None] & (columns < K)[None, :])


@triton.jit
def down_gradients(
    chunk, block, x, a, seed, dh, dx, da_planes, a_2, dh_2, da_planes_2,
    M, K, x_stride, CHUNK, drop_below, keep_scale, low_rank, high_rank,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx of one chunk of rows and one tile of columns, and its share of da; of two adapters at once, with one mask."""
    r, m = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_M)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    chunk_row = chunk.to(tl.int64) * CHUNK
    chunk_count = tl.minimum(rows_from(chunk_row, M), CHUNK)
    da = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    da_2 = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if dx is not None:
        right = tile(a, r[:, None], columns[None, :], R, K, dh.dtype.element_ty)
        if a_2 is not None:
            right_2 = tile(a_2, r[:, None], columns[None, :], R, K, dh.dtype.element_ty)
    for first in range(0, chunk_count, BLOCK_M):
        row = chunk_row + first
        count = chunk_count - first
        inside = (m < count)[:, None] & (columns < K)[None, :]
        left = load_dh(dh, row, m, count, R, BLOCK_R)
        if a_2 is not None:
            left_2 = load_dh(dh_2, row, m, count, R, BLOCK_R)
        if seed is not None:
            keep = kept(seed, row, m, block * BLOCK_K, drop_below, BLOCK_K)
        if da_planes is not None or da_planes_2 is not None:
            xt = tl.load(x + row * x_stride + m[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
            if seed is not None:
                xt = tl.where(keep, xt, 0.0)
            if da_planes is not None:
                da = tl.dot(tl.trans(left), xt, da, input_precision="ieee")
            if da_planes_2 is not None:
                da_2 = tl.dot(tl.trans(left_2), xt, da_2, input_precision="ieee")
        if dx is not None:
            dxt = tl.dot(left, right, input_precision="ieee")
            if a_2 is not None:
                dxt = tl.dot(left_2, right_2, dxt, input_precision="ieee")
            dxt *= keep_scale
            if seed is not None:
                dxt = tl.where(keep, dxt, 0.0)
            at = dx + row * K + m[:, None] * K + columns[None, :]
            tl.store(at, dxt.to(dx.dtype.element_ty), mask=inside)
    if da_planes is not None:
        store_da(da * keep_scale, da_planes, chunk, columns, K, low_rank, high_rank, R, BLOCK_R)
    if da_planes_2 is not None:
        store_da(da_2 * keep_scale, da_planes_2, chunk, columns, K, low_rank, high_rank, R, BLOCK_R)


@triton.jit
def v_gradient(
    chunk, t, u, task, gate, gate_row, G, h, scaled_q_u, dv_planes, M, T, CHUNK,
    R: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The share of one chunk of rows in dv of one task, if it has any."""
    r, s, m = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_M)
    chunk_row = chunk.to(tl.int64) * CHUNK
    chunk_count = tl.minimum(rows_from(chunk_row, M), CHUNK)
    low, high = span(task, u, chunk_row, chunk_count, t)
    if low <= high:
        dv = tl.zeros((BLOCK_S, BLOCK_R), tl.float32)
        for first in range(low, high + 1, BLOCK_M):
            row = chunk_row + first
            mine = task_ids(task, u, row, m, chunk_count - first) == t
            left = scaled_q_u + row * S + m[None, :] * S + s[:, None]
            qt = tl.load(left, mask=mine[None, :] & (s < S)[:, None], other=0.0, cache_modifier=".cg")
            q = gated_rows(h, gate, gate_row, G, row, m, mine, R, BLOCK_R)
            dv = tl.dot(qt, q, dv, input_precision="ieee")
        at = dv_planes + (chunk.to(tl.int64) * T + t) * S * R + s[:, None] * R + r[None, :]
        tl.store(at, dv, mask=(s < S)[:, None] & (r < R)[None, :])


@triton.jit
def fusion_gradient(t, task, u, dfusion_rows, dfusion, M):
    """The sum of dfusion_rows over the rows of task t."""
    total = tl.zeros((ID_BLOCK,), tl.float32)
    for first in range(0, M, ID_BLOCK):
        m = first + tl.arange(0, ID_BLOCK)
        mine = task_ids(task, u, 0, m, M) == t
        total += tl.load(dfusion_rows + m, mask=mine, other=0.0, cache_modifier=".cg")
    tl.store(dfusion + t, tl.sum(total, 0).to(dfusion.dtype.element_ty))


@triton.jit
def gate_gradient(i, gate_row, dq_h, dgate, M, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr):
    """The sum of dq * h over the rows of gate i."""
    r, m = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    low, high = tl.full((), 0, tl.int32), M - 1
    if gate_row is not None:
        low, high = span(gate_row, gate_row, 0, M, i)
    for first in range(low, high + 1, BLOCK_M):
        row = tl.cast(first, tl.int64)
        inside = (task_ids(gate_row, gate_row, row, m, M - first) == i)[:, None] & (r < R)[None, :]
        total += tl.load(dq_h + row * R + m[:, None] * R + r[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    tl.store(dgate + i * R + r, tl.sum(total, 0).to(dgate.dtype.element_ty), mask=r < R)


@triton.jit
def sum_planes(item, planes, present, out, chunks, T, size):
    """out [T, size] = the sum of planes [chunks, T, size] over the chunks, for one block of elements of one task.

    With `present`, planes of tasks without rows in a chunk were never written.
    """
    per_task = tl.cdiv(size, SUM_BLOCK)
    t, at = (item // per_task).to(tl.int64), item % per_task * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    total = tl.zeros((SUM_BLOCK,), tl.float32)
    for chunk in range(chunks):
        inside = at < size
        if present is not None:
            inside &= tl.load(present + chunk * T + t, cache_modifier=".cg") != 0
        total += tl.load(planes + (chunk * T + t) * size + at, mask=inside, other=0.0, cache_modifier=".cg")
    tl.store(out + t * size + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit(
    do_not_specialize=[
        "fusion", "task", "gate_row", "seed", "state",
        "M", "T", "G", "CHUNK", "drop_below", "low_rank", "high_rank",
    ]
)  # fmt: skip
def delta_backward(
    dy, x, h, a, b0, u, v, fusion, task, gate, gate_row, seed,
    dx, da, db0, du, dv, dfusion, dgate,
    dh, dq_h, scaled_q_u, dfusion_rows, planes, da_planes, db0_planes, du_planes, dv_planes, present,
    a_2, dh_2, da_planes_2, state,
    M, K, N, T, G, x_stride, CHUNK, scaling, drop_below, keep_scale, low_rank, high_rank,
    R: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_N: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Phases: 0 all that reads dy, 1 sum the planes of dh (with SPLIT_N > 1), 2 all that reads x, and the sums over
    rows, 3 the sums over the planes of gradients. A gradient that is None is not computed.

    Rows come in chunks of CHUNK; in phase 0 the items of a chunk follow each other, so that the second read of its dy
    finds it in the L2 cache. Phase 2 may serve dx and da of a second adapter of the same x as well.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    chunks = tl.cdiv(M, CHUNK)
    if FIRST == 0:
        shrinks = CHUNK // BLOCK_M * SPLIT_N if dh is not None else 0
        ups = tl.cdiv(N, BLOCK_N) if db0 is not None or du is not None else 0
        each = shrinks + ups + (1 if present is not None else 0)
        for work in range(program, chunks * each, programs):
            chunk, item = tl.cast(work, tl.int32) // each, tl.cast(work, tl.int32) % each
            if item < shrinks:
                if dh is not None:
                    shrink_dy(
                        chunk * shrinks + item, dy, b0, u, v, fusion, task, gate, gate_row, G, h, dh, dq_h, scaled_q_u,
                        dfusion_rows, planes, M, N, T, scaling, R, S, BLOCK_R, BLOCK_S, BLOCK_M, BLOCK_N, SPLIT_N,
                    )  # fmt: skip
            elif item < shrinks + ups:
                if db0 is not None or du is not None:
                    up_gradients(
                        chunk, item - shrinks, dy, v, u, fusion, task, gate, gate_row, G, h, db0_planes, du_planes,
                        M, N, T, CHUNK, scaling, low_rank, high_rank, R, S, BLOCK_R, BLOCK_S, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
            else:
                if present is not None:
                    mark_tasks(chunk, task, u, present, M, T, CHUNK)
    if FIRST <= 1 and LAST >= 1 and SPLIT_N > 1 and dh is not None:
        if FIRST < 1:
            meet(state, programs)
        for work in range(program, tl.cdiv(M, BLOCK_M), programs):
            sum_dh(
                tl.cast(work, tl.int32), u, v, fusion, task, gate, gate_row, G, h, dh, dq_h, scaled_q_u, dfusion_rows, planes,
                M, T, scaling, R, S, BLOCK_R, BLOCK_S, BLOCK_M, SPLIT_N,
            )  # fmt: skip
    if FIRST <= 2 and LAST >= 2:
        if FIRST < 2:
            meet(state, programs)
        reads_x: tl.constexpr = dx is not None or da_planes is not None or da_planes_2 is not None
        vs = chunks * T if dv is not None else 0
        fusions = vs + (T if dfusion is not None else 0)
        gates = fusions + (G if dgate is not None else 0)
        downs = gates + (chunks * tl.cdiv(K, BLOCK_K) if reads_x else 0)
        for work in range(program, downs, programs):
            item = tl.cast(work, tl.int32)
            if item < vs:
                if dv is not None:
                    v_gradient(
                        item // T, item % T, u, task, gate, gate_row, G, h, scaled_q_u, dv_planes, M, T, CHUNK,
                        R, S, BLOCK_R, BLOCK_S, BLOCK_M,
                    )  # fmt: skip
            elif item < fusions:
                if dfusion is not None:
                    fusion_gradient(item - vs, task, u, dfusion_rows, dfusion, M)
            elif item < gates:
                if dgate is not None:
                    gate_gradient(item - fusions, gate_row, dq_h, dgate, M, R, BLOCK_R, BLOCK_M)
            else:
                if reads_x:
                    blocks = tl.cdiv(K, BLOCK_K)
                    down_gradients(
                        (item - gates) // blocks, (item - gates) % blocks, x, a, seed, dh, dx, da_planes,
                        a_2, dh_2, da_planes_2, M, K, x_stride, CHUNK, drop_below, keep_scale, low_rank, high_rank,
                        R, BLOCK_R, BLOCK_M, BLOCK_K,
                    )  # fmt: skip
    if LAST == 3:
        if FIRST < 3:
            meet(state, programs)
        a_s = tl.cdiv(R * K, SUM_BLOCK) if da is not None else 0
        b0s = a_s + (tl.cdiv(N * R, SUM_BLOCK) if db0 is not None else 0)
        us = b0s + (T * tl.cdiv(N * S, SUM_BLOCK) if du is not None else 0)
        vs = us + (T * tl.cdiv(S * R, SUM_BLOCK) if dv is not None else 0)
        for work in range(program, vs, programs):
            item = tl.cast(work, tl.int32)
            if item < a_s:
                if da is not None:
                    sum_planes(item, da_planes, None, da, chunks, 1, R * K)
            elif item < b0s:
                if db0 is not None:
                    sum_planes(item - a_s, db0_planes, None, db0, chunks, 1, N * R)
            elif item < us:
                if du is not None:
                    sum_planes(item - b0s, du_planes, present, du, chunks, T, N * S)
            else:
                if dv is not None:
                    sum_planes(item - us, dv_planes, present, dv, chunks, T, S * R)
