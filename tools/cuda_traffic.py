"""What the phases of the CUDA kernels of `delta` do in 16 bits: work items, bytes and operations, from the sizes alone.

The sizes of tiles and shares are those that plan() chooses in csrc/delta_forward.cu and csrc/delta_backward.cu. For rows
that lie task by task, equally many of each, and all gradients but that of a gate.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .traffic import FLOAT, Shape, Traffic, ceil, visits

THREADS, STEP, TILE, WIDE = 256, 64, 128, 192  # of a block; columns of a step, of a tile, and of one of [P | Q]
MANY_ROWS, FEW_ROWS, FEW_ROWS_UP_TO = 128, 16, 64
PLANE_BYTES, SUM_BLOCK = 1 << 28, 8 * THREADS


@dataclass(frozen=True)
class Phase:
    """loads: how often a thread waits for a load before the next one, where it does so."""

    items: int
    traffic: list[Traffic]
    flops: int = 0
    loads: int = 0


def shares(tiles: int, blocks: int, step: int, total: int, most: int) -> int:
    return max(1, min(most, ceil(blocks, max(tiles, 1)), ceil(total, step)))


def padded(rank: int) -> int:
    return ceil(rank, 8) * 8


def tile_rows(shape: Shape) -> int:
    return MANY_ROWS if shape.rows > FEW_ROWS_UP_TO else FEW_ROWS


def chunk_rows(shape: Shape) -> int:
    chunk, plane = 512 if shape.rows <= 2048 else 2048, FLOAT * shape.tasks * shape.outputs * shape.sub_rank
    while chunk < shape.rows and ceil(shape.rows, chunk) * plane > PLANE_BYTES:
        chunk *= 2
    return chunk


def forward(shape: Shape, base: bool, blocks: int, cache: int) -> Iterator[Phase]:
    """blocks: at once. With `base` x W^T too: each tile of rows reads the weight, from memory where it exceeds the cache."""
    m, k, n, r, s, act = shape.rows, shape.columns, shape.outputs, shape.rank, shape.sub_rank, shape.activation
    tile, width = tile_rows(shape), padded(r) + padded(s)
    row_tiles, rank_tiles, output_tiles = ceil(m, tile), ceil(r, TILE), ceil(n, TILE)
    passes = visits(row_tiles, shape.tasks)
    splits = shares(row_tiles * rank_tiles, blocks, 2 * STEP, k, 32)
    groups = shares(row_tiles, 2 * blocks, 1, output_tiles, output_tiles)
    planes, h, qz = splits * m * padded(r) * FLOAT, m * r * act, m * width * act
    moved = [
        Traffic(0, "x", rank_tiles * m * k * act, m * k * act),
        Traffic(0, "a", row_tiles * r * k * act, r * k * act),
        Traffic(0, "planes", planes, planes),
    ]
    items, base_planes = row_tiles * rank_tiles * splits, 0
    if base:
        base_splits = shares(row_tiles * output_tiles, 2 * blocks, 8 * STEP, k, 8)
        base_planes, weight = base_splits * m * n * FLOAT, n * k * act
        items += row_tiles * output_tiles * base_splits
        moved += [
            Traffic(0, "x", output_tiles * m * k * act, 0),
            Traffic(0, "weight", row_tiles * weight, weight * (row_tiles if weight > cache else 1)),
            Traffic(0, "base_planes", base_planes, base_planes),
        ]
    yield Phase(items, moved, 2 * row_tiles * tile * k * (r + n * base))
    moved = [
        Traffic(1, "planes", planes, planes),
        Traffic(1, "h", h, h),
        Traffic(1, "v", passes * s * r * act, shape.tasks * s * r * act),
        Traffic(1, "qz", qz, qz),
        Traffic(1, "q", passes * min(m, tile) * padded(r) * act, 0),
    ]
    yield Phase(row_tiles, moved, 2 * passes * tile * r * s, ceil(min(m, tile) * padded(r), THREADS) * ceil(splits, 4))
    b0_passes = row_tiles if tile == FEW_ROWS else passes
    moved = [
        Traffic(2, "qz", groups * qz, qz),
        Traffic(2, "b0", b0_passes * n * r * act, n * r * act),
        Traffic(2, "u", passes * n * s * act, shape.tasks * n * s * act),
        Traffic(2, "base_planes", base_planes, base_planes),
        Traffic(2, "y", m * n * act, m * n * act),
    ]
    yield Phase(row_tiles * groups, moved, 2 * tile * n * (b0_passes * r + passes * s))


def backward(shape: Shape, blocks: int, dx: bool) -> Iterator[Phase]:
    """blocks: at once. Without dx where the fused product makes it."""
    m, k, n, r, s, act = shape.rows, shape.columns, shape.outputs, shape.rank, shape.sub_rank, shape.activation
    tile, width, tasks = tile_rows(shape), padded(r) + padded(s), shape.tasks
    row_tiles, output_tiles, chunk = ceil(m, tile), ceil(n, TILE), chunk_rows(shape)
    chunks = ceil(m, chunk)
    passes, runs = visits(row_tiles, tasks), visits(chunks, tasks)
    wide_tiles, outer_tiles, column_tiles = (
        ceil(width, WIDE if tile == MANY_ROWS else 256),
        ceil(width, WIDE),
        ceil(k, WIDE),
    )
    splits = shares(row_tiles * wide_tiles, blocks, 2 * STEP, n, 32)
    groups = shares(row_tiles, 2 * blocks, 1, ceil(k, TILE), 1 << 20)
    h, q, qz, seq = m * r * act, m * padded(r) * act, m * width * act, m * padded(s) * act
    planes, factors = splits * m * width * FLOAT, tasks * s * r * act
    da, db0 = chunks * r * k * FLOAT, chunks * n * r * FLOAT
    du, dv = runs * n * s * FLOAT, runs * s * r * FLOAT
    moved = [
        Traffic(0, "h", h, h),
        Traffic(0, "v", passes * s * r * act, factors),
        Traffic(0, "fqz, q", qz + q, qz + q),
        Traffic(0, "q", passes * min(m, tile) * padded(r) * act, 0),
    ]
    yield Phase(row_tiles + chunks, moved, 2 * passes * tile * r * s, ceil(min(m, tile) * padded(r), 4 * THREADS))
    moved = [
        Traffic(1, "dy", (wide_tiles * passes * min(m, tile) + outer_tiles * m) * n * act, m * n * act),
        Traffic(1, "b0", passes * n * r * act, n * r * act),
        Traffic(1, "u", passes * n * s * act, tasks * n * s * act),
        Traffic(1, "fqz", output_tiles * qz, qz),
        Traffic(1, "planes", planes, planes),
        Traffic(1, "db0_planes", db0, db0),
        Traffic(1, "du_planes", du, du),
    ]
    items = row_tiles * wide_tiles * splits + chunks * output_tiles * outer_tiles
    yield Phase(items, moved, 2 * (passes * tile + m) * n * width)
    moved = [
        Traffic(2, "planes", planes, planes),
        Traffic(2, "q", q, q),
        Traffic(2, "v", passes * s * r * act, factors),
        Traffic(2, "dh", q, q),
        Traffic(2, "seq", seq, seq),
    ]
    yield Phase(row_tiles, moved, 2 * passes * tile * r * s, ceil(min(m, tile) * width, THREADS) * splits)
    moved = [
        Traffic(3, "x", ceil(r, TILE) * m * k * act, m * k * act),
        Traffic(3, "dh", (column_tiles + dx * groups) * q, q),
        Traffic(3, "a", dx * row_tiles * r * k * act, dx * r * k * act),
        Traffic(3, "dx", dx * m * k * act, dx * m * k * act),
        Traffic(3, "da_planes", da, da),
        Traffic(3, "seq", seq, seq),
        Traffic(3, "q", q, q),
        Traffic(3, "dv_planes", dv, dv),
    ]
    items = dx * row_tiles * groups + chunks * (ceil(r, TILE) * column_tiles + tasks) + tasks
    yield Phase(items, moved, 2 * (row_tiles * tile * dx + m) * r * k + 2 * m * r * s)
    moved = [Traffic(4, "planes", sum((da, db0, du, dv)), sum((da, db0, du, dv)))]
    sizes = (r * k, 1), (n * r, 1), (n * s, tasks), (s * r, tasks)
    gradients = sum(size * count for size, count in sizes)
    moved += [Traffic(4, "gradients", gradients * act, gradients * act)]
    yield Phase(
        sum(ceil(size, SUM_BLOCK) * count for size, count in sizes), moved, loads=SUM_BLOCK // THREADS * ceil(chunks, 4)
    )
