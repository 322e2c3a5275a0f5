"""What the Triton kernels of `delta` share: rows with their tasks and gates, dropout, how programs wait for each other.

A tile of rows is given by its first row (int64) and the number of rows that exist from there on; offsets within a tile are
int32. Within a tile the tasks that occur are visited one by one in ascending order, with loads and stores masked to the
rows of the task: a row never sees another task's factors.

Kernels take their tensors in named tuples, one for each purpose, and all their sizes as one constant `c` (`ForwardSizes`,
`BackwardSizes`). What may differ between two calls of the same shapes and is read an element at a time (ids cut out of longer
ones, a stream's state) stands beside the tuples and is not specialised on: another variant would be compiled and loaded, which
a graph capture does not survive, and Triton specialises on all that a tuple holds. Kernels pack it up again, as `Rows`.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.random import philox_impl

END = tl.constexpr(2**31 - 1)  # behind the last task id
ID_BLOCK = tl.constexpr(2048)  # rows whose ids are looked at together


class Rows(NamedTuple):
    """task, gate_row [M] int32 or None, gate [G, R] or None; T tasks."""

    task: object
    gate: object
    gate_row: object
    M: object
    T: object
    G: object


class Dropout(NamedTuple):
    """seed [1] int64 or None; draws below `threshold` are dropped, and what is kept is multiplied by `scale`."""

    seed: object
    threshold: object
    scale: object


@triton.jit
def rows_from(row, M):
    """How many rows exist from `row` on, as int32."""
    return tl.minimum(M - row, END).to(tl.int32)


@triton.jit
def ids_from(index, row, m, count, ALIKE: tl.constexpr):
    """index[row + m], or 0 without one; END behind the last row. ALIKE: all ids from 0 on are one."""
    if index is None:
        return tl.where(m < count, 0, END)
    else:
        ids = tl.minimum(tl.load(index + row + m, mask=m < count, other=0), END - 1)
        if ALIKE:
            ids = tl.where(ids >= 0, 0, ids)
        return tl.where(m < count, ids, END)


@triton.jit
def task_ids(rows, row, m, count, c: tl.constexpr):
    """The task of each row; END behind the last row. Without task factors all tasks are one."""
    return ids_from(rows.task, row, m, count, c.S == 0)


@triton.jit
def next_task(ids, t):
    """The smallest id above t."""
    return tl.min(tl.where(ids > t, ids, END), axis=0)


@triton.jit
def span(index, row, count, i, ALIKE: tl.constexpr):
    """The first and last of `count` rows whose id is i, counted from `row`; count and -1 without one."""
    first, last = count, tl.full((), -1, tl.int32)
    for at in range(0, count, ID_BLOCK):
        m = at + tl.arange(0, ID_BLOCK)
        equal = ids_from(index, row, m, count, ALIKE) == i
        first = tl.minimum(first, tl.min(tl.where(equal, m, END), 0))
        last = tl.maximum(last, tl.max(tl.where(equal, m, -1), 0))
    return first, last


@triton.jit
def next_run(rows, row, count, t, c: tl.constexpr):
    """The smallest existing task above t among `count` rows from `row`, with its first and last row; END without one."""
    if rows.task is None:
        return tl.where((t < 0) & (count > 0), 0, END).to(tl.int32), tl.full((), 0, tl.int32), count - 1
    else:
        found, first, last = tl.full((), END, tl.int32), count, tl.full((), -1, tl.int32)
        for at in range(0, count, ID_BLOCK):
            ids = task_ids(rows, row, at + tl.arange(0, ID_BLOCK), count, c)
            found = tl.minimum(found, next_task(tl.where(ids < rows.T, ids, END), t))
        if found < END:
            first, last = span(rows.task, row, count, found, c.S == 0)
        return found, first, last


@triton.jit
def coefficients(fusion, t):
    """f and e of task t."""
    if fusion is None:
        return 1.0, 1.0
    else:
        f = tl.sigmoid(tl.load(fusion + t).to(tl.float32))
        return f, 1.0 - f


@triton.jit
def row_gates(rows, row, m, mine, c: tl.constexpr):
    """g of each row [m, BLOCK_R] in fp32; NaN for rows of gate that do not exist."""
    r = tl.arange(0, c.BLOCK_R)
    at = tl.zeros_like(m)
    if rows.gate_row is not None:
        at = tl.load(rows.gate_row + row + m, mask=mine, other=0)
    exists = (at >= 0) & (at < rows.G)
    inside = (mine & exists)[:, None] & (r < c.R)[None, :]
    g = tl.load(rows.gate + at[:, None] * c.R + r[None, :], mask=inside, other=0.0)
    return tl.where((mine & (exists == 0))[:, None], float("nan"), g.to(tl.float32))


@triton.jit
def gated_rows(h, rows, row, m, mine, c: tl.constexpr):
    """q = h * g [m, BLOCK_R] in h's dtype; zero where not mine."""
    r = tl.arange(0, c.BLOCK_R)
    q = tl.load(h + row * c.R + m[:, None] * c.R + r[None, :], mask=mine[:, None] & (r < c.R)[None, :], other=0.0)
    if rows.gate is not None:
        q = (q.to(tl.float32) * row_gates(rows, row, m, mine, c)).to(q.dtype)
    return q


@triton.jit
def dropout_mask(dropout, row, m, first, BLOCK_K: tl.constexpr):
    """Which elements of [row + m, first : first + BLOCK_K] are kept; first is a multiple of 8."""
    key = tl.load(dropout.seed).to(tl.uint64)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    rows = (row + m).to(tl.uint64)[:, None]
    block = (first // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.uint32)[None, :]
    c0, c1 = (rows & 0xFFFFFFFF).to(tl.uint32), (rows >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox_impl(c0, c1, block, tl.zeros_like(block), low, high, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # flattened: w0 w1 w2 w3
    draws = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(draws, (m.shape[0], BLOCK_K)) >= dropout.threshold


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


# --- programs that wait for each other; `state` is that of `barrier_state` -----------------------------------------


@triton.jit
def grid_barrier(state):
    """All programs of the launch arrive before any goes on."""
    tl.debug_barrier()
    generation = tl.atomic_add(state + 1, 0, sem="relaxed")
    if tl.atomic_add(state, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.atomic_xchg(state, 0, sem="relaxed")
        tl.atomic_add(state + 1, 1, sem="release")
    else:
        while tl.atomic_add(state + 1, 0, sem="acquire") == generation:
            pass
    tl.debug_barrier()


@triton.jit
def arrives_last(state, part, SPLITS: tl.constexpr):
    """Whether this is the last of SPLITS programs to have stored its share of a part: it can read those of all."""
    tl.debug_barrier()
    is_last = tl.atomic_add(state + 2 + part, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        tl.atomic_xchg(state + 2 + part, 0, sem="relaxed")
    tl.debug_barrier()
    return is_last
