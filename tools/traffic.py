"""How many bytes each phase of the Triton kernels moves, tensor by tensor: the plan that tests hold the kernels to.

For rows that lie task by task, equally many of each; a tile with several tasks reads parameters once for each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

FLOAT = 4  # bytes of an element of a plane


@dataclass(frozen=True)
class Shape:
    """One call: M rows in `tasks` runs, K to N through R and S; bytes per element of activations and parameters."""

    rows: int
    columns: int
    outputs: int
    rank: int
    sub_rank: int
    tasks: int = 1
    activation: int = 2
    parameter: int = 2


@dataclass(frozen=True)
class Traffic:
    """Bytes that one phase asks for (`issued`) and distinct bytes among them (`unique`), of one tensor."""

    phase: int
    tensor: str
    issued: int
    unique: int


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def visits(parts: int, tasks: int) -> int:
    """How many pairs of a part and a task have rows, of rows cut into equal parts and into equal runs of tasks."""
    return parts + tasks - gcd(parts, tasks)


def flops(direction: str, phase: int, shape: Shape, finish: int) -> int:
    """Of the products of one phase; `finish` is the phase that completes h or dh."""
    m, k, n, r, s = shape.rows, shape.columns, shape.outputs, shape.rank, shape.sub_rank
    parts = {
        "forward": {0: m * k * r, 2: m * n * (r + s)},
        "backward": {0: m * n * (r + s) + m * n * r, 2: 2 * m * k * r + m * s * r},
    }
    return 2 * (parts[direction].get(phase, 0) + (m * r * s if phase == finish else 0))


def forward(shape: Shape, config: dict[str, int]) -> Iterator[Traffic]:
    """A forward with task factors, without gate and bias."""
    m, k, n, r, s = shape.rows, shape.columns, shape.outputs, shape.rank, shape.sub_rank
    act, par = shape.activation, shape.parameter
    blocks, split = ceil(m, config["BLOCK_M"]), config["SPLIT_K"]
    passes = visits(blocks, shape.tasks)
    groups = ceil(n, config["BLOCK_N"] * config["TILES_N"])
    h, z, planes = m * r * act, m * s * act, split * m * r * FLOAT
    yield Traffic(0, "x", m * k * act, m * k * act)
    yield Traffic(0, "a", blocks * r * k * par, r * k * par)
    finish = 0
    if split > 1:
        yield Traffic(0, "planes", planes, planes)
        yield Traffic(1, "planes", planes, planes)
        finish = 1
    yield Traffic(finish, "v", passes * s * r * par, shape.tasks * s * r * par)
    yield Traffic(finish, "h", h, h)
    yield Traffic(finish, "z", z, z)
    yield Traffic(2, "h", groups * h, h)
    yield Traffic(2, "z", groups * z, z)
    yield Traffic(2, "b0", (blocks if config["TILES_N"] == 1 else passes) * n * r * par, n * r * par)
    yield Traffic(2, "u", passes * n * s * par, shape.tasks * n * s * par)
    yield Traffic(2, "y", m * n * act, m * n * act)


def backward(shape: Shape, config: dict[str, int]) -> Iterator[Traffic]:
    """A backward with all gradients, task factors, no gate. dy and x are each read once from memory; the second read
    of a chunk's dy finds it in the L2 cache."""
    m, k, n, r, s = shape.rows, shape.columns, shape.outputs, shape.rank, shape.sub_rank
    act, par, tasks = shape.activation, shape.parameter, shape.tasks
    blocks, split = ceil(m, config["BLOCK_M"]), config["SPLIT_N"]
    chunks = ceil(m, config["CHUNK"])
    passes, runs = visits(blocks, tasks), visits(chunks, tasks)
    tiles_n, tiles_k = ceil(n, config["BLOCK_N"]), ceil(k, config["BLOCK_K"])
    dh, q_u, dfusion_rows = m * r * act, m * s * act, m * FLOAT
    planes = split * m * (r + s) * FLOAT
    yield Traffic(0, "dy", 2 * m * n * act, m * n * act)
    yield Traffic(0, "b0", passes * n * r * par, n * r * par)
    yield Traffic(0, "u", passes * n * s * par, tasks * n * s * par)
    yield Traffic(0, "db0_planes", chunks * n * r * FLOAT, chunks * n * r * FLOAT)
    yield Traffic(0, "du_planes", runs * n * s * FLOAT, runs * n * s * FLOAT)
    finish, reads = 0, tiles_n
    if split > 1:
        yield Traffic(0, "planes", planes, planes)
        yield Traffic(1, "planes", planes, planes)
        finish = 1
    yield Traffic(0, "h", (reads + (finish == 0)) * dh, dh)
    factors = tasks * s * r * par
    yield Traffic(0, "v", (tiles_n * runs + (finish == 0) * passes) * s * r * par, factors)
    if finish:
        yield Traffic(1, "h", dh, dh)
        yield Traffic(1, "v", passes * s * r * par, factors)
    yield Traffic(finish, "dh", dh, dh)
    yield Traffic(finish, "scaled_q_u", q_u, q_u)
    yield Traffic(finish, "dfusion_rows", dfusion_rows, dfusion_rows)
    yield Traffic(2, "x", m * k * act, m * k * act)
    yield Traffic(2, "dx", m * k * act, m * k * act)
    yield Traffic(2, "dh", tiles_k * dh, dh)
    yield Traffic(2, "a", chunks * r * k * par, r * k * par)
    yield Traffic(2, "da_planes", chunks * r * k * FLOAT, chunks * r * k * FLOAT)
    yield Traffic(2, "scaled_q_u", q_u, q_u)
    yield Traffic(2, "h", dh, dh)
    yield Traffic(2, "dv_planes", runs * s * r * FLOAT, runs * s * r * FLOAT)
    yield Traffic(3, "db0_planes", chunks * n * r * FLOAT, chunks * n * r * FLOAT)
    yield Traffic(3, "du_planes", runs * n * s * FLOAT, runs * n * s * FLOAT)
    yield Traffic(3, "db0", n * r * par, n * r * par)
    yield Traffic(3, "du", tasks * n * s * par, tasks * n * s * par)
    yield Traffic(3, "da_planes", chunks * r * k * FLOAT, chunks * r * k * FLOAT)
    yield Traffic(3, "dv_planes", runs * s * r * FLOAT, runs * s * r * FLOAT)
    yield Traffic(3, "da", r * k * par, r * k * par)
    yield Traffic(3, "dv", tasks * s * r * par, tasks * s * r * par)
