"""What the phases of the CUDA kernels of `delta` do in 16 bits: work items, bytes and operations, from the sizes alone.

The sizes of tiles and shares are those that plan() chooses in csrc/delta_forward.cu and csrc/delta_backward.cu. For rows
that lie task by task, equally many of each, and all gradients but that of a gate.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .traffic import FLOAT, Shape, Traffic, ceil, visits

THREADS, STEP, TILE, WIDE = 256, 64, 128, 192  # of a block; columns of a step, of a tile, and of one of [P | Q]
STREAMED = 32  # outputs of a warp, each of which loads x, while the base's weight passes by
MANY_ROWS, FEW_ROWS_UP_TO = 128, 64  # up to so many rows are one tile of the forward
FEW_ROWS = SUM_ROWS = 16  # of a tile of few rows in the backward, and where partial sums are added
MOST_SPLITS = 8  # loads that are under way at once
PARTIAL_BYTES, SUM_BLOCK = 1 << 28, 8 * THREADS


@dataclass(frozen=True)
class Phase:
    """loads: how often a thread waits for partial sums, or for h, before it asks for the next. at_once: blocks of a processor
    on sm_90a, in a launch of the phase's own."""

    items: int
    traffic: list[Traffic]
    flops: int = 0
    loads: int = 0
    at_once: int = 1


def shares(tiles: int, blocks: int, steps: int, least: int, most: int) -> int:
    """shares_for() of csrc/work.h."""
    most = max(1, min(most, ceil(2 * blocks, max(tiles, 1))))
    counts = (count for count in range(1, most + 1) if count == 1 or ceil(steps, count) >= least)
    return min(counts, key=lambda count: ceil(tiles * count, blocks) * ceil(steps, count))


def padded(rank: int) -> int:
    return ceil(rank, 8) * 8


def tile_rows(shape: Shape) -> int:
    """Of the backward."""
    return MANY_ROWS if shape.rows > FEW_ROWS_UP_TO else FEW_ROWS


def expanding_at_once(shape: Shape) -> int:
    """Blocks of a processor in phase 2 of the forward."""
    return 2 if shape.rows > FEW_ROWS_UP_TO else 1


def chunk_rows(shape: Shape) -> int:
    chunk, partial = 512 if shape.rows <= 2048 else 2048, FLOAT * shape.tasks * shape.outputs * shape.sub_rank
    while chunk < shape.rows and ceil(shape.rows, chunk) * partial > PARTIAL_BYTES:
        chunk *= 2
    return chunk


def forward(shape: Shape, base: bool, blocks: int, expanding: int | None = None) -> Iterator[Phase]:
    """blocks: as many as there are processors. With `base`, for up to FEW_ROWS_UP_TO rows, x W^T too.

    expanding: blocks at once in phase 2, where that is not the same; expanding_at_once() of a processor, by phase.
    """
    m, k, n, r, s, act = shape.rows, shape.columns, shape.outputs, shape.rank, shape.sub_rank, shape.activation
    many, width = m > FEW_ROWS_UP_TO, padded(r) + padded(s)
    row_tiles, sum_tiles = ceil(m, MANY_ROWS) if many else 1, ceil(m, SUM_ROWS)
    rank_tiles, output_tiles = ceil(r, TILE), ceil(n, TILE)
    passes, sum_passes = visits(row_tiles, shape.tasks), visits(sum_tiles, shape.tasks)
    splits = shares(row_tiles * rank_tiles, blocks, ceil(k, STEP), 2, MOST_SPLITS)
    groups = shares(row_tiles, expanding or blocks, output_tiles, 1, output_tiles)
    partials, h, qz = splits * m * padded(r) * FLOAT, m * r * act, m * width * act
    computed = row_tiles * MANY_ROWS if many else sum_tiles * SUM_ROWS
    moved = [
        Traffic(0, "x", rank_tiles * m * k * act, m * k * act),
        Traffic(0, "a", row_tiles * r * k * act, r * k * act),
        Traffic(0, "partials", partials, partials),
    ]
    yield Phase(row_tiles * rank_tiles * splits, moved, 2 * computed * k * r, at_once=2)
    moved = [
        Traffic(1, "partials", partials, partials),
        Traffic(1, "h", h, h),
        Traffic(1, "v", sum_passes * s * r * act, shape.tasks * s * r * act),
        Traffic(1, "qz", qz, qz),
        Traffic(1, "q", sum_passes * min(m, SUM_ROWS) * padded(r) * act, 0),
    ]
    loads = ceil(min(m, SUM_ROWS) * padded(r), 4 * THREADS)
    yield Phase(sum_tiles, moved, 2 * sum_passes * SUM_ROWS * r * s, loads, at_once=3)
    moved = []
    if base:
        octets = ceil(n, 8)
        groups = ceil(octets, ceil(octets, blocks * ceil(octets, blocks * (TILE // 8))))
        loads, weight = groups * ceil(8 * ceil(octets, groups), STREAMED), n * k * act  # where ranges are equal
        moved = [Traffic(2, "x", loads * m * k * act, m * k * act), Traffic(2, "weight", weight, weight)]
    moved += [
        Traffic(2, "qz", groups * qz, qz),
        Traffic(2, "b0", (passes if many else 1) * n * r * act, n * r * act),
        Traffic(2, "u", passes * n * s * act, shape.tasks * n * s * act),
        Traffic(2, "y", m * n * act, m * n * act),
    ]
    by_task = passes * MANY_ROWS if many else sum_passes * SUM_ROWS
    flops = 2 * n * ((by_task if many else computed) * r + by_task * s + base * computed * k)
    yield Phase(row_tiles * groups, moved, flops, at_once=expanding_at_once(shape))


def backward(shape: Shape, blocks: int, dx: bool) -> Iterator[Phase]:
    """blocks: as many as there are processors. Without dx where the fused product makes it."""
    m, k, n, r, s, act = shape.rows, shape.columns, shape.outputs, shape.rank, shape.sub_rank, shape.activation
    tile, width, tasks = tile_rows(shape), padded(r) + padded(s), shape.tasks
    row_tiles, sum_tiles, chunks = (ceil(m, size) for size in (tile, SUM_ROWS, chunk_rows(shape)))
    output_tiles, v_tiles = ceil(n, TILE), ceil(r, WIDE)
    passes, sum_passes = (visits(parts, tasks) for parts in (row_tiles, sum_tiles))
    runs = len(
        {(row // chunk_rows(shape), row * tasks // m) for row in range(m)}
    )  # chunks are larger than the last one
    wide_tiles, outer_tiles, column_tiles = (
        ceil(width, WIDE if tile == MANY_ROWS else 256),
        ceil(width, WIDE),
        ceil(k, WIDE),
    )
    splits = shares(row_tiles * wide_tiles, blocks, ceil(n, STEP), 2, MOST_SPLITS)
    groups = shares(row_tiles, blocks, ceil(k, TILE), 1, ceil(k, TILE))
    h, q, qz, seq = m * r * act, m * padded(r) * act, m * width * act, m * padded(s) * act
    partials, factors = splits * m * width * FLOAT, tasks * s * r * act
    da, db0 = chunks * r * k * FLOAT, chunks * n * r * FLOAT
    du, dv = runs * n * s * FLOAT, runs * s * r * FLOAT
    moved = [
        Traffic(0, "h", h, h),
        Traffic(0, "v", sum_passes * s * r * act, factors),
        Traffic(0, "fqz, q", qz + q, qz + q),
        Traffic(0, "q", sum_passes * min(m, SUM_ROWS) * padded(r) * act, 0),
    ]
    loads = ceil(min(m, SUM_ROWS) * padded(r), 4 * THREADS)
    yield Phase(sum_tiles + chunks, moved, 2 * sum_passes * SUM_ROWS * r * s, loads, at_once=4)
    moved = [
        Traffic(1, "dy", (wide_tiles * passes * min(m, tile) + outer_tiles * m) * n * act, m * n * act),
        Traffic(1, "b0", passes * n * r * act, n * r * act),
        Traffic(1, "u", passes * n * s * act, tasks * n * s * act),
        Traffic(1, "fqz", output_tiles * qz, qz),
        Traffic(1, "partials", partials, partials),
        Traffic(1, "db0_partials", db0, db0),
        Traffic(1, "du_partials", du, du),
    ]
    items = row_tiles * wide_tiles * splits + chunks * output_tiles * outer_tiles
    yield Phase(items, moved, 2 * (passes * tile + m) * n * width)
    moved = [
        Traffic(2, "partials", partials, partials),
        Traffic(2, "q", q, q),
        Traffic(2, "v", sum_passes * s * r * act, factors),
        Traffic(2, "dh", q, q),
        Traffic(2, "seq", seq, seq),
    ]
    loads = ceil(min(m, SUM_ROWS) * width, 4 * THREADS)
    yield Phase(sum_tiles, moved, 2 * sum_passes * SUM_ROWS * r * s, loads, at_once=2)
    moved = [
        Traffic(3, "x", ceil(r, TILE) * m * k * act, m * k * act),
        Traffic(3, "dh", (column_tiles + dx * groups) * q, q),
        Traffic(3, "a", dx * row_tiles * r * k * act, dx * r * k * act),
        Traffic(3, "dx", dx * m * k * act, dx * m * k * act),
        Traffic(3, "da_partials", da, da),
        Traffic(3, "seq", v_tiles * seq, seq),
        Traffic(3, "q", q, q),
        Traffic(3, "dv_partials", dv, dv),
    ]
    items = dx * row_tiles * groups + chunks * (ceil(r, TILE) * column_tiles + tasks * v_tiles) + tasks
    yield Phase(items, moved, 2 * (row_tiles * tile * dx + m) * r * k + 2 * m * r * s)
    moved = [Traffic(4, "partials", sum((da, db0, du, dv)), sum((da, db0, du, dv)))]
    sizes = (r * k, 1), (n * r, 1), (n * s, tasks), (s * r, tasks)
    gradients = sum(size * count for size, count in sizes)
    moved += [Traffic(4, "gradients", gradients * act, gradients * act)]
    loads = SUM_BLOCK // (4 * THREADS) * ceil(chunks, MOST_SPLITS)
    yield Phase(sum(ceil(size, SUM_BLOCK) * count for size, count in sizes), moved, loads=loads, at_once=4)
