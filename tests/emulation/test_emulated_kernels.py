"""The CUDA kernels on an emulated device: every output and gradient against the fp64 oracle, and the laws of the operations."""

import pytest
import torch
from emulator import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import MUTANTS
from order import assert_shares_are_added_in_order
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
from support.kernel_cases import ANY_DROPOUT, ANY_SHAPE, AXES, SUBSETS
from support.plan_cases import CHECKS

from lilora_kernels import backends, functional
from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.delta import cuda_backend
from lilora_kernels.ops.linear import cuda_backend as cuda_linear
from lilora_kernels.ops.philox import keep_mask, keep_scale
from lilora_kernels.ops.schema import AdapterArgs
from tools import cuda_traffic, traffic

DEVICES = {
    "one-block": {"processors": 1},
    "small-memory": {"processors": 3, "shared": 99 << 10},
    "shuffled": {"processors": 5, "order": 1234},
}
CASES = AXES | {
    "columns": [*AXES["columns"], 200],
    "outputs": [*AXES["outputs"], 264],
    "rank": [*AXES["rank"], 256],
    "sub_rank": [*AXES["sub_rank"], 128],
    "dtype": [torch.float16, torch.bfloat16],
    "op": ["delta", "linear"],
    "device": list(DEVICES),
}
OTHERS = ("op", "device", "p", "wanted")


@pytest.mark.parametrize("case", pairwise(CASES), ids=case_id)
def test_outputs_and_gradients_are_as_good_as_the_eager_formula(case, device):
    device(**DEVICES[case["device"]])
    shape = {name: value for name, value in case.items() if name not in OTHERS}
    errors = Errors()
    # An error of one number says little.
    for seed in range(16 if case["rank"] * case["sub_rank"] == 1 else 2 if case["rows"] < 100 else 1):
        i, stream = make(**shape, seed=seed), torch.tensor([0x1234_5678_9ABC_DEF + seed])
        add_errors(errors, i, case["op"], SUBSETS[case["wanted"]], case["p"], stream)
    errors.check()


def test_any_shape():
    """Errors of all shapes together: one of a few elements says little of a 16-bit type."""
    errors = Errors()

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(shape=st.fixed_dictionaries(ANY_SHAPE), op=st.sampled_from(CASES["op"]), **ANY_DROPOUT)
    def add(shape, op, p, seed):
        i = make(**shape, dtype=torch.float16, seed=seed % 1000)
        add_errors(errors, i, op, NAMES, p, torch.tensor([seed]))

    add()
    errors.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["delta", "linear"])
def test_sixty_four_rows_of_as_many_tasks(op, dtype):
    errors = Errors()
    for seed in range(2):
        add_errors(errors, make(64, 64, 48, 16, 8, 64, mix="distinct", dtype=dtype, seed=seed), op)
    errors.check()


@pytest.mark.parametrize("rows", [40, 600])
def test_several_chunks_of_rows_and_tiles_of_ranks(rows):
    """More rows than one share of the gradients of parameters has, and ranks beyond a tile."""
    errors = Errors()
    for mix in ("sorted", "random"):
        i = make(rows, 40, 24, 200, 72, 4, mix=mix, gate=True, dtype=torch.float16)
        add_errors(errors, i, "delta", p=0.1, seed=torch.tensor([5]))
    errors.check()


@pytest.mark.parametrize("plan", ["by_phase", "decode", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_masters_under_16_bit_activations(dtype, plan):
    """Rounded before the launch, as the formula does; their gradients are not rounded at all."""
    errors = Errors()
    for seed in range(2):
        i = make(60, 40, 24, 16, 8, gate=True, dtype=torch.float32, seed=seed)
        i.x = i.x.to(dtype)
        dy, (weight, bias) = torch.randn(60, 24).to(dtype), base(i, torch.float32)
        results = []
        for given_ in (i, i.to(dtype), i.to(torch.float64)):
            copy = given_.leaves()
            if given_ is i:
                with backends.plan(plan):
                    y = functional.linear(copy.x, weight.to(dtype), bias, *adapter(copy)[1:], **options(copy))
            else:
                y = oracle(copy, SCALING) + torch.nn.functional.linear(
                    copy.x, *(t.to(copy.x.dtype) for t in (weight, bias))
                )
            with backends.plan(plan):
                results.append({"y": y.detach(), **gradients(y, copy, NAMES, dy.to(y.dtype))})
        for name, got in results[0].items():
            assert got.dtype == (dtype if name in ("y", "x") else torch.float32)
            errors.add(name, got, results[1][name], results[2][name])
            if name not in ("y", "x"):
                assert (got != got.to(dtype)).any()
    errors.check()


def test_fp32_activations_are_left_to_others():
    i = make(30, 40, 24, 16, 8, dtype=torch.float32)
    reason = "it takes x in float16 or bfloat16, not in float32"
    assert backends.unsupported_reasons("delta", i.x, 16, 8)["cuda"] == reason
    with pytest.raises(backends.Unsupported, match=reason):
        functional.delta(*adapter(i), **options(i))


def test_parameters_of_yet_another_type():
    i = make(30, 40, 24, 16, 8, dtype=torch.float32)
    i.x, i.u, i.fusion = i.x.bfloat16(), i.u.half(), i.fusion.double()
    copy = i.leaves()
    y = functional.delta(*adapter(copy), **options(copy))
    grads = gradients(y, copy, NAMES, torch.randn(30, 24).bfloat16())
    assert (grads["u"].dtype, grads["fusion"].dtype, grads["x"].dtype) == (torch.float16, torch.float64, torch.bfloat16)
    truth = oracle(i.to(torch.float64), SCALING)
    assert (y - truth).abs().max() <= 0.02 * truth.abs().max()


@pytest.mark.parametrize("rows", [30, 130])
def test_strided_and_misaligned_inputs(rows):
    """A slice of rows of a wider tensor, and parameters that do not begin at a multiple of sixteen bytes."""
    i = make(rows, 40, 24, 16, 8, dtype=torch.float16)
    want = functional.delta(*adapter(i), **options(i))

    def shifted(t):
        flat = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
        return flat.copy_(t.flatten()).view(t.shape)

    wide = torch.full((rows, 53), float("nan"), dtype=torch.float16)
    wide[:, 5:45] = i.x
    got = functional.delta(wide[:, 5:45], *(shifted(t) for t in adapter(i)[1:]), **options(i))
    assert torch.equal(got, want)
    columns_first = i.x.T.contiguous().T
    assert torch.equal(functional.delta(columns_first, *adapter(i)[1:], **options(i)), want)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("rows, op", [(30, "linear"), (30, "delta"), (130, "delta")])
def test_rows_that_do_not_begin_at_multiples_of_sixteen_bytes_get_the_same_results(rows, op, masters):
    """They are stored element by element; zeros beside them, which add nothing, make them begin there."""
    whole = make(rows, 48, 64, 16, 8, gate=True, dtype=torch.float16)
    dy = torch.randn(rows, 64).half()
    sizes = {"x": (rows, 45), "a": (13, 45), "b0": (57, 13), "u": (3, 57, 5), "v": (3, 5, 13), "gate": (5, 13)}

    def part(name, t):
        return t[tuple(map(slice, sizes.get(name, t.shape)))]

    def run(i, dy, weight, bias):
        if masters:
            i = i.to(torch.float32).with_(x=i.x)
        copy = i.leaves()
        more = options(copy, p=0.2, seed=torch.tensor([3]))
        first = adapter(copy)
        y = (
            functional.delta(*first, **more)
            if op == "delta"
            else functional.linear(first[0], weight, bias, *first[1:], **more)
        )
        return {"y": y.detach(), **gradients(y, copy, NAMES, dy)}

    ragged = whole.with_(**{name: part(name, getattr(whole, name)).contiguous() for name in sizes})
    for name in sizes:
        t = getattr(whole, name)
        kept = part(name, t).clone()
        t.zero_()
        part(name, t).copy_(kept)
    weight, bias = base(whole)
    weight[57:], weight[:, 45:], bias[57:], dy[:, 57:] = 0, 0, 0, 0
    got = run(ragged, dy[:, :57].contiguous(), weight[:57, :45].contiguous(), bias[:57].contiguous())
    want = run(whole, dy, weight, bias)
    sizes["y"] = rows, 57
    for name, value in got.items():
        assert torch.equal(value, part(name, want[name])), name


# --- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, p", [(0, 0.05), (-1, 0.5), (2**40 + 7, 0.999), (-(2**63), 0.05)])
@pytest.mark.parametrize("rows", [50, 140])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_forward_and_backward_draw_the_mask_of_the_reference(seed, p, rows, dtype):
    """Bit for bit, and so the mask of the Triton kernels, which draw that of the reference too."""
    columns = 44
    seed = torch.tensor([seed])
    eye = torch.eye(columns, dtype=dtype)
    x = torch.ones(rows, columns, dtype=dtype, requires_grad=True)
    a = eye.clone().requires_grad_()
    keep = keep_mask(seed, rows, columns, p)
    y = functional.delta(x, a, eye, p=p, seed=seed)
    assert torch.equal(y, (keep * keep_scale(p)).to(dtype))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert torch.equal(dx, (keep * keep_scale(p)).to(dtype))
    (da,) = torch.autograd.grad(y, a, torch.eye(rows, columns, dtype=dtype))
    assert torch.equal(da != 0, keep[:columns])


# --- what a launch does --------------------------------------------------------------------------------------------


def args_of(i, p=0.0):
    seed = torch.tensor([3]) if p else None
    return AdapterArgs(i.a, i.b0, i.u, i.v, i.fusion, i.task, i.gate, i.gate_row, seed, SCALING, p, None)


@pytest.mark.parametrize("rows", [40, 300])
def test_delta_is_one_launch_forward_and_one_launch_backward(rows, device):
    i = make(rows, 64, 48, 16, 8, gate=True, dtype=torch.float16)
    before = device.launches
    _, h = cuda_backend.forward(i.x, args_of(i))
    assert device.launches == before + 1
    cuda_backend.backward(torch.randn(rows, 48).half(), i.x, h, args_of(i), frozenset(NAMES))
    assert device.launches == before + 2


def test_the_base_is_computed_by_phase_whatever_is_asked_for(device):
    i = make(40, 64, 48, 16, 8, dtype=torch.float16)
    weight, bias = base(i)
    want = cuda_backend.run_forward(i.x, bias, args_of(i), False, weight)
    before = device.launches
    assert_equal(cuda_backend.run_forward(i.x, bias, args_of(i), True, weight), want)
    assert device.launches == before + 3


def test_the_base_of_more_rows_than_a_tile_raises(device):
    i = make(65, 64, 48, 16, 8, dtype=torch.float16)
    weight, bias = base(i)
    with pytest.raises(RuntimeError, match="with weight x may have up to 64 rows"):
        cuda_backend.run_forward(i.x, bias, args_of(i), False, weight)


@pytest.mark.parametrize("needs, phases", [(("x",), 3), (("u",), 3), (("a",), 4), (("x", "u", "v", "fusion"), 5)])
def test_phases_without_work_are_not_launched(needs, phases, device):
    i = make(100, 64, 48, 16, 8, dtype=torch.float16)
    _, h = cuda_backend.forward(i.x, args_of(i))
    before = device.launches
    cuda_backend.run_backward(torch.randn(100, 48).half(), i.x, h, args_of(i), frozenset(needs), one_launch=False)
    assert device.launches == before + phases


@pytest.mark.parametrize("rows", [1, 16, 17, 33, 64])
def test_decoding_reads_each_factor_once(rows, device):
    """The base's weight too, whatever the number of rows; of U only the tasks that occur. x for h, and for each 32 outputs."""
    device(processors=7)
    i = make(rows, 136, 264, 32, 16, 9, mix="random", dtype=torch.float16)
    weight, bias = base(i)
    occurring = i.task[i.task >= 0].unique().tolist()
    want = {"weight": weight, "a": i.a, "b0": i.b0, **{f"u[{t}]": i.u[t] for t in range(9)}}
    for name, factor in want.items():
        copied = device.bytes_copied(factor, lambda: cuda_backend.run_forward(i.x, bias, args_of(i), False, weight))
        expected = 0 if name.startswith("u") and int(name[2]) not in occurring else factor.nbytes
        assert copied == expected, name
    copied = device.bytes_copied(i.x, lambda: cuda_backend.run_forward(i.x, bias, args_of(i), False, weight))
    assert copied == (1 + 6 * 2 + 1) * i.x.nbytes  # six ranges of 40 outputs, one of 24


def run_all(i, p=0.0, op="delta"):
    weight, bias = base(i)
    copy = i.leaves()
    more = options(copy, p=p, seed=torch.tensor([3]) if p else None)
    if op == "delta":
        y = functional.delta(*adapter(copy), **more)
    else:
        y = functional.linear(copy.x, weight, bias, *adapter(copy)[1:], **more)
    dy = torch.cos(torch.arange(y.numel())).view_as(y).to(y.dtype)
    return [y.detach(), *gradients(y, copy, NAMES, dy).values()]


def assert_equal(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op, rows", [("delta", 50), ("delta", 300), ("linear", 50), ("linear", 300)])
def test_results_depend_on_neither_the_order_of_threads_nor_the_time_of_copies(op, rows, device):
    i = make(rows, 136, 200, 24, 8, gate=True, dtype=torch.bfloat16)
    want = run_all(i, 0.1, op)
    for order, copies in ((1, "now"), (2, "random")):
        device(order=order, copies=copies)
        assert_equal(run_all(i, 0.1, op), want)


@pytest.mark.parametrize("rows", [50, 300])
def test_one_launch_equals_a_launch_for_each_phase(rows):
    i = make(rows, 136, 200, 24, 8, gate=True, dtype=torch.bfloat16)
    args, dy = args_of(i, 0.1), torch.randn(rows, 200).bfloat16()
    results = []
    for one_launch in (True, False):
        y, h = cuda_backend.run_forward(i.x, None, args, one_launch)
        results.append([y, h, *cuda_backend.run_backward(dy, i.x, h, args, frozenset(NAMES), one_launch).values()])
    assert_equal(*results)


def test_shares_are_added_in_order(device):
    assert_shares_are_added_in_order(device)


@pytest.mark.parametrize("rows, op, dtype", [(17, "linear", torch.bfloat16), (130, "delta", torch.float16)], ids=str)
def test_a_whole_device(rows, op, dtype, device):
    device(processors=132)
    errors = Errors()
    add_errors(errors, make(rows, 2048, 40, 16, 8, dtype=dtype), op, NAMES, 0.1, torch.tensor([7]))
    errors.check()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_can_be_planted(mutant):
    """`make emulation-full` plants it, where the text must not have gone."""
    source = (ROOT / "csrc" / mutant.file).read_text()
    assert source.count(mutant.text) == 1, f"{mutant.file} no longer has this text once: {mutant.text!r}"


def test_the_barrier_serves_grids_of_changing_sizes(device):
    """One state, launches of 1 to 7 blocks one after another."""
    i = make(70, 64, 48, 16, 8, dtype=torch.float16)
    want = cuda_backend.run_forward(i.x, None, args_of(i), False)
    for processors in (7, 1, 3, 2, 7):
        device(processors=processors, order=processors)
        assert_equal(cuda_backend.run_forward(i.x, None, args_of(i), True), want)


@pytest.mark.parametrize("rows", [60, 300])
def test_a_row_is_the_same_alone_and_in_any_batch(rows, monkeypatch, device):
    """With one block nothing is split by the number of rows."""
    device(processors=1)
    i = make(rows, 136, 264, 24, 8, dtype=torch.bfloat16)

    def run(at):
        args = AdapterArgs(*adapter(i)[1:], i.task[at], None, None, None, SCALING, 0.0, None)
        return cuda_backend.forward(i.x[at], args)[0]

    together = run(torch.arange(rows))
    order = torch.randperm(rows)
    assert torch.equal(run(order), together[order])
    part = torch.arange(3, rows // 2) if rows < 64 else torch.arange(100, 200)
    assert torch.equal(run(part), together[part])


def test_a_device_that_cannot_run_the_code_says_why(device):
    assert torch.ops.lilora_cuda.missing_code(0) == ""
    assert torch.ops.lilora_cuda.missing_code(1) == "there is one emulated device"  # what is thrown is a reason too
    device.lacks_code("CUDA driver version is insufficient for CUDA runtime version")
    try:
        assert torch.ops.lilora_cuda.missing_code(0) == "CUDA driver version is insufficient for CUDA runtime version"
    finally:
        device.lacks_code("")


# --- what must not spread ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [60, 300])
@pytest.mark.parametrize("op", ["delta", "linear"])
def test_not_a_number_stays_with_its_task(op, rows):
    i = make(rows, 64, 48, 16, 8, 3, dtype=torch.float16)
    want = run_all(i, op=op)
    i.u[1] = float("nan")
    got = run_all(i, op=op)
    others = i.task != 1
    assert got[0][~others].isnan().all()
    assert torch.equal(got[0][others], want[0][others])
    assert torch.equal(got[1][others], want[1][others])
    for at in (0, 2):
        assert torch.equal(got[4][at], want[4][at])
        assert torch.equal(got[5][at], want[5][at])


def test_ids_that_do_not_exist():
    """Below 0: no adapter. From T on: NaN in that row, for the host cannot look."""
    i = make(40, 64, 48, 16, 8, 3, dtype=torch.float16)
    want = functional.delta(*adapter(i), **options(i))
    i.task[5], i.task[6] = -7, 3
    y = functional.delta(*adapter(i), **options(i))
    assert (y[5] == 0).all()
    assert y[6].isnan().all()
    rest = [row for row in range(40) if row not in (5, 6)]
    assert torch.equal(y[rest], want[rest])


def test_a_bank_without_tasks():
    i = make(20, 40, 24, 16, 8, dtype=torch.float16)
    i.u, i.v, i.fusion = i.u[:0], i.v[:0], i.fusion[:0]
    i.task.fill_(-1)
    y, dx, *_ = run_all(i)
    assert not y.any()
    assert not dx.any()


def test_one_output_and_one_rank_with_strides_of_their_own():
    """A dimension of one element may have any stride in a contiguous tensor."""
    for outputs, sub_rank in ((1, 8), (24, 1)):
        i = make(20, 40, outputs, 16, sub_rank, dtype=torch.float16)
        want = functional.delta(*adapter(i), **options(i))
        i.u = i.u.transpose(0, 1).contiguous().transpose(0, 1)
        i.v = i.v.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(functional.delta(*adapter(i), **options(i)), want)


def test_tasks_without_rows_get_zeros():
    i = make(40, 64, 48, 16, 8, 5, dtype=torch.float16)
    i.task.fill_(3)
    _, _, _, _, du, dv, dfusion = run_all(i)
    for t in (0, 1, 2, 4):
        assert not any(grad[t].any() for grad in (du, dv, dfusion))
    assert (du[3] != 0).any()


@pytest.mark.parametrize("rows", [3, 90, 700])
def test_uninitialised_memory_is_never_read(rows):
    """Shared memory is poisoned by the emulator; here what the operations allocate is, too."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for mix in ("same", "distinct", "runs", "random")[2 if rows == 700 else 0 :]:
            for op in ("delta", "linear"):
                for result in run_all(make(rows, 72, 40, 13, 5, 3, mix=mix, gate=True, dtype=torch.bfloat16), 0.2, op):
                    assert result.isfinite().all(), (mix, op)
    finally:
        torch.use_deterministic_algorithms(False)


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [8, 264, 1048])
@pytest.mark.parametrize(
    "processors, shared, outputs",
    [(1, 99, 264), (2, 227, 256), (3, 227, 264), (5, 227, 260), (11, 227, 264), (33, 99, 264)],  # shared: KB
)
def test_the_base_product_of_any_width(processors, shared, outputs, columns, device):
    """Ranges of 128 outputs down to 8: one to four warps side by side, the others with slices of the depth, some without.

    A row gets the same bits alone and beside others.
    """
    device(processors, shared << 10)
    errors = Errors()
    for dtype in (torch.float16, torch.bfloat16):
        for coefficients, rank, sub_rank in (("fusion", 24, 8), ("plain", 256, 128), ("lora", 13, 5)):
            i = make(60, columns, outputs, rank, sub_rank, 3, coefficients, "random", True, dtype)
            with backends.plan("decode"):
                add_errors(errors, i, "linear", ())
                weight, bias = base(i)
                y, h = cuda_linear.forward(i.x, weight, bias, args_of(i))
                for row in (0, 37):
                    one = {name: getattr(i, name)[row : row + 1] for name in ("x", "task", "gate_row")}
                    alone = cuda_linear.forward(one["x"], weight, bias, args_of(i.with_(**one)))
                    assert torch.equal(alone[0][0], y[row])
                    assert torch.equal(alone[1][0], h[row])
    errors.check()


@pytest.mark.parametrize("which", ["x", "weight", "columns"])
def test_rows_that_decoding_cannot_stream_take_another_plan(which, device):
    """One that is forced raises, and so does the operation itself."""
    columns = 60 if which == "columns" else 64
    i = make(7, columns, 40, 16, 8, dtype=torch.bfloat16)
    weight, bias = base(i)
    unaligned = lambda t: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)  # noqa: E731
    x, weight = (unaligned(t) if which == name else t for name, t in (("x", i.x), ("weight", weight)))
    assert cuda_linear.plan_of(x, weight, args_of(i)) == "one_launch"
    with backends.plan("decode"), pytest.raises(backends.Unsupported, match="multiple of 8 elements that begin at"):
        cuda_linear.forward(x, weight, bias, args_of(i))
    with pytest.raises(RuntimeError, match="multiple of 8 elements that begin at"):
        cuda_backend.run_forward(x, bias, args_of(i), False, weight)
    y, _ = cuda_linear.forward(x, weight, bias, args_of(i))
    with backends.plan("one_launch"):
        assert_equal([y], [cuda_linear.forward(i.x, weight, bias, args_of(i))[0]])


def test_decoding_reads_wide_rows_of_the_weight_as_they_lie(device):
    i = make(7, 64, 40, 16, 8, dtype=torch.bfloat16)
    weight, bias = base(i)
    wide = torch.full((40, 80), torch.nan, dtype=weight.dtype)
    wide[:, :64] = weight
    assert_equal(
        cuda_backend.run_forward(i.x, bias, args_of(i), False, wide[:, :64]),
        cuda_backend.run_forward(i.x, bias, args_of(i), False, weight),
    )


# --- plans, layers --------------------------------------------------------------------------------------------------


def test_linear_takes_its_plan_by_the_number_of_rows(device, monkeypatch):
    """Up to 16 rows a launch for each of three phases with the base product in them; then cuBLAS's beside one or three."""
    for rows, launches, products in ((16, 3, 0), (17, 1, 1), (255, 1, 1), (256, 3, 1)):
        i = make(rows, 40, 24, 16, 8, dtype=torch.float16)
        weight, bias = base(i)
        seen = []
        monkeypatch.setattr(torch.Tensor, "addmm_", lambda y, *_, seen=seen: seen.append(1) or y)
        before = device.launches
        cuda_linear.forward(i.x, weight, bias, args_of(i))
        assert (device.launches - before, len(seen)) == (launches, products)
        monkeypatch.undo()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("plan", ["decode", "one_launch", "composed", "by_phase"])
def test_a_layer(plan, check):
    with backends.plan(plan):
        check("cpu", torch.float16)


# --- the fused product ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["one", "sorted", "distinct", "random"])
@pytest.mark.parametrize("coefficients", ["fusion", "plain", "lora"])
@pytest.mark.parametrize("gate, p", [(False, 0.2), (True, 0.0)])
def test_what_the_fused_product_is_given(coefficients, mix, gate, p):
    """Slots, scaling and coefficients folded into q and z, dh for dx; its own inner product is the plain one here."""
    errors = Errors()
    with backends.plan("fused"):
        i = make(300, 64, 48, 16, 8, 3, coefficients, mix, gate, torch.bfloat16)
        add_errors(errors, i, "linear", p=p, seed=torch.tensor([0]))
        assert cuda_linear.plan_of(i.x, base(i)[0], args_of(i)) == "fused"
    errors.check()


@pytest.mark.parametrize("plan", ["fused", "by_phase", "decode"])
@pytest.mark.parametrize("coefficients", ["fusion", "lora"])
def test_an_h_out_of_range_in_a_row_without_a_task_reaches_no_output(plan, coefficients):
    i = make(40, 64, 48, 16, 8, 2, coefficients, "random", dtype=torch.float16)
    bare = i.task < 0
    assert bare.any()
    x, a = i.x * 2**-7, i.a * 2**7
    x[bare] = 1000
    i = i.with_(x=x, a=a)
    weight, bias = base(i)
    weight = weight * 2**-10
    assert (x @ a.T)[bare].isinf().any()
    with backends.plan(plan):
        y = functional.linear(i.x, weight, bias, *adapter(i)[1:], **options(i))
    assert y.isfinite().all()


def test_the_fused_product_is_chosen_for_many_rows_of_one_task():
    wanted = "in its place for one task from 4096 rows on sm_90a where it fits, as modelled and not yet measured"
    assert backends.plans("linear")["cuda"]["fused"] == wanted
    assert 4096 in cuda_linear.rows(torch.device("cpu"))

    def plan_of(rows, tasks=1):
        i = make(rows, 64, 48, 16, 8, tasks, mix="one" if tasks == 1 else "random", dtype=torch.bfloat16)
        return cuda_linear.plan_of(i.x, base(i)[0], args_of(i))

    assert [plan_of(rows) for rows in (4095, 4096)] == ["by_phase", "fused"]
    assert plan_of(5000, tasks=3) == "by_phase"  # a NaN of one task would reach others' rows


def test_many_rows_of_few_tasks_are_composed_where_triton_can_run(monkeypatch):
    i = make(4096, 64, 48, 16, 8, dtype=torch.bfloat16)
    weight, _ = base(i)
    monkeypatch.setattr(triton_runtime, "unsupported_reason", lambda *_: None)
    assert cuda_linear.plan_of(i.x, weight, args_of(i)) == "composed"
    assert cuda_linear.plan_of(i.x[:255], weight, args_of(i)._replace(task=i.task[:255])) == "one_launch"
    few_each = (torch.arange(300) % 200).to(torch.int32)
    many = make(300, 64, 48, 16, 8, 200, dtype=torch.bfloat16)
    assert cuda_linear.plan_of(many.x, weight, args_of(many)._replace(task=few_each)) == "by_phase"


def test_the_fused_product_leaves_what_it_cannot_do_to_the_other_plans(monkeypatch):
    i = make(12, 64, 48, 16, 8, dtype=torch.bfloat16)
    weight, _ = base(i)
    reasons = {
        "multiples of 8": (make(12, 60, 48, 16, 8, dtype=torch.bfloat16), torch.zeros(48, 60).bfloat16()),
        "multiples of 16 bytes": (i, torch.zeros(48, 65).bfloat16()[:, :64]),
    }
    assert cuda_linear.unsupported_call(i.x, weight, args_of(i), torch.zeros(48)) is None
    assert cuda_linear.unsupported_call(i.x, weight, args_of(i.to(torch.float32))) is None
    for reason, (inputs, w) in reasons.items():
        assert reason in cuda_linear.unsupported_call(inputs.x, w, args_of(inputs))
    monkeypatch.setattr(cuda_linear, "SLOT_BYTES", 1000)
    assert "memory" in cuda_linear.unsupported_call(i.x, weight, args_of(i))
    assert cuda_linear.plan_of(i.x, weight, args_of(i)) == "decode"
    others = r"its slots .*; 'cuda' has \['decode', 'one_launch', 'composed', 'by_phase', 'fused'\]"
    with backends.plan("fused"), pytest.raises(backends.Unsupported, match=f"'fused' cannot run here: {others}"):
        cuda_linear.forward(i.x, weight, None, args_of(i))
    with backends.plan("decode"), pytest.raises(backends.Unsupported, match="it takes up to 64 rows, here are 65"):
        cuda_linear.forward(torch.zeros(65, 64).bfloat16(), weight, None, args_of(i))


@pytest.mark.parametrize("rows, tasks", [(48, 1), (48, 6), (256, 1), (256, 4), (640, 5)])
def test_items_copies_and_stores_are_those_that_the_model_counts(rows, tasks, device):
    """A block takes one item where there are more blocks than items; partials are not copied; whole vectors are stored."""
    blocks = 400
    device(processors=blocks)
    columns, outputs, rank, sub_rank = 192, 256, 32, 16
    i = make(rows, columns, outputs, rank, sub_rank, tasks, dtype=torch.bfloat16)
    task = (torch.arange(rows) * tasks // rows).to(torch.int32) if tasks > 1 else None
    args = AdapterArgs(i.a, i.b0, i.u, i.v, i.fusion, task, None, None, None, SCALING, 0.0, None)
    weight, _ = base(i)
    shape = traffic.Shape(rows, columns, outputs, rank, sub_rank, tasks)

    def counted(call):
        before = device.work
        result = call()
        return result, tuple(after - then for after, then in zip(device.work, before, strict=True))

    def planned(phases, *tensors):
        phases = list(phases)
        moved = [each for phase in phases for each in phase.traffic]
        sums = (sum(each.issued for each in moved if (each.phase, each.tensor) in some) for some in tensors)
        return sum(phase.items for phase in phases), *sums

    decode = rows <= cuda_traffic.FEW_ROWS_UP_TO
    copied = {(0, "x"), (0, "a"), (2, "x"), (2, "weight"), (1, "v"), (1, "q"), (2, "qz"), (2, "b0"), (2, "u")}
    (_, h), found = counted(lambda: cuda_backend.run_forward(i.x, None, args, False, weight if decode else None))
    z = rows * sub_rank * 2
    stored = {(0, "partials"), (1, "h"), (2, "y")}
    items, moved, written = planned(cuda_traffic.forward(shape, decode, blocks), copied, stored)
    assert found == (items, moved, written + z)
    copied = {(0, "q"), (0, "v"), (1, "dy"), (1, "b0"), (1, "u"), (1, "fqz"), (2, "v"), (3, "x"), (3, "dh"), (3, "a")}
    copied |= {(3, "seq"), (3, "q")}
    dy = torch.randn(rows, outputs, dtype=torch.bfloat16)
    _, found = counted(lambda: cuda_backend.run_backward(dy, i.x, h, args, frozenset(NAMES) - {"gate"}, False))
    tile, chunk = cuda_traffic.tile_rows(shape), cuda_traffic.chunk_rows(shape)
    empty = 2 * (
        -(-rows // chunk) * chunk // tile - -(-rows // tile)
    )  # both shares of the tiles that the last chunk lacks
    stored = {
        (1, "partials"),
        (1, "db0_partials"),
        (1, "du_partials"),
        (2, "dh"),
        (3, "dx"),
        (3, "da_partials"),
        (3, "dv_partials"),
    }
    stored |= {(4, "gradients")}
    items, moved, written = planned(cuda_traffic.backward(shape, blocks, True), copied, stored)
    assert found == (items + empty, moved, written + z)
