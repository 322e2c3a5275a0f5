"""How many bytes each phase of the Triton kernels moves, tensor by tensor: the plan that tests hold the kernels to.

For rows that lie task by task with boundaries at tile edges; a tile with several tasks reads parameters once for each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

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


def forward(shape: Shape, config: dict[str, int]) -> Iterator[Traffic]:
    """A forward with task factors, without gate and bias."""
    m, k, n, r, s = shape.rows, shape.columns, shape.outputs, shape.rank, shape.sub_rank
    act, par = shape.activation, shape.parameter
    blocks, split = ceil(m, config["BLOCK_M"]), config["SPLIT_K"]
    groups = ceil(n, config["BLOCK_N"] * config["TILES_N"])
    h, z, planes = m * r * act, m * s * act, split * m * r * FLOAT
    yield Traffic(0, "x", m * k * act, m * k * act)
    yield Traffic(0, "a", blocks * r * k * par, r * k * par)
    finish = 0
    if split > 1:
        yield Traffic(0, "planes", planes, planes)
        yield Traffic(1, "planes", planes, planes)
        finish = 1
    yield Traffic(finish, "v", max(blocks, shape.tasks) * s * r * par, shape.tasks * s * r * par)
    yield Traffic(finish, "h", h, h)
    yield Traffic(finish, "z", z, z)
    yield Traffic(2, "h", groups * h, h)
    yield Traffic(2, "z", groups * z, z)
    yield Traffic(2, "b0", blocks * n * r * par, n * r * par)
    yield Traffic(2, "u", max(blocks, shape.tasks) * n * s * par, shape.tasks * n * s * par)
    yield Traffic(2, "y", m * n * act, m * n * act)


def backward(shape: Shape, config: dict[str, int]) -> Iterator[Traffic]:
    """A backward with all gradients, task factors, no gate. dy and x are each read once from memory; the second read
    of a chunk's dy finds it in the L2 cache."""
    m, k, n, r, s = shape.rows, shape.columns, shape.outputs, shape.rank, shape.sub_rank
    act, par, tasks = shape.activation, shape.parameter, shape.tasks
    blocks, split = ceil(m, config["BLOCK_M"]), config["SPLIT_N"]
    chunks = ceil(m, config["CHUNK"])
    runs = chunks + tasks - 1 if chunks < tasks else chunks  # (chunk, task) pairs with rows
    tiles_n, tiles_k = ceil(n, config["BLOCK_N"]), ceil(k, config["BLOCK_K"])
    dh, q_u, dfusion_rows = m * r * act, m * s * act, m * FLOAT
    planes = split * m * (r + s) * FLOAT
    yield Traffic(0, "dy", 2 * m * n * act, m * n * act)
    yield Traffic(0, "b0", blocks * n * r * par, n * r * par)
    yield Traffic(0, "u", max(blocks, tasks) * n * s * par, tasks * n * s * par)
    yield Traffic(0, "db0_planes", chunks * n * r * FLOAT, chunks * n * r * FLOAT)
    yield Traffic(0, "du_planes", runs * n * s * FLOAT, runs * n * s * FLOAT)
    finish, reads = 0, tiles_n
    if split > 1:
        yield Traffic(0, "planes", planes, planes)
        yield Traffic(1, "planes", planes, planes)
        finish = 1
    yield Traffic(0, "h", (reads + (finish == 0)) * dh, dh)
    if finish:
        yield Traffic(1, "h", dh, dh)
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
