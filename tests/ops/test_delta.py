"""`delta` and `linear` with the eager backend against an independent fp64 oracle, per output and per gradient."""

import itertools
import runpy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
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

import lilora_kernels
from lilora_kernels import backends, functional, rank_gate
from lilora_kernels.ops.delta import eager, reference
from lilora_kernels.ops.philox import keep_scale
from lilora_kernels.ops.schema import AdapterArgs

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")
AXES = {
    "rows": [0, 1, 2, 17, 63, 64, 65, 127, 300],
    "columns": [24, 33, 128],
    "outputs": [20, 47, 96],
    "rank": [1, 4, 16, 100],
    "sub_rank": [1, 8, 64],
    "tasks": [1, 3, 8],
    "coefficients": ["fusion", "plain", "lora"],
    "mix": ["one", "same", "distinct", "runs", "sorted", "random"],
    "gate": [False, True],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "op": ["delta", "linear"],
}
CASES = pairwise(AXES)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_outputs_and_gradients_are_as_good_as_the_eager_formula(case):
    shape = {name: value for name, value in case.items() if name != "op"}
    errors = Errors()
    for seed in range(8):
        add_errors(errors, make(**shape, seed=seed), case["op"])
    errors.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [5, 60])
def test_small_gradients_are_as_good_as_the_eager_formula(rows, dtype):
    """dfusion has one number per task: only many draws tell its error from luck."""
    errors = Errors()
    for seed in range(300):
        add_errors(errors, make(rows=rows, rank=8, sub_rank=8, tasks=2, mix="sorted", dtype=dtype, seed=seed), "delta")
    errors.check()


def test_the_shipped_reference_is_the_formula():
    for coefficients, mix, gate in itertools.product(AXES["coefficients"], AXES["mix"], (False, True)):
        i = make(coefficients=coefficients, mix=mix, gate=gate)
        keep = torch.rand(i.x.shape) > 0.3
        got = reference.delta(*adapter(i), i.task, i.gate, i.gate_row, keep, 1.4, SCALING)
        torch.testing.assert_close(got, oracle(i, SCALING, keep, 1.4), rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 20),
    outputs=st.integers(1, 20),
    rank=st.integers(1, 12),
    sub_rank=st.integers(1, 12),
    tasks=st.integers(1, 6),
    coefficients=st.sampled_from(AXES["coefficients"]),
    mix=st.sampled_from(AXES["mix"]),
    gate=st.booleans(),
    wanted=st.sets(st.sampled_from(NAMES), min_size=1),
    p=st.sampled_from([0.0, 0.4]),
    op=st.sampled_from(["delta", "linear"]),
)
def test_any_shape_any_subset_of_gradients(
    rows, columns, outputs, rank, sub_rank, tasks, coefficients, mix, gate, wanted, p, op
):
    i = make(rows, columns, outputs, rank, sub_rank, tasks, coefficients, mix, gate)
    names = [n for n in i.differentiable() if n in wanted]
    ours, wide = i.leaves(names), i.leaves(names)
    seed = torch.tensor([rows * 7 + columns])
    args = AdapterArgs(i.a, i.b0, i.u, i.v, i.fusion, i.task, i.gate, i.gate_row, seed, SCALING, p, None)
    keep = None if p == 0 else eager.dropout_mask(rows, columns, i.x.dtype, args).bool()
    truth = oracle(wide, SCALING, keep, keep_scale(p))
    if op == "linear":
        weight, bias = base(i)
        truth = truth + F.linear(wide.x, weight, bias)
        got = functional.linear(ours.x, weight, bias, *adapter(ours)[1:], **options(ours, p=p, seed=seed))
    else:
        got = functional.delta(*adapter(ours), **options(ours, p=p, seed=seed))
    torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9)
    if names:
        dy = torch.randn_like(truth)
        want = gradients(truth, wide, names, dy)
        for name, grad in gradients(got, ours, names, dy).items():
            torch.testing.assert_close(grad, want[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("coefficients", AXES["coefficients"])
@pytest.mark.parametrize("rows", [5, 12])
def test_gradcheck(coefficients, rows):
    i = make(
        rows=rows, columns=5, outputs=4, rank=3, sub_rank=2, tasks=2, coefficients=coefficients, gate=True
    ).leaves()
    weight, bias = base(i)
    names = i.differentiable()
    seed = torch.tensor([3])

    def run(*tensors):
        given = {**dict.fromkeys(NAMES), **dict(zip(names, tensors, strict=True))}
        x = given.pop("x")
        gate = given.pop("gate")
        more = {"task": i.task, "gate": gate, "gate_row": i.gate_row, "scaling": SCALING, "p": 0.3, "seed": seed}
        return functional.delta(x, **given, **more), functional.linear(x, weight, bias, **given, **more)

    assert torch.autograd.gradcheck(run, [getattr(i, n) for n in names])


@pytest.mark.parametrize("op", ["delta", "linear"])
@pytest.mark.parametrize("mix", ["one", "random"])
def test_opcheck(op, mix):
    i = make(mix=mix, gate=True, dtype=torch.float32).leaves()
    weight, bias = base(i)
    head = (i.x,) if op == "delta" else (i.x, weight, bias)
    args = (*head, i.a, i.b0, i.u, i.v, i.fusion, i.task, i.gate, i.gate_row, torch.tensor([5]), SCALING, 0.1, None)
    torch.library.opcheck(getattr(torch.ops.lilora, op).default, args)
    needs = [True] * 7
    h = torch.randn(i.x.shape[0], i.a.shape[0])
    dy = torch.randn(i.x.shape[0], i.b0.shape[0])
    frozen = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    head = (dy, frozen[0], h) if op == "delta" else (dy, frozen[0], weight, h)
    rest = frozen[1:] if op == "delta" else frozen[3:]
    torch.library.opcheck(getattr(torch.ops.lilora, f"{op}_backward").default, (*head, *rest, needs))


@pytest.mark.parametrize("op", ["delta", "linear"])
def test_fullgraph_compile_gives_the_same_values_and_gradients(op):
    torch._dynamo.reset()
    i = make(dtype=torch.float32)
    weight, bias = base(i)

    def run(i):
        x = torch.sin(i.x)
        more = options(i, p=0.2, seed=torch.tensor([11]))
        y = (
            functional.delta(x, *adapter(i)[1:], **more)
            if op == "delta"
            else functional.linear(x, weight, bias, *adapter(i)[1:], **more)
        )
        return y.square()

    ours, compiled = i.leaves(), i.leaves()
    y, z = run(ours), torch.compile(run, fullgraph=True)(compiled)
    torch.testing.assert_close(z, y)
    dy = torch.randn_like(y)
    want = gradients(y, ours, i.differentiable(), dy)
    for name, grad in gradients(z, compiled, i.differentiable(), dy).items():
        torch.testing.assert_close(grad, want[name])


def test_fp32_masters_under_bf16_activations():
    i = make(rows=64, dtype=torch.float32)
    mixed = i.leaves()
    x = i.x.bfloat16().requires_grad_()
    y = functional.delta(x, *adapter(mixed)[1:], **options(i))
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert mixed.a.grad.dtype == mixed.fusion.grad.dtype == torch.float32
    low, wide, errors = i.to(torch.bfloat16), i.to(torch.bfloat16).to(torch.float64), Errors()
    wide.a, wide.b0, wide.u, wide.v, wide.fusion = (t.double() for t in adapter(i)[1:])
    errors.add("y", y, reference.delta(*adapter(low), low.task, scaling=SCALING), oracle(wide, SCALING))
    errors.check()


def test_autocast_casts_the_activations_and_leaves_the_masters():
    i = make(dtype=torch.float32).leaves()
    weight, bias = base(i)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.linear(i.x, weight, bias, *adapter(i)[1:], **options(i))
        assert y.dtype == torch.bfloat16 == functional.delta(*adapter(i), **options(i)).dtype
    y.float().sum().backward()
    assert i.x.grad.dtype == i.u.grad.dtype == torch.float32


def test_dropout_is_drawn_from_the_seed_alone():
    i = make(rows=50, mix="one", dtype=torch.float32)

    def run(seed):
        return functional.delta(*adapter(i), **options(i, p=0.5, seed=torch.tensor([seed])))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(5)
    first = functional.draw_seed(torch.device("cpu"))
    assert not torch.equal(first, functional.draw_seed(torch.device("cpu")))
    torch.manual_seed(5)
    assert torch.equal(first, functional.draw_seed(torch.device("cpu")))


@pytest.mark.parametrize("coefficients", AXES["coefficients"])
@pytest.mark.parametrize("rank", [4, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_long_runs_of_unsorted_ids(coefficients, rank, with_bias):
    """Long runs take a product each; rank 4 composes M_t, rank 100 keeps it factored."""
    i = make(rows=300, rank=rank, tasks=3, mix="runs", coefficients=coefficients, gate=True)
    weight, bias = base(i)
    bias = bias if with_bias else None
    ours, wide = i.leaves(), i.leaves()
    got = functional.linear(ours.x, weight, bias, *adapter(ours)[1:], **options(ours))
    truth = oracle(wide, SCALING) + F.linear(wide.x, weight, bias)
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(truth)
    want = gradients(truth, wide, NAMES, dy)
    for name, grad in gradients(got, ours, NAMES, dy).items():
        torch.testing.assert_close(grad, want[name], rtol=1e-10, atol=1e-10)


def test_two_runs_are_equal_bit_for_bit_and_inputs_stay_untouched():
    i = make(rows=200, rank=16, gate=True, dtype=torch.float32).leaves()
    weight, bias = base(i)
    before = [t.detach().clone() for t in (*adapter(i), weight, bias)]

    def run():
        y = functional.linear(i.x, weight, bias, *adapter(i)[1:], **options(i, p=0.1, seed=torch.tensor([1])))
        return [y, *gradients(y, i, NAMES, torch.cos(torch.arange(y.numel())).view_as(y)).values()]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
    for old, new in zip(before, (*adapter(i), weight, bias), strict=True):
        assert torch.equal(old, new)
        assert new._version == 0


def test_uninitialised_memory_is_never_read(monkeypatch):
    """Every empty allocation of our package is filled with NaN; nothing of it may reach an output or a gradient."""
    poison = {"new_empty": torch.Tensor.new_empty, "empty": torch.empty, "empty_like": torch.empty_like}

    def poisoned(make_empty):
        def run(*args, **kwargs):
            t = make_empty(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return run

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(poison["new_empty"]))
    monkeypatch.setattr(torch, "empty", poisoned(poison["empty"]))
    monkeypatch.setattr(torch, "empty_like", poisoned(poison["empty_like"]))
    for rows, mix, coefficients in itertools.product((3, 90), AXES["mix"], AXES["coefficients"]):
        i = make(rows=rows, mix=mix, coefficients=coefficients, gate=True).leaves()
        weight, bias = base(i)
        for b in (bias, None):
            y = functional.linear(i.x, weight, b, *adapter(i)[1:], **options(i, p=0.2, seed=torch.tensor([1])))
            assert y.isfinite().all()
            for name, grad in gradients(y, i, NAMES, torch.ones_like(y)).items():
                assert grad.isfinite().all(), name


def test_rows_are_independent_of_their_batch():
    i = make(rows=24, tasks=4, mix="random")
    together = functional.delta(*adapter(i), **options(i))
    for row in range(24):
        alone = functional.delta(i.x[row : row + 1], *adapter(i)[1:], task=i.task[row : row + 1], scaling=SCALING)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)


def test_absent_tasks_get_exact_zeros():
    i = make(tasks=3, mix="same").leaves()
    functional.delta(*adapter(i), **options(i)).sum().backward()
    for grad in (i.u.grad, i.v.grad, i.fusion.grad):
        assert (grad[:2] == 0).all()
        assert (grad[2] != 0).any()


@pytest.mark.parametrize("coefficients", ["lora", "fusion"])
def test_ranks_limit_the_shared_gradients(coefficients):
    i = make(coefficients=coefficients, rank=8)
    all_ranks, some = i.leaves(), i.leaves()
    functional.delta(*adapter(all_ranks), **options(i)).sum().backward()
    functional.delta(*adapter(some), **options(i, ranks=(2, 5))).sum().backward()
    torch.testing.assert_close(some.a.grad[2:5], all_ranks.a.grad[2:5])
    torch.testing.assert_close(some.b0.grad[:, 2:5], all_ranks.b0.grad[:, 2:5])
    for lo, hi in ((0, 2), (5, 8)):
        assert (some.a.grad[lo:hi] == 0).all()
        assert (some.b0.grad[:, lo:hi] == 0).all()
    torch.testing.assert_close(some.x.grad, all_ranks.x.grad)


def test_strided_inputs_and_leading_dimensions():
    i = make(rows=24, mix="random")
    want = functional.delta(*adapter(i), **options(i))
    strided = torch.stack((i.x, i.x), -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(functional.delta(strided, i.a.T.contiguous().T, *adapter(i)[2:], **options(i)), want)
    folded = functional.delta(i.x.view(2, 3, 4, -1), *adapter(i)[1:], **options(i))
    torch.testing.assert_close(folded.reshape(24, -1), want)


def test_only_what_backward_reads_is_saved():
    i = make(rows=64, dtype=torch.float32, mix="one")
    weight, _ = base(i)
    saved = []

    def bytes_saved(names):
        saved.clear()
        leaves = i.leaves(names)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            functional.linear(leaves.x, weight, None, *adapter(leaves)[1:], **options(i))
        parameters = {t.data_ptr() for t in (weight, leaves.a, leaves.b0, leaves.u, leaves.v, leaves.fusion)}
        return sum(t.nbytes for t in saved if t.data_ptr() not in parameters)

    x, h = i.x.nbytes, 64 * i.a.shape[0] * 4
    assert bytes_saved(NAMES) == x + h
    assert bytes_saved(("x", "u", "v", "fusion")) == h  # A frozen: x is not kept
    assert bytes_saved(("x",)) == 0


def test_backward_twice_and_gradients_nobody_asked_for():
    i = make().leaves(("u",))
    y = functional.delta(*adapter(i), **options(i))
    first = torch.autograd.grad(y.sum(), i.u, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), i.u)[0])
    assert i.x.grad is None


WRONG = {
    "x": ({"x": torch.randn(2, 3, 4)}, ValueError, "lilora::delta: a is"),
    "a": ({"a": torch.randn(8, 25)}, ValueError, r"a is \[8, 25\]; it must be \[R, K\] with K = 24"),
    "b0": ({"b0": torch.randn(20, 9)}, ValueError, "b0 is"),
    "no ranks": ({"a": torch.randn(0, 24), "b0": torch.randn(20, 0)}, ValueError, "must be at least 1"),
    "no sub-ranks": ({"u": torch.randn(3, 20, 0), "v": torch.randn(3, 0, 8)}, ValueError, "must be at least 1"),
    "u": ({"u": torch.randn(3, 21, 4)}, ValueError, "u is"),
    "v": ({"v": torch.randn(3, 5, 8)}, ValueError, "v is"),
    "u alone": ({"v": None}, ValueError, "u and v"),
    "fusion": ({"fusion": torch.randn(2)}, ValueError, "fusion is"),
    "task length": ({"task": torch.zeros(5, dtype=torch.int32)}, ValueError, r"task is \[5\]"),
    "task list": ({"task": [0] * 17}, TypeError, r"task is \[0, .*; pass an int32 tensor"),
    "task dtype": ({"task": torch.zeros(17)}, TypeError, "task is torch.float32; it must be torch.int32"),
    "task missing": ({"task": None}, ValueError, "task is None"),
    "task range": ({"task": torch.full((17,), 3, dtype=torch.int32)}, ValueError, "task has the id 3"),
    "gate": ({"gate": torch.randn(4, 7)}, ValueError, "gate is"),
    "gate_row": ({"gate": torch.randn(4, 8)}, ValueError, "gate_row is None"),
    "p": ({"p": 1.0}, ValueError, "p is 1.0"),
    "task of one": (
        {"u": torch.randn(20, 4), "v": torch.randn(4, 8), "fusion": torch.randn(1)},
        ValueError,
        "task is given; u .* is that of one task for all rows",
    ),
    "v of one": (
        {"u": torch.randn(20, 4), "task": None},
        ValueError,
        r"v is \[3, 4, 8\]; it must be \[S, R\] = \[4, 8\]",
    ),
    "seed": ({"p": 0.5}, ValueError, "seed is None"),
    "ranks": ({"ranks": (3, 9)}, ValueError, r"ranks is \[3, 9\]"),
    "integer x": ({"x": torch.ones(17, 24, dtype=torch.int64)}, TypeError, "x is torch.int64"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_bad_arguments_give_one_sentence_in_eager_and_compiled_code(name, mode):
    changes, error, words = WRONG[name]
    i = make(dtype=torch.float32)
    arguments = {"x": i.x, "a": i.a, "b0": i.b0, "u": i.u, "v": i.v, "fusion": i.fusion, "task": i.task, **changes}
    if mode == "eager":
        with pytest.raises(error, match=words):
            functional.delta(**arguments)
        return
    torch._dynamo.reset()
    with pytest.raises(Exception, match=words):  # Dynamo wraps what the fake raises in its own type
        torch.compile(functional.delta, fullgraph=True, backend="eager")(**arguments)


def test_linear_refuses_a_base_that_is_trained_or_of_another_dtype():
    i = make(dtype=torch.float32)
    weight, bias = base(i)
    with pytest.raises(ValueError, match="the base is frozen here"):
        functional.linear(i.x, weight.requires_grad_(), bias, *adapter(i)[1:], **options(i))
    with pytest.raises(TypeError, match=r"use torch\.autocast"):
        functional.linear(i.x, weight.detach().bfloat16(), bias, *adapter(i)[1:], **options(i))


def test_an_ordered_backend_that_cannot_run_raises(monkeypatch):
    i = make(dtype=torch.float32)
    with lilora_kernels.backend("eager"):
        want = functional.delta(*adapter(i), **options(i))
    with (
        lilora_kernels.backend("triton"),
        pytest.raises(RuntimeError, match=r"'triton' cannot run on cpu.*\{'eager': \['composed'\]\}"),
    ):
        functional.delta(*adapter(i), **options(i))
    assert torch.equal(functional.delta(*adapter(i), **options(i)), want)


def test_the_environment_is_read_at_import(monkeypatch):
    monkeypatch.setenv("LILORA_BACKEND", "eager")
    monkeypatch.setenv("LILORA_PLAN", "")
    assert runpy.run_path(backends.__file__)["forced"] == {"backend": "eager", "plan": None}
    for variable, value in (("LILORA_PLAN", "quick"), ("LILORA_BACKEND", "fast")):
        monkeypatch.setenv(variable, value)
        with pytest.raises(ValueError, match=f"{variable} is '{value}'; it must be one of"):
            runpy.run_path(backends.__file__)["choose"]("delta", torch.empty(1, 1), 1, 1)


def test_a_forced_plan(monkeypatch):
    """Alone it takes the first backend that has it; a pair that does not exist, and a plan that cannot run here, raise."""
    i = make(dtype=torch.float32)
    frozen, seen = base(i), []
    run = backends._table["linear"]["eager"].forward

    def watch(patch, *names):
        for name in names:
            able = replace(
                backends._table["linear"][name],
                forward=lambda *a, name=name: seen.append(name) or run(*a),
                unsupported_reason=lambda *_: None,
            )
            patch.setitem(backends._table["linear"], name, able)

    def linear():
        return functional.linear(i.x, *frozen, *adapter(i)[1:], **options(i))

    with monkeypatch.context() as patch:
        watch(patch, "triton", "cpu", "eager")
        for forced in (None, "composed", "decode", "by_phase"):
            with lilora_kernels.plan(forced) if forced else nullcontext():
                linear()
    assert seen == ["triton", "triton", "cpu", "triton"]
    watch(monkeypatch, "triton")
    plans = r"available: \{'triton': \['one_launch', 'composed', 'by_phase'\], 'eager': \['composed'\]\}"
    with (
        lilora_kernels.backend("triton"),
        lilora_kernels.plan("decode"),
        pytest.raises(
            backends.Unsupported,
            match=f"backend 'triton' and the plan 'decode' cannot run on cpu: it has no .*{plans}",
        ),
    ):
        linear()
    monkeypatch.setitem(backends.forced, "plan", "decode")
    with pytest.raises(
        backends.Unsupported,
        match=f"linear: the plan 'decode' cannot run on cpu: cuda: .*; triton: it has no plan .*{plans}",
    ):
        linear()
    rank_gate(torch.randn(1, 4), 2)  # it has no choice of plans
    with lilora_kernels.plan("composed"):
        linear()
    monkeypatch.setitem(backends.forced, "plan", None)
    with pytest.raises(ValueError, match="plan is 'quick'; it must be one of"), lilora_kernels.plan("quick"):
        pass


def test_an_order_holds_in_every_thread():
    """On a GPU autograd calls backward from threads of its own."""
    with ThreadPoolExecutor(1) as pool, lilora_kernels.backend("eager"):
        assert pool.submit(backends.forced.get, "backend").result() == "eager"
        with lilora_kernels.backend("triton"):
            assert pool.submit(backends.forced.get, "backend").result() == "triton"
        assert backends.forced["backend"] == "eager"
    assert backends.forced["backend"] is None
