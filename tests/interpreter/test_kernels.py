"""The Triton kernels in the interpreter: every output and gradient against the fp64 oracle, and what a launch does."""

import itertools
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import (
    NAMES,
    SCALING,
    Errors,
    adapter,
    add_errors,
    base,
    case_id,
    gradients,
    make,
    options,
    oracle,
    pairwise,
)
from support.counting_bytes import Counter
from support.kernel_cases import ANY_DROPOUT, ANY_SHAPE, AXES, SUBSETS
from torch.utils._python_dispatch import TorchDispatchMode

import lilora_kernels
from lilora_kernels import LiLoRALinear, functional
from lilora_kernels.ops import barrier, triton_runtime
from lilora_kernels.ops.delta import reference, task_rows, triton_backend, triton_configs, triton_jobs, triton_parts
from lilora_kernels.ops.delta.triton_rows import Dropout, dropout_mask
from lilora_kernels.ops.philox import keep_mask, keep_scale, philox, threshold
from lilora_kernels.ops.schema import AdapterArgs
from tools import traffic

SPLIT = {
    "forward": {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_N": 32, "SPLIT_K": 3, "TILES_N": 1},
    "backward": {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_N": 32, "SPLIT_N": 2, "CHUNK": 64},
}
WHOLE = {
    "forward": {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_N": 32, "SPLIT_K": 1, "TILES_N": 2},
    "backward": {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_N": 32, "SPLIT_N": 1, "CHUNK": 256},
}
CONFIGS = {"split": SPLIT, "whole": WHOLE}
FORWARD = "delta_forward", "shrink", "expand"
DTYPES = {"one_launch": torch.float32, "composed": torch.float16}  # in which a plan has kernels of its own


def pin_configurations(monkeypatch, sizes):
    def configuration(kernel, *_, **__):
        return triton_configs.Configuration(sizes["forward" if kernel in FORWARD else "backward"])

    monkeypatch.setattr(triton_configs, "configuration", configuration)


@pytest.fixture(autouse=True)
def _triton():
    with lilora_kernels.backend("triton"):
        yield


@pytest.fixture
def pinned(monkeypatch):
    """Pins the launch configuration, and forces the plan; composed by way of M_t however few rows a task has."""
    with ExitStack() as stack:

        def pin(sizes, plan="one_launch"):
            pin_configurations(monkeypatch, sizes)
            parts = triton_parts.TRITON._replace(forms_m=lambda rows, layout, adapter: True)
            monkeypatch.setattr(triton_backend, "TRITON", parts)
            stack.enter_context(lilora_kernels.plan(plan))

        yield pin


CASES = AXES | {
    "dtype": [torch.float32, torch.float16],
    "op": ["delta", "linear"],
    "plan": ["one_launch", "by_phase", "composed"],
    "config": list(CONFIGS),
}
OTHERS = ("op", "plan", "config", "p", "wanted")


@pytest.mark.parametrize("case", pairwise(CASES), ids=case_id)
def test_outputs_and_gradients_are_as_good_as_the_eager_formula(case, pinned):
    pinned(CONFIGS[case["config"]], case["plan"])
    shape = {name: value for name, value in case.items() if name not in OTHERS}
    errors = Errors()
    for seed in range(2):
        i, stream = make(**shape, seed=seed), torch.tensor([0x1234_5678_9ABC_DEF + seed])
        add_errors(errors, i, case["op"], SUBSETS[case["wanted"]], case["p"], stream)
    errors.check()


@settings(max_examples=14, deadline=None, derandomize=True)
@given(shape=st.fixed_dictionaries(ANY_SHAPE), name=st.sampled_from(list(CONFIGS)), **ANY_DROPOUT)
def test_any_shape(shape, name, p, seed):
    errors = Errors()
    i = make(**shape, dtype=torch.float32, seed=seed % 1000)
    with pytest.MonkeyPatch.context() as patch:
        pin_configurations(patch, CONFIGS[name])
        add_errors(errors, i, "delta", NAMES, p, torch.tensor([seed]))
    errors.check()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_sixty_four_rows_of_as_many_tasks(name, pinned):
    pinned(CONFIGS[name])
    errors = Errors()
    add_errors(errors, make(64, 64, 48, 16, 8, 64, mix="distinct", dtype=torch.float32), "linear")
    errors.check()


@pytest.mark.parametrize("names", [(), ("sm_90",)], ids=["any", "sm_90"])
@pytest.mark.parametrize("plan", ["one_launch", "by_phase"])
@pytest.mark.parametrize("rows", [*triton_configs.ROWS, triton_configs.MANY])
def test_every_configuration_is_right(rows, plan, names, pinned, monkeypatch):
    pinned(SPLIT, plan)
    monkeypatch.setattr(
        triton_configs,
        "configuration",
        lambda kernel, *_: triton_configs.Configuration(triton_configs.chosen(names, kernel, rows)),
    )
    errors = Errors()
    add_errors(errors, make(150, 160, 100, 20, 17, 3, dtype=torch.float16, mix="sorted"), "linear")
    errors.check()


# --- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 7, -(2**63)])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_forward_and_backward_draw_the_mask_of_the_reference(seed, p, name, pinned):
    """With identities for a and b0, y and dx are the mask itself, and so is da for one-hot rows of dy."""
    pinned(CONFIGS[name])
    rows, columns = 70, 44
    seed = torch.tensor([seed])
    eye = torch.eye(columns)
    x = torch.ones(rows, columns, requires_grad=True)
    a = eye.clone().requires_grad_()
    mask = keep_mask(seed, rows, columns, p) * keep_scale(p)
    y = functional.delta(x, a, eye, p=p, seed=seed)
    assert torch.equal(y, mask.float())
    dx, da = torch.autograd.grad(y, (x, a), torch.eye(rows, columns).flip(1) * 2 + 1)
    dh = torch.eye(rows, columns).flip(1) * 2 + 1
    assert torch.equal(dx, dh * mask.float())
    torch.testing.assert_close(da, dh.T @ mask.float())


@triton.jit
def draw_mask(seed, out, row, first, threshold):
    m, k = tl.arange(0, 16), tl.arange(0, 32)
    keep = dropout_mask(Dropout(seed, threshold, 1.0), row.to(tl.int64), m, first, 32)
    tl.store(out + m[:, None] * 32 + k[None, :], keep.to(tl.int32))


def test_the_mask_of_rows_beyond_32_bits():
    seed, row, first, p = torch.tensor([0x0123_4567_89AB_CDEF]), 5 * 2**32 + 3, 4096, 0.4
    out = torch.empty(16, 32, dtype=torch.int32)
    draw_mask[(1,)](seed, out, row, first, threshold(p))
    rows = (row + torch.arange(16)).unsqueeze(1)
    blocks = (first // 8 + torch.arange(4)).unsqueeze(0)
    key = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    words = philox((rows & 0xFFFFFFFF, rows >> 32, blocks, torch.zeros_like(blocks)), key)
    draws = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1).reshape(16, 32)
    assert torch.equal(out.bool(), draws >= threshold(p))


# --- what a launch does --------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """The names of all torch operations, and those of all kernel launches."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.operations, self.launches = [], []
        monkeypatch.setattr(triton_jobs, "run", lambda made, *_: self.launches.append(made.kernel.__name__))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.operations.append(operation.__name__)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_delta_is_one_launch_forward_and_one_launch_backward(name, pinned, monkeypatch):
    pinned(CONFIGS[name])
    i = make(rows=130, columns=128, outputs=96, rank=16, sub_rank=8, gate=True, dtype=torch.float16)
    args = AdapterArgs(i.a, i.b0, i.u, i.v, i.fusion, i.task, i.gate, i.gate_row, torch.tensor([1]), SCALING, 0.1, None)
    dy, h = torch.randn(130, 96).half(), torch.randn(130, 16).half()
    with Recorder(monkeypatch) as seen:
        triton_backend.forward(i.x, args)
        triton_backend.backward(dy, i.x, h, args, frozenset(NAMES))
    assert seen.launches == ["delta_forward", "delta_backward"]
    allowed = {"new_empty.default", "empty_like.default", "empty.memory_format", "split_with_sizes.default"}
    assert set(seen.operations) <= allowed, set(seen.operations) - allowed


def test_gradients_nobody_asked_for_take_no_memory(pinned, monkeypatch):
    pinned(WHOLE)
    i = make(rows=130, columns=128, outputs=96, rank=16, sub_rank=8, dtype=torch.float16)
    args = AdapterArgs(i.a, i.b0, i.u, i.v, i.fusion, i.task, None, None, None, SCALING, 0.0, None)
    dy, h = torch.randn(130, 96).half(), torch.randn(130, 16).half()
    parts, scratch = [], triton_jobs.scratch

    def counted(like, *sizes):
        parts[:] = [size for size in sizes if size is not None]
        return scratch(like, *sizes)

    monkeypatch.setattr(triton_jobs, "scratch", counted)
    expected = {("x",): 2, ("b0",): 2, ("u",): 3, ("x", "u", "v", "fusion"): 4 + 6}
    for needs, tensors in expected.items():  # the gradients and what they are summed from
        with Recorder(monkeypatch) as seen:
            triton_backend.backward(dy, i.x, h, args, frozenset(needs))
        # An allocation and its split are as many tensors as it has parts.
        assert len(seen.operations) + len(parts) - 2 * bool(parts) == tensors, needs


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("tasks", [1, 4, 16])
def test_bytes_moved_are_those_of_the_plan(name, direction, tasks, pinned, monkeypatch):
    """Counted at the kernels' own loads and stores: a second pass over any tensor would show."""
    pinned(CONFIGS[name], "by_phase")
    sizes = CONFIGS[name][direction]
    rows, columns, outputs, rank, sub_rank = 256, 192, 128, 16, 16
    i = make(rows, columns, outputs, rank, sub_rank, tasks, dtype=torch.float32)
    task = (torch.arange(rows) * tasks // rows).to(torch.int32) if tasks > 1 else None
    args = AdapterArgs(i.a, i.b0, i.u, i.v, i.fusion, task, None, None, None, SCALING, 0.0, None)
    dy, h = torch.randn(rows, outputs), torch.randn(rows, rank)
    counter = Counter(monkeypatch)
    seen = {}
    counter.watch(monkeypatch, lambda job: seen.update({(job, t): counter.bytes(t) for t in counter.lanes}))
    if direction == "forward":
        triton_backend.forward(i.x, args)
    else:
        triton_backend.backward(dy, i.x, h, args, frozenset(NAMES) - {"gate"})
    jobs = ("shrink", "expand") if direction == "forward" else ("from_dy", "from_x", "add_partials")
    sizes = sizes | {"shares": max(1, min(tasks, sizes["BLOCK_M"]) // 4)}
    shape = traffic.Shape(rows, columns, outputs, rank, sub_rank, tasks, 4, 4)
    planned = [each for job in jobs for each in traffic.moved(job, shape, sizes)]
    for item in planned:
        issued, unique = seen.pop((item.phase, item.tensor))
        assert abs(issued - item.issued) <= 0.1 * item.issued, (item, issued)
        assert abs(unique - item.unique) <= 0.1 * item.unique, (item, unique)
    total = sum(item.issued for item in planned)
    small = {"task", "fusion", "present", "dfusion", "dfusion_rows"}  # ids and scalars
    assert {argument for _, argument in seen} <= small
    if tasks == 16:  # with many tasks their ids are looked at again and again, from the first cache
        seen = {key: moved for key, moved in seen.items() if key[1] != "task"}
    assert sum(issued for issued, _ in seen.values()) <= 0.1 * total


# --- laws ----------------------------------------------------------------------------------------------------------


def run_all(i, p=0.0, op="delta"):
    weight, bias = base(i)
    more = options(i, p=p, seed=torch.tensor([3]) if p else None)
    y = (
        functional.delta(*adapter(i), **more)
        if op == "delta"
        else functional.linear(i.x, weight, bias, *adapter(i)[1:], **more)
    )
    dy = torch.cos(torch.arange(y.numel())).view_as(y).to(y.dtype)
    return [y, *gradients(y, i, NAMES, dy).values()]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_two_runs_are_equal_bit_for_bit_whatever_the_number_of_programs(name, pinned):
    """linear runs three programs a phase, delta one for all: the order of the sums must not depend on it."""
    i = make(rows=70, columns=64, outputs=48, rank=16, gate=True, dtype=torch.float32).leaves()
    results = []
    for one_launch in (True, True, False):
        pinned(CONFIGS[name], "one_launch" if one_launch else "by_phase")
        results.append(run_all(i, p=0.1, op="linear"))
    for tensors in zip(*results, strict=True):
        assert torch.equal(tensors[0], tensors[1])
        assert torch.equal(tensors[0], tensors[2])


@pytest.mark.parametrize("name", [*CONFIGS, "own"])
@pytest.mark.parametrize("coefficients", AXES["coefficients"])
def test_a_row_is_the_same_alone_and_in_any_batch(name, coefficients, pinned, monkeypatch):
    """Up to 255 rows with the configurations of the kernels' own too."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(builder, a, b, c, *_):
        # The interpreter's product is BLAS's, whose rounding depends on where a row lies; this one's does not.
        products = a.data[:, :, None].astype(np.float32) * b.data[None].astype(np.float32)
        return TensorHandle(products.sum(1, dtype=np.float32) + c.data, c.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    if name != "own":
        pinned(CONFIGS[name])
    i = make(rows=70, columns=128, tasks=4, coefficients=coefficients, dtype=torch.float32)
    together = functional.delta(*adapter(i), **options(i))
    order = torch.randperm(70)
    shuffled = functional.delta(i.x[order], *adapter(i)[1:], **options(i, task=i.task[order]))
    assert torch.equal(shuffled, together[order])
    for row in (0, 31, 69):
        alone = functional.delta(i.x[row : row + 1], *adapter(i)[1:], task=i.task[row : row + 1], scaling=SCALING)
        assert torch.equal(alone, together[row : row + 1])


@pytest.mark.parametrize("plan", ["one_launch", "by_phase"])
def test_a_launch_leaves_the_counters_of_its_stream_as_it_found_them(plan, pinned):
    pinned(SPLIT, plan)
    run_all(make(rows=70, columns=128, dtype=torch.float32).leaves())
    state = barrier.barrier_state(torch.device("cpu"))
    assert state[0] == 0
    assert not state[2:].any()


@pytest.mark.parametrize("name, plan", [*((name, "one_launch") for name in CONFIGS), ("split", "composed")])
def test_uninitialised_memory_is_never_read(name, plan, pinned, monkeypatch):
    pinned(CONFIGS[name], plan)
    dtype = DTYPES[plan]
    empties = (torch.Tensor, "new_empty"), (torch, "empty_like")

    def poisoned(make_empty):
        def run(*args, **kwargs):
            t = make_empty(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else 77)

        return run

    for owner, attribute in empties:
        monkeypatch.setattr(owner, attribute, poisoned(getattr(owner, attribute)))
    for rows, mix, coefficients in itertools.product((3, 70), ("one", "random"), AXES["coefficients"]):
        i = make(rows=rows, mix=mix, coefficients=coefficients, gate=True, dtype=dtype).leaves()
        for result in run_all(i, p=0.2, op="linear"):
            assert result.isfinite().all()


@pytest.mark.parametrize("plan", DTYPES)
def test_a_broken_task_stays_alone(plan, pinned):
    """NaN in one task's factors and gradients reaches that task's rows and gradients only."""
    pinned(SPLIT, plan)
    i = make(rows=100, tasks=3, dtype=DTYPES[plan], mix="random")
    i.u[1] = float("nan")
    i.v[1] = float("inf")
    i = i.leaves(("x", "u", "v", "fusion"))
    y = functional.delta(*adapter(i), **options(i))
    assert y[i.task == 1].isnan().all()
    assert y[i.task != 1].isfinite().all()
    dy = torch.randn_like(y)
    dy[i.task == 1] = float("nan")
    for name, grad in gradients(y, i, ("x", "u", "v", "fusion"), dy).items():
        others = grad[i.task != 1] if name == "x" else grad[[0, 2]]
        assert others.isfinite().all(), name


def test_ids_that_do_not_exist_give_nan_and_touch_nothing(pinned):
    pinned(SPLIT)
    i = make(rows=40, tasks=3, dtype=torch.float32)
    good = functional.delta(*adapter(i), **options(i))
    i.task[7], i.task[20] = 3, 2**31 - 1
    i = i.leaves()
    y = functional.delta(*adapter(i), **options(i))
    wrong = torch.zeros(40, dtype=torch.bool)
    wrong[[7, 20]] = True
    assert y[wrong].isnan().all()
    assert torch.equal(y[~wrong], good[~wrong])
    grads = gradients(y, i, ("x", "u", "v", "fusion"), torch.ones_like(y))
    assert grads.pop("x")[~wrong].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("plan", DTYPES)
def test_gates_that_do_not_exist_give_nan(plan, pinned, monkeypatch):
    pinned(SPLIT, plan)
    i = make(rows=40, tasks=3, gate=True, dtype=DTYPES[plan])
    monkeypatch.setattr(task_rows, "seen_by_host", lambda tensor: tensor.data_ptr() != i.gate_row.data_ptr())
    good = functional.delta(*adapter(i), **options(i))
    i.task[7] = i.task[20] = 1
    i.gate_row[7], i.gate_row[20] = 4, -1
    y = functional.delta(*adapter(i), **options(i))
    assert y[[7, 20]].isnan().all()
    others = [row for row in range(40) if row not in (7, 20)]
    assert torch.equal(y[others], good[others])


def test_strided_inputs(pinned):
    pinned(SPLIT)
    i = make(rows=40, dtype=torch.float32)
    want = functional.delta(*adapter(i), **options(i))
    wide = torch.randn(40, 100)
    wide[:, 30:54] = i.x
    both = torch.stack((i.x, i.x), -1)[..., 0]
    for x in (wide[:, 30:54], both):
        assert not x.is_contiguous()
        assert torch.equal(functional.delta(x, i.a.T.contiguous().T, *adapter(i)[2:], **options(i)), want)


@pytest.mark.parametrize("plan", DTYPES)
def test_negated_views(plan, pinned):
    """What is stored is not what they are worth: of x, of a factor, of the gradient that comes in."""
    pinned(SPLIT, plan)
    i = make(rows=40, dtype=DTYPES[plan]).leaves(("x", "a", "u"))
    dy = torch.randn(40, 20).to(i.x.dtype)
    want = functional.delta(-i.x, i.a, i.b0, -i.u, *adapter(i)[4:], **options(i))
    got = functional.delta(torch._neg_view(i.x), i.a, i.b0, torch._neg_view(i.u), *adapter(i)[4:], **options(i))
    assert torch.equal(got, want)
    for g, w in zip(
        torch.autograd.grad(got, (i.x, i.a, i.u), torch._neg_view(dy)),
        torch.autograd.grad(want, (i.x, i.a, i.u), -dy),
        strict=True,
    ):
        assert torch.equal(g, w)


@pytest.mark.parametrize("ids", [(2, 0), (1, 2), (2, 1, 0)], ids=str)
def test_tasks_in_another_order_and_absent_ones_of_the_composed_plan(ids, pinned):
    """M_t and dM_t lie in the order of the batch; a task without rows has zeros."""
    pinned(SPLIT, "composed")
    errors = Errors()
    for seed in range(2):
        i = make(rows=90, tasks=3, dtype=torch.float16, seed=seed)
        i = i.with_(task=torch.tensor(ids, dtype=torch.int32).repeat_interleave(90 // len(ids)))
        add_errors(errors, i, "linear")
        own = i.leaves()
        found = gradients(
            functional.delta(*adapter(own), **options(own)), own, ("u", "v", "fusion"), torch.ones(90, 20).half()
        )
        for name, grad in found.items():
            assert [t for t in range(3) if grad[t].any()] == sorted(ids), name
    errors.check()


@pytest.mark.parametrize("plan", DTYPES)
def test_ranks_limit_the_shared_gradients(plan, pinned):
    pinned(SPLIT, plan)
    i = make(rows=70, rank=8, dtype=DTYPES[plan])
    every, some = i.leaves(), i.leaves()
    seed = torch.tensor([5])
    functional.delta(*adapter(every), **options(i, p=0.1, seed=seed)).sum().backward()
    functional.delta(*adapter(some), **options(i, ranks=(2, 5), p=0.1, seed=seed)).sum().backward()
    assert torch.equal(some.a.grad[2:5], every.a.grad[2:5])
    assert torch.equal(some.b0.grad[:, 2:5], every.b0.grad[:, 2:5])
    assert (some.a.grad[[0, 1, 5, 6, 7]] == 0).all()
    assert (some.b0.grad[:, [0, 1, 5, 6, 7]] == 0).all()
    assert torch.equal(some.x.grad, every.x.grad)


@pytest.mark.parametrize("plan", ["by_phase", "composed", "composed of factors"])
def test_sums_over_many_rows_may_leave_the_range_of_fp16(plan, pinned, monkeypatch):
    """As under a GradScaler: those of dM, and all of fp32 masters, which nothing may round either."""
    pinned(SPLIT, plan.split()[0])
    if plan == "composed of factors":
        monkeypatch.setattr(triton_backend, "TRITON", triton_parts.TRITON._replace(forms_m=lambda *_: False))
    i = make(rows=512, columns=40, outputs=48, rank=16, sub_rank=8, tasks=2, mix="sorted", dtype=torch.float32)
    i = i.with_(u=i.u * 2**-6, v=i.v * 2**-6)
    x, dy = (i.x + 1).half().float(), torch.full((512, 48), 1500.0)
    wide, masters = i.with_(x=x).to(torch.float64).leaves(), i.with_(x=x.half()).leaves()
    truth = gradients(oracle(wide, SCALING), wide, NAMES[:6], dy.double())
    found = gradients(functional.delta(*adapter(masters), **options(masters)), masters, NAMES[:6], dy.half())
    dm = dy.T @ (x @ i.a.T)
    assert min(truth["a"].abs().max(), dm.abs().max()) > torch.finfo(torch.float16).max
    for name in ("a", "b0", "u", "v"):
        want = truth[name]
        torch.testing.assert_close(
            found[name].double(), want, rtol=0.02, atol=0.005 * want.abs().max().item(), msg=name
        )
        assert not torch.equal(found[name], found[name].half().float())


@pytest.mark.parametrize("plan", DTYPES)
def test_fp32_masters_under_fp16_activations(plan, pinned):
    pinned(WHOLE, plan)
    i = make(rows=70, columns=64, rank=16, dtype=torch.float32).leaves()
    x = i.x.detach().half().requires_grad_()
    y = functional.delta(x, *adapter(i)[1:], **options(i))
    dy = torch.randn_like(y)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == torch.float16
    wide = i.to(torch.float64).leaves()
    wide.x = x.detach().double().requires_grad_()
    low = i.to(torch.float16).leaves()
    truth = oracle(wide, SCALING)
    formula = reference.delta(*adapter(low), low.task, scaling=SCALING)
    errors = Errors()
    errors.add("y", y, formula, truth)
    names = NAMES[:6]
    want, plain = gradients(truth, wide, names, dy.double()), gradients(formula, low, names, dy)
    for name in names[1:]:
        grad = getattr(i, name).grad
        assert grad.dtype == torch.float32
        errors.add(f"d{name}", grad, plain[name], want[name])
    errors.check()


def test_what_the_kernels_refuse():
    x = torch.randn(2, 4)
    assert triton_runtime.unsupported_reason(x, 128, 64) is None
    assert "torch.bfloat16 in the interpreter" in triton_runtime.unsupported_reason(x.bfloat16(), 128, 64)
    assert "torch.float64" in triton_runtime.unsupported_reason(x.double(), 128, 64)
    assert "r up to 256 and sub_rank up to 128" in triton_runtime.unsupported_reason(x, 257, 64)
    assert "r up to 256 and sub_rank up to 128" in triton_runtime.unsupported_reason(x, 16, 129)
    assert "triton: " not in lilora_kernels.explain(torch.nn.Sequential(LiLoRALinear(torch.nn.Linear(4, 4), r=2)))


def test_a_configuration_whose_tiles_do_not_fill_a_chunk_is_refused(monkeypatch):
    monkeypatch.setattr(triton_configs, "tuned", lambda names: {"from_dy": {"1024": {"CHUNK": 48}}})
    with pytest.raises(ValueError, match="from_dy 1024 has CHUNK 48; give a multiple of BLOCK_M 32"):
        triton_configs.chosen((), "from_dy", 1024)


def test_a_call_has_the_configuration_of_the_next_number_of_rows():
    for rows, want in (
        (0, 128),
        (1, 128),
        (129, 255),
        (255, 255),
        (256, 1024),
        (1024, 1024),
        (4096, 4096),
        (4097, 16384),
    ):
        assert triton_configs.bucket(rows) == want


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("plan", ["one_launch", "by_phase", "composed"])
def test_factors_of_no_task_at_all_are_read_by_no_kernel(plan, seen, monkeypatch):
    """Their memory is at address 0; whatever plan is forced, the call is composed."""
    if not seen:
        monkeypatch.setattr(task_rows, "seen_by_host", lambda tensor: False)
    i = make(rows=5, tasks=1, dtype=torch.float32)
    none = i.with_(u=i.u[:0], v=i.v[:0], fusion=i.fusion[:0], task=torch.full((5,), -1, dtype=torch.int32)).leaves()
    with lilora_kernels.plan(plan):
        y = functional.delta(*adapter(none), **options(none))
        grads = gradients(y, none, ("x", "a", "b0", "u"), torch.ones_like(y))
    assert (y == 0).all()
    assert all((grad == 0).all() for grad in grads.values())
