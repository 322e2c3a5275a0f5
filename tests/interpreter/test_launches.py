"""What a call of the Triton kernels costs, counted instead of timed: launches, memory, bytes, waits of the host.

Every figure is a ceiling or exact. Lower it when a change does better; raise it only with a reason.
"""

from contextlib import nullcontext

import pytest
import torch
from support.cases import NAMES, SCALING, adapter, base, make, options
from support.counting import Operations
from support.counting_bytes import Counter as Bytes
from support.pair_cases import adapters
from torch import nn
from triton.runtime.interpreter import GridExecutor

import lilora_kernels
from lilora_kernels import LiLoRALinear, functional
from lilora_kernels.ops.delta import task_rows, triton_backend, triton_configs
from lilora_kernels.ops.linear import triton_backend as linear_backend
from lilora_kernels.ops.schema import AdapterArgs

TILES = {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_N": 32, "TILES_N": 1, "CHUNK": 64}
CONFIGS = {"split": {**TILES, "SPLIT_K": 2, "SPLIT_N": 2}, "whole": {**TILES, "SPLIT_K": 1, "SPLIT_N": 1}}


@pytest.fixture(autouse=True)
def _triton():
    with lilora_kernels.backend("triton"):
        yield


@pytest.fixture
def pinned(monkeypatch):
    """Pins the launch configuration: with "split" h and dh come from partial sums."""

    def pin(name):
        configuration = triton_configs.Configuration(CONFIGS[name])
        monkeypatch.setattr(triton_configs, "configuration", lambda *_: configuration)

    return pin


@pytest.fixture
def work(monkeypatch):
    """work(): Operations that count kernels too; from here on these are not run."""
    current = []

    def record(kernel, *args, **kwargs):
        if current:
            current[-1].seen[kernel.fn.__name__] += 1

    def start():
        current.append(Operations())
        return current[-1]

    monkeypatch.setattr(GridExecutor, "__call__", record)
    return start


# --- launches of the operations ---------------------------------------------------------------------------------------


def both(work, call, *inputs):
    """What a forward runs, and a backward to all inputs."""
    leaves = {t for i in inputs for t in vars(i).values() if t is not None and t.requires_grad}
    with work() as forward:
        y = call()
    y = y if isinstance(y, tuple) else (y,)
    dy = [torch.randn_like(t) for t in y]
    with work() as backward:
        torch.autograd.grad(y, list(leaves), dy)
    return forward.seen, backward.seen


def laid_out(i):
    """With its rows' layout kept, as those of a layer's context."""
    i.task.layouts = [task_rows.layout(i.task, len(i.u), i.task.device)]
    return i


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("gate, p", [(False, 0.0), (True, 0.1)])
@pytest.mark.parametrize("rows", [1, 255])
def test_delta_is_one_launch_each_way(tasks, gate, p, rows, work):
    """And nothing beside it: no copy, no cast, nothing that makes the host wait for the device."""
    i = make(rows, tasks=tasks, mix="one" if tasks == 1 else "random", gate=gate, dtype=torch.float16).leaves()
    more = options(i, p=p, seed=torch.tensor([1]) if p else None)
    forward, backward = both(work, lambda: functional.delta(*adapter(i), **more), i)
    assert forward == {"delta_forward": 1}
    assert backward == {"delta_backward": 1}


@pytest.mark.parametrize(
    "rows, name, forced, launches",
    [
        (255, "split", None, (1, 1)),
        (255, "whole", None, (1, 1)),
        (255, "split", "by_phase", (2, 3)),  # one for each job
        (256, "whole", None, (2, 3)),  # few rows of each task
        (256, "split", "one_launch", (1, 1)),
    ],
)
def test_launches_of_linear(rows, name, forced, launches, pinned, work):
    pinned(name)
    i = make(rows, columns=128, outputs=96, rank=16, sub_rank=8, tasks=16, gate=True, dtype=torch.float16).leaves()
    laid_out(i)
    more = options(i, p=0.1, seed=torch.tensor([1]))
    frozen = base(i)
    with lilora_kernels.plan(forced) if forced else nullcontext():
        forward, backward = both(work, lambda: functional.linear(i.x, *frozen, *adapter(i)[1:], **more), i)
        alone = both(work, lambda: functional.delta(*adapter(i), **more), i)
    jobs = (["shrink", "expand"], ["from_dy", "from_x", "add_partials"])
    want = (["delta_forward"], ["delta_backward"]) if launches == (1, 1) else jobs
    assert forward == {**dict.fromkeys(want[0], 1), "addmm_": 1}  # the base on top of the adapter
    assert backward == {**dict.fromkeys(want[1], 1), "addmm_": 1}
    if forced:
        assert [each.total() for each in alone] == list(launches)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("tasks", [1, 3])
def test_launches_of_many_rows_of_few_tasks(tasks, p, pinned, work):
    """A product each of x, y and dy with what the tasks' factors make, for all tasks at once; the passes over x with dropout."""
    pinned("whole")
    i = make(384, 128, 96, 16, 8, tasks, mix="sorted", dtype=torch.float16)
    i = laid_out(i.with_(task=(torch.arange(384) * tasks // 384).to(torch.int32)).leaves())
    frozen, more = base(i), options(i, p=p, seed=torch.tensor([1]) if p else None)
    forward, backward = both(work, lambda: functional.linear(i.x, *frozen, *adapter(i)[1:], **more), i)
    product = "addmm" if tasks == 1 else "baddbmm"
    x_once = {"shrink": 1} if p else {"matmul": 1}
    assert forward == {**x_once, "compose": 1, product: 1, "addmm_": 1}
    x_again = {"from_x": 1, "add_partials": 1} if p else {"matmul": 2}
    kernels = dict.fromkeys(("compose", "u_gradient", "v_gradient_partials", "sum_gradients"), 1)
    dm = "mm" if tasks == 1 else "bmm"
    assert backward == {**x_again, **kernels, product: 1, dm: 1, "to": 2, "addmm_": 1}


@pytest.mark.parametrize("name", CONFIGS)
def test_launches_of_delta_pair(name, pinned, work):
    """One reads x in forward, and one in backward; the other from_x has sums over rows."""
    pinned(name)
    one, two = (make(70, 128, outputs, 16, 8, dtype=torch.float16).leaves() for outputs in (80, 96))
    two.x, bases = one.x, (base(one), base(two))
    more = {"bases": bases, "task": one.task, "p": 0.1, "seed": torch.tensor([1])}
    pair = adapters(one), adapters(two)
    forward, backward = both(work, lambda: functional.delta_pair(one.x, *pair, **more), one, two)
    assert forward == {"shrink": 1, "expand": 2, "addmm_": 2}
    assert backward == {"from_dy": 2, "from_x": 2, "add_partials": 2, "addmm_": 2}


# --- launches of a layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tasks, dropout, train, forward, backward",
    [
        (1, 0.0, False, {}, {}),
        (1, 0.05, True, {"randint": 1}, {}),  # the seed
        # ids of samples to ids of rows; U, V and fusion of the tasks of the batch, and in training of those that train
        (3, 0.0, False, {"clone": 1, "stack": 3}, {}),
        (3, 0.05, True, {"clone": 1, "randint": 1, "stack": 3}, {}),
    ],
)
def test_launches_of_a_layer(tasks, dropout, train, forward, backward, work):
    """The adapter's, the base's, and what is listed."""
    layer = LiLoRALinear(nn.Linear(64, 48).requires_grad_(False), r=16, sub_rank=8, dropout=dropout).train(train)
    for i in range(tasks):
        layer.add_task(f"task{i}")
    layer.set_task(*layer.tasks, train=train)
    x = torch.randn(3, 5, 64, requires_grad=train)
    task = None if tasks == 1 else torch.tensor([2, -1, 0], dtype=torch.int32)
    layer(x, task=task)
    with work() as up:
        y = layer(x, task=task)
    assert up.seen == {"delta_forward": 1, "addmm_": 1} | forward
    if train:
        dy = torch.randn_like(y)
        with work() as down:
            y.backward(dy)
        assert down.seen == {"delta_backward": 1, "addmm_": 1} | backward


# --- memory -----------------------------------------------------------------------------------------------------------

HIDDEN, INNER, RANK, SUB_RANK = 4096, 11008, 128, 64  # gate_proj of LLaVA-1.5-7B
MIB = 1 << 20


@pytest.mark.parametrize(
    "rows, tasks, forward, backward",
    [
        (8, 8, 0.1, 29.3),  # 16 partials of h; sums in fp32: da 2, db0 5.4, du 21.5
        (
            8192,
            1,
            1,
            55.5,
        ),  # z; dh 2, Q 1, partials of both 12, and for each of four chunks of rows da 2, db0 5.4, du 2.7
        (8192, 8, 1, 131.6),  # du of eight tasks: 21.5 a chunk
        (8192, 64, 1, 196.5),  # du of 64 tasks, 172, leaves room for one chunk
    ],
)
def test_memory_beyond_the_results(rows, tasks, forward, backward, work):
    """In MiB, for bf16 and the configurations for any GPU; y has 172 at 8192 rows."""
    like = torch.empty(0, dtype=torch.bfloat16, device="meta")
    a, b0 = like.new_empty(RANK, HIDDEN), like.new_empty(INNER, RANK)
    u, v = like.new_empty(tasks, INNER, SUB_RANK), like.new_empty(tasks, SUB_RANK, RANK)
    task = like.new_empty(rows, dtype=torch.int32)
    args = AdapterArgs(a, b0, u, v, like.new_empty(tasks), task, None, None, None, 2.0, 0.0, None)
    x, weight, dy = like.new_empty(rows, HIDDEN), like.new_empty(INNER, HIDDEN), like.new_empty(rows, INNER)
    with work() as up:
        y, h = linear_backend.forward(x, weight, None, args)
    with work() as down:
        grads = linear_backend.backward(dy, x, weight, h, args, frozenset(NAMES) - {"gate"})
    for found, results, limit in ((up, (y, h), forward), (down, grads.values(), backward)):
        assert found.bytes - sum(result.nbytes for result in results) <= limit * MIB
        kernels = {"delta_forward", "delta_backward", "shrink", "expand", "from_dy", "from_x", "add_partials"}
        assert set(found.seen) <= kernels | {"addmm_"}  # nothing that allocates unseen


# --- bytes of each job ------------------------------------------------------------------------------------------------


# For each job: bytes that it asks for, distinct bytes, and passes over the rows' ids (or another number a row), given the
# number of tiles of rows and the bytes of each tensor, of u and v those of one task. Rows lie task by task and no tile has
# two tasks: of a forward only the distinct bytes grow with the tasks, by their parameters.


def forward_jobs(tiles, tasks, x, y, h, z, a, b0, u, v):
    # x once, a for each tile; two partial sums of h, written and read; h and z
    yield "shrink", x + tiles * a + 4 * 2 * h + tiles * v + h + z, x + a + 2 * 2 * h + tasks * v + h + z, 1
    programs = max(1, tasks // 4)  # that share a tile's tasks: h for each where it has any
    shared = tiles * b0 + 2 * h
    assert programs <= 2
    yield (
        "expand",
        shared + 2 * z + tiles * u + y,
        h + z + b0 + tasks * u + y,
        2 * programs,
    )  # for each of two tiles of outputs


def backward_jobs(tiles, tasks, x, y, h, z, a, b0, u, v):
    chunks = tiles // 2
    runs = max(chunks, tasks)  # pairs of a chunk and a task that has rows in it: each has sums of its own
    partials = 2 * (h + z)
    ups, downs = chunks * b0 + runs * u, chunks * a + runs * v
    yield (  # dy for dh, and again for the sums of db0 and du, which read h and v for each of two tiles of outputs
        "from_dy",
        2 * y + tiles * (b0 + u) + 2 * partials + tiles * v + 2 * h + z + 2 * (h + runs * v) + ups,
        y + b0 + tasks * u + partials + 2 * h + z + tasks * v + ups,
        9 + 6 * runs // chunks,
    )
    yield (  # x and dx once, dh for each of three tiles of columns, a for each chunk; Q and h for the sums of dv
        "from_x",
        2 * x + 3 * h + chunks * a + z + h + downs,
        2 * x + h + a + z + h + downs,
        2 + 2 * tasks,
    )
    yield "add_partials", *(ups + downs + a + b0 + tasks * (u + v),) * 2, 0  # the sums again; the gradients


@pytest.mark.parametrize(
    "direction, tiles, tasks", [("forward", 8, 1), ("forward", 8, 8), ("backward", 4, 1), ("backward", 4, 4)]
)
def test_bytes_of_each_job(direction, tiles, tasks, pinned, monkeypatch):
    pinned("split")
    rows = 32 * tiles
    i = make(rows, columns=96, outputs=64, rank=32, sub_rank=16, tasks=tasks, dtype=torch.float32)
    task = (torch.arange(rows) * tasks // rows).to(torch.int32)
    args = AdapterArgs(i.a, i.b0, i.u, i.v, i.fusion, task, None, None, None, SCALING, 0.0, None)
    dy, h = torch.randn(rows, 64), torch.randn(rows, 32)
    counter, found = Bytes(monkeypatch), {}

    def see(job):
        small = {"task", "dfusion_rows", "fusion", "dfusion", "present"} & set(counter.lanes)
        issued, unique = zip(*(counter.bytes(name) for name in set(counter.lanes) - small), strict=True)
        found[job] = sum(issued), sum(unique), sum(counter.bytes(name)[0] for name in small) // task.nbytes

    counter.watch(monkeypatch, see)
    with lilora_kernels.plan("by_phase"):
        if direction == "forward":
            triton_backend.forward(i.x, args)
        else:
            triton_backend.backward(dy, i.x, h, args, frozenset(NAMES) - {"gate"})
    tensors = (i.x, dy, h, h[:, :16], i.a, i.b0, i.u[0], i.v[0])
    jobs = {"forward": forward_jobs, "backward": backward_jobs}[direction]
    for job, *most in jobs(tiles, tasks, *(t.numel() * t.element_size() for t in tensors)):
        assert all(g <= m for g, m in zip(found.pop(job), most, strict=True)), (job, most)
    assert not found
