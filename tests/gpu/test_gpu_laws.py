"""What holds for every call on a GPU: determinism, no reads of unwritten memory, no waiting for the device, memory."""

import pytest
import torch
from support.cases import adapter, options
from support.gpu_cases import IDS, assert_equal, base_on_gpu, leaves, make_on_gpu, ours, run_all, seed_tensor

import lilora_kernels
from lilora_kernels import functional
from lilora_kernels.ops.schema import AdapterArgs


@pytest.mark.parametrize("op, rows", [("delta", 200), ("delta", 3000), ("linear", 64), ("linear", 3000)])
def test_two_runs_are_equal_bit_for_bit(op, rows):
    i = make_on_gpu(rows, 256, 384, 128, 64, 8, gate=True, dtype=torch.bfloat16)
    seed = seed_tensor(3)
    first = run_all(op, i, 0.1, seed)
    for _ in range(20):
        assert_equal(run_all(op, i, 0.1, seed), first)


@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize("rows", [100, 1000, 3000])
def test_a_row_is_the_same_alone_and_in_any_batch(rows, one_launch, kernels):
    """With one configuration: in another order, and in batches of fewer rows, one row in the smallest bucket."""
    i = make_on_gpu(rows, 256, 384, 128, 64, 8, dtype=torch.bfloat16)

    def run(at):
        args = AdapterArgs(*adapter(i)[1:], i.task[at].contiguous(), None, None, None, 0.7, 0.0, None)
        return kernels.run_forward(i.x[at].contiguous(), None, args, one_launch)[0]

    together = run(torch.arange(rows, device="cuda"))
    order = torch.randperm(rows, device="cuda")
    assert torch.equal(run(order), together[order])
    starts = {100: (0, 33, 35, 99), 1000: (0, 40), 3000: (0, 40)}[rows]
    for start in starts:
        at = torch.arange(start, min(start + {100: 65}.get(rows, rows - 40), rows), device="cuda")
        assert torch.equal(run(at), together[at])


@pytest.fixture
def poisoned():
    """Torch fills the memory that it allocates with NaN and huge integers."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op, name", [("delta", None), ("linear", None), ("linear", "by_phase")])
def test_uninitialised_memory_is_never_read(op, name, plan, poisoned):
    if name:
        plan(name)
    for rows in (0, 3, 90, 700, 3000):
        for mix in IDS:
            i = make_on_gpu(rows, 136, 72, 16, 8, 3, mix=mix, gate=True, dtype=torch.bfloat16)
            for result in run_all(op, i, 0.2, seed_tensor(2)):
                assert result.isfinite().all(), (rows, mix)


@pytest.mark.parametrize("op", ["delta", "linear"])
def test_one_task_equals_no_task_ids(op):
    i = make_on_gpu(300, 256, 384, 128, 64, mix="one", dtype=torch.bfloat16)
    without = run_all(op, i)
    i.task = torch.zeros(300, dtype=torch.int32, device="cuda")
    for got, want in zip(run_all(op, i), without, strict=True):
        assert (got - want).abs().max() <= 2**-8 * want.abs().max()


@pytest.mark.parametrize("rows", [64, 1000])
def test_nothing_waits_for_the_device(rows):
    i = make_on_gpu(rows, 256, 384, 128, 64, 8, dtype=torch.bfloat16)
    copies, wanted = leaves([i], ("x", "a", "b0", "u", "v", "fusion"))
    bases = [base_on_gpu(i)]

    def step():
        seed = functional.draw_seed(i.x.device)
        for op in ("delta", "linear"):
            (y,) = ours(op, copies, bases, 0.05, seed)
            torch.autograd.grad(y, list(wanted.values()), y.detach())

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- torch.compile, threads, memory, the layer -----------------------------------------------------------------------


def test_compiled_with_inductor():
    torch.compiler.reset()
    i = make_on_gpu(300, 128, 192, 16, 8, 3, dtype=torch.bfloat16)
    weight, bias = base_on_gpu(i)

    def run(x, *factors):
        h = torch.nn.functional.silu(x)
        y = functional.linear(h, weight, bias, *factors, task=i.task, p=0.1, seed=seed)
        return y + functional.delta(h, *factors, **options(i))

    seed = seed_tensor(6)
    copy = i.leaves()
    compiled = torch.compile(run, fullgraph=True)
    dy = torch.randn(300, 192, device="cuda").bfloat16()
    for function in (compiled, run):
        y = function(*adapter(copy))
        got = [y.detach(), *torch.autograd.grad(y, list(adapter(copy)), dy)]
        if function is compiled:
            first = got
    for ours_, want in zip(first, got, strict=True):
        assert (ours_ - want).abs().max() <= 2e-2 * want.abs().max()


def test_an_ordered_backend_also_runs_backward(kernels, monkeypatch):
    """Backward on a GPU runs in a thread of autograd."""

    def refuse(*_):
        raise AssertionError("the kernels ran")

    for name in ("forward", "backward"):
        monkeypatch.setattr(kernels, name, refuse)
    with lilora_kernels.backend("eager"):
        i = make_on_gpu(20, 24, 20, 8, 4, dtype=torch.float32).leaves()
        functional.delta(*adapter(i), **options(i)).sum().backward()
    assert i.a.grad is not None


def test_memory_of_forward_and_backward():
    """In MiB beyond what comes out: far from another [M, N] or [M, K] tensor."""
    rows, columns, outputs = 8192, 4096, 11008
    i = make_on_gpu(rows, columns, outputs, 128, 64, mix="one", dtype=torch.bfloat16).leaves()
    weight, _ = base_on_gpu(i)
    seed, parameters = seed_tensor(8), list(adapter(i))
    dy = torch.randn(rows, outputs, device="cuda").bfloat16()

    def forward():
        return functional.linear(i.x, weight, None, *adapter(i)[1:], p=0.05, seed=seed)

    def measured(function):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        used = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        return result, *(size / 2**20 for size in used)

    torch.autograd.grad(forward(), parameters, dy)  # compiles, and takes cuBLAS's workspace
    y, peak, kept = measured(forward)
    out = y.nbytes / 2**20
    assert kept <= out + 2.1, "more than h is saved for backward"
    assert peak <= out + 16
    grads, peak, _ = measured(lambda: torch.autograd.grad(y, parameters, dy))
    out = sum(grad.nbytes for grad in grads) / 2**20
    assert peak <= out + 0.6 * dy.nbytes / 2**20
