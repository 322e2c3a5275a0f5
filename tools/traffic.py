"""How many bytes each job of the Triton kernels moves, tensor by tensor: the plan that tests hold the kernels to.

For rows that lie task by task, equally many of each; a tile with several tasks reads parameters once for each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

FLOAT = 4  # bytes of an element of a partial sum
SUM_BLOCK = 2048  # elements of a gradient that one item of add_partials adds up


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
    """Bytes that one phase or job asks for (`issued`) and distinct bytes among them (`unique`), of one tensor."""

    phase: int | str
    tensor: str
    issued: int
    unique: int


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def visits(parts: int, tasks: int) -> int:
    """How many pairs of a part and a task have rows, of rows cut into equal parts and into equal runs of tasks."""
    return parts + tasks - gcd(parts, tasks)


def items(job: str, shape: Shape, sizes: dict[str, int]) -> int:
    """How many work items a job has; sizes with CHUNK of a backward, and `shares` of expand."""
    m, n = shape.rows, shape.outputs
    chunks = ceil(m, sizes.get("CHUNK", m))
    if job == "shrink":
        return ceil(m, sizes["BLOCK_M"]) * sizes["SPLIT_K"]
    if job == "expand":
        return ceil(m, sizes["BLOCK_M"]) * ceil(n, sizes["BLOCK_N"] * sizes["TILES_N"]) * sizes["shares"]
    if job == "from_dy":
        marks = shape.tasks > 1
        return chunks * (sizes["CHUNK"] // sizes["BLOCK_M"] * sizes["SPLIT_N"] + ceil(n, sizes["BLOCK_N"]) + marks)
    if job == "from_x":
        return chunks * (ceil(shape.columns, sizes["BLOCK_K"]) + shape.tasks) + shape.tasks
    elements = shape.rank * shape.columns, n * shape.rank, n * shape.sub_rank, shape.sub_rank * shape.rank
    blocks = [ceil(each, SUM_BLOCK) for each in elements]
    return blocks[0] + blocks[1] + shape.tasks * (blocks[2] + blocks[3])


def flops(job: str, shape: Shape) -> int:
    """Of the products of one job."""
    m, k, n, r, s = shape.rows, shape.columns, shape.outputs, shape.rank, shape.sub_rank
    own = {
        "shrink": m * k * r + m * r * s,
        "expand": m * n * (r + s),
        "from_dy": m * n * (r + s) + m * n * r + m * r * s,
        "from_x": 2 * m * k * r + m * s * r,
        "add_partials": 0,
    }
    return 2 * own[job]


def shrink(shape: Shape, sizes: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    m, k, r, s, split = shape.rows, shape.columns, shape.rank, shape.sub_rank, sizes["SPLIT_K"]
    act, par, blocks = shape.activation, shape.parameter, ceil(shape.rows, sizes["BLOCK_M"])
    yield "x", m * k * act, m * k * act
    yield "a", blocks * r * k * par, r * k * par
    if split > 1:
        yield "partials", 2 * split * m * r * FLOAT, split * m * r * FLOAT
    yield "v", visits(blocks, shape.tasks) * s * r * par, shape.tasks * s * r * par
    yield "h", m * r * act, m * r * act
    yield "z", m * s * act, m * s * act


def expand(shape: Shape, sizes: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    m, n, r, s, tasks = shape.rows, shape.outputs, shape.rank, shape.sub_rank, shape.tasks
    act, par, blocks = shape.activation, shape.parameter, ceil(shape.rows, sizes["BLOCK_M"])
    groups, passes = ceil(n, sizes["BLOCK_N"] * sizes["TILES_N"]), visits(blocks, tasks)
    programs = min(passes, blocks * sizes["shares"])  # of a tile of outputs
    yield "h", groups * programs * m * r * act // blocks, m * r * act
    yield "z", groups * m * s * act, m * s * act
    yield "b0", (programs if sizes["TILES_N"] == 1 else passes) * n * r * par, n * r * par
    yield "u", passes * n * s * par, tasks * n * s * par
    yield "y", m * n * act, m * n * act


def from_dy(shape: Shape, sizes: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    m, n, r, s, tasks = shape.rows, shape.outputs, shape.rank, shape.sub_rank, shape.tasks
    act, par, split = shape.activation, shape.parameter, sizes["SPLIT_N"]
    chunks, tiles = ceil(m, sizes["CHUNK"]), ceil(n, sizes["BLOCK_N"])
    passes, runs = visits(ceil(m, sizes["BLOCK_M"]), tasks), visits(chunks, tasks)
    yield "dy", 2 * m * n * act, m * n * act
    yield "b0", passes * n * r * par, n * r * par
    yield "u", passes * n * s * par, tasks * n * s * par
    yield "db0", chunks * n * r * FLOAT, chunks * n * r * FLOAT
    yield "du", runs * n * s * FLOAT, runs * n * s * FLOAT
    if split > 1:
        yield "partials", 2 * split * m * (r + s) * FLOAT, split * m * (r + s) * FLOAT
    yield "h", (tiles + 1) * m * r * act, m * r * act
    yield "v", (tiles * runs + passes) * s * r * par, tasks * s * r * par
    yield "dh", m * r * act, m * r * act
    yield "scaled_q_u", m * s * act, m * s * act
    yield "dfusion_rows", m * FLOAT, m * FLOAT


def from_x(shape: Shape, sizes: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    m, k, r, s = shape.rows, shape.columns, shape.rank, shape.sub_rank
    act, par, chunks = shape.activation, shape.parameter, ceil(shape.rows, sizes["CHUNK"])
    runs = visits(chunks, shape.tasks)
    yield "x", m * k * act, m * k * act
    yield "dx", m * k * act, m * k * act
    yield "dh", ceil(k, sizes["BLOCK_K"]) * m * r * act, m * r * act
    yield "a", chunks * r * k * par, r * k * par
    yield "da", chunks * r * k * FLOAT, chunks * r * k * FLOAT
    yield "scaled_q_u", m * s * act, m * s * act
    yield "h", m * r * act, m * r * act
    yield "dv", runs * s * r * FLOAT, runs * s * r * FLOAT


def add_partials(shape: Shape, sizes: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    k, n, r, s, tasks = shape.columns, shape.outputs, shape.rank, shape.sub_rank, shape.tasks
    chunks = ceil(shape.rows, sizes["CHUNK"])
    runs = visits(chunks, tasks)
    for name, parts, count, size in (
        ("a", chunks, 1, r * k), ("b0", chunks, 1, n * r), ("u", runs, tasks, n * s), ("v", runs, tasks, s * r),
    ):  # fmt: skip
        yield f"d{name}", parts * size * FLOAT, parts * size * FLOAT
        yield name, count * size * shape.parameter, count * size * shape.parameter


def sizes(made, numbers: tuple) -> dict[str, int]:
    """What a launch of `triton_jobs` is made of, by name: its constants, and the numbers among its arguments."""
    names = made.kernel.arg_names[-len(numbers) - 1 : -1]
    return made["c"]._asdict() | dict(zip(names, numbers, strict=True))


JOBS = {function.__name__: function for function in (shrink, expand, from_dy, from_x, add_partials)}


def moved(job: str, shape: Shape, sizes: dict[str, int]) -> list[Traffic]:
    """With task factors and all gradients, without gate and bias. dy and x are each read once from memory; the second read of
    a chunk's dy finds it in the L2 cache. sizes: the kernel's, CHUNK of a backward, `shares` of expand."""
    return [Traffic(job, *each) for each in JOBS[job](shape, sizes)]
