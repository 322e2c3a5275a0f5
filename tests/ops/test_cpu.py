"""The CPU kernels for decoding against the fp64 oracle and the plain formula, in every instruction set that this processor has.

They are compiled here, whatever is installed.
"""

import ctypes
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import NAMES, SCALING, Errors, adapter, add_errors, base, case_id, make, options, oracle, pairwise
from support.pair_cases import adapters, check_pair

import lilora_kernels
from lilora_kernels import backends, cpu_library, functional
from lilora_kernels.ops import cpu_runtime
from lilora_kernels.ops.linear import eager
from lilora_kernels.ops.schema import AdapterArgs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def decode(kernels):
    """The plan decode, hence no other backend."""
    with backends.plan("decode"):
        yield


def linear(i, weight, bias, **more):
    return functional.linear(i.x, weight, bias, *adapter(i)[1:], **options(i, **more))


def arguments(i, **more):
    return AdapterArgs(i.a, i.b0, i.u, i.v, i.fusion, i.task, i.gate, i.gate_row, None, SCALING, 0.0, None)._replace(
        **more
    )


AXES = {
    "rows": [0, 1, 2, 3, 7, 17, 64],
    "columns": [1, 24, 33, 1100],
    "outputs": [1, 20, 47],
    "rank": [1, 4, 13, 600],
    "sub_rank": [1, 8, 19],
    "tasks": [1, 3, 8],
    "coefficients": ["fusion", "plain", "lora"],
    "mix": ["one", "same", "distinct", "sorted", "random"],
    "gate": [False, True],
    "dtype": DTYPES,
    "op": ["delta", "linear"],
}


@pytest.mark.parametrize("case", pairwise(AXES), ids=case_id)
def test_outputs_are_as_good_as_the_plain_formula(case, instructions):
    shape = {name: value for name, value in case.items() if name != "op"}
    errors = Errors()
    for seed in range(3):
        add_errors(errors, make(**shape, seed=seed), case["op"], ())
    errors.check()


@pytest.mark.parametrize("op", ["delta", "linear"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_as_good_as_the_plain_formula(dtype, op):
    """Those of the eager backend, from the h that the kernels have saved."""
    errors = Errors()
    for seed in range(8):
        add_errors(errors, make(gate=True, dtype=dtype, seed=seed), op)
    errors.check()


@pytest.mark.parametrize("bases", [True, False])
def test_two_adapters_of_one_input(bases):
    everything = ("x", *NAMES[1:])
    check_pair(20, "random", 0.0, (everything, everything), bases)
    i = make(rows=5, dtype=torch.float32)
    wrong = i.with_(task=torch.full((5,), 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="task has the id 3"):
        functional.delta_pair(i.x, adapters(i), adapters(i), task=wrong.task)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coefficients", ["fusion", "lora"])
@pytest.mark.parametrize("rows, mix", [(1, "one"), (7, "random"), (64, "distinct")])
def test_two_sides_have_the_bits_of_two_calls(rows, mix, coefficients, dtype, instructions):
    sizes = {
        "rows": rows,
        "columns": 600,
        "rank": 13,
        "sub_rank": 5,
        "coefficients": coefficients,
        "mix": mix,
        "dtype": dtype,
    }
    first = make(outputs=47, **sizes, seed=1)
    second = make(outputs=20, **sizes, seed=2).with_(x=first.x, task=first.task)
    sides = [(arguments(i), *base(i, bias=i is first)) for i in (first, second)]
    for of_both in (sides, [side[:1] for side in sides], sides[::-1]):
        both = cpu_runtime.forward("delta_pair", first.x, *of_both)
        for got, side in zip(both, of_both, strict=True):
            ((y, h),) = cpu_runtime.forward("linear", first.x, side)
            assert torch.equal(got[0], y)
            assert torch.equal(got[1], h)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_size_any_stride_and_masters_in_fp32(dtype, instructions):
    errors = Errors()

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(
        rows=st.integers(0, 64),
        columns=st.integers(1, 70),
        outputs=st.integers(1, 20),
        rank=st.integers(1, 40),
        sub_rank=st.integers(1, 40),
        tasks=st.integers(1, 6),
        coefficients=st.sampled_from(AXES["coefficients"]),
        mix=st.sampled_from(AXES["mix"]),
        gate=st.booleans(),
        masters=st.sets(st.sampled_from(("weight", "bias", *NAMES[1:]))),
        layout=st.sampled_from(["rows apart", "columns apart", "every row the same"]),
    )
    def run(rows, columns, outputs, rank, sub_rank, tasks, coefficients, mix, gate, masters, layout):
        i = make(rows, columns, outputs, rank, sub_rank, tasks, coefficients, mix, gate).to(dtype)
        weight, bias = base(i)
        if layout == "every row the same":
            i = i.with_(x=i.x[:1].expand(rows, columns))
        else:
            x = torch.full(
                (rows, columns + 3) if layout == "rows apart" else (columns, rows + 2), torch.nan, dtype=dtype
            )
            x = x[:, :columns] if layout == "rows apart" else x.T[:rows]
            i = i.with_(x=x.copy_(i.x))
        wide = i.to(torch.float64)
        truth = oracle(wide, SCALING) + F.linear(wide.x, weight.double(), bias.double())
        with backends.backend("eager"), backends.plan("composed"):
            plain = linear(i, weight, bias)
        given = i.with_(**{n: t.float() for n in masters if (t := getattr(i, n, None)) is not None})
        weight, bias = (t.float() if n in masters else t for n, t in (("weight", weight), ("bias", bias)))
        y, h = cpu_runtime.forward("linear", given.x, (arguments(given), weight, bias))[0]
        assert y.dtype == h.dtype == dtype
        errors.add("y", y, plain, truth)
        errors.add("h", h, F.linear(i.x, i.a), F.linear(wide.x, wide.a))

    run()
    errors.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_rounded_to(dtype, instructions):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)

    def product(x, weight):
        """x weight^T by a `linear` whose adapter is zero."""
        a, b0 = x.new_zeros(1, x.shape[1]), x.new_zeros(len(weight), 1)
        call = AdapterArgs(a, b0, None, None, None, None, None, None, None, 1.0, 0.0, None)
        return cpu_runtime.forward("linear", x, (call, weight))[0][0]

    one = torch.ones(1, 1, dtype=dtype)
    for columns in (1, 16):  # a tail, and a whole register
        y = product(F.pad(one, (0, columns - 1)), F.pad(every.unsqueeze(1), (0, columns - 1)))
        torch.testing.assert_close(y[0], every, rtol=0, atol=0, equal_nan=True)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,)).to(torch.int32)
    bits[: 1 << 14] &= -(1 << 12)  # of these many lie in the middle between two numbers
    subnormal, largest = torch.randn(1 << 14) * 6e-8, torch.tensor([65519.9, 65520.0])
    numbers = torch.cat([bits.view(torch.float32), subnormal, every.float(), largest])
    y = product(one, numbers.unsqueeze(1))
    torch.testing.assert_close(y[0], numbers.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["delta", "linear"])
def test_a_row_has_the_same_bits_in_any_company(op, dtype, instructions):
    for seed in range(3):
        i = make(rows=64, columns=1100, outputs=11, rank=13, sub_rank=5, gate=True, dtype=dtype, seed=seed)
        frozen = base(i) if op == "linear" else (None, None)

        def run(rows, i=i, frozen=frozen):
            part = i.with_(x=i.x[rows], task=i.task[rows], gate_row=i.gate_row[rows])
            return cpu_runtime.forward(op, part.x, (arguments(part), *frozen))[0]

        all_rows = run(torch.arange(64))
        for rows in (*torch.arange(64).split(1), *torch.randperm(64).split(7), torch.arange(63, -1, -1)):
            for whole, part in zip(all_rows, run(rows), strict=True):
                assert torch.equal(whole[rows], part)


def test_a_row_has_the_same_bits_whoever_computes_it(kernels, instructions):
    i = make(rows=9, columns=500, outputs=300, rank=64, sub_rank=40, tasks=4)
    i, frozen, shares = i.to(torch.float32), base(i, torch.float32), []
    items = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, items, ctypes.c_void_p)
    def parallel_for(begin, end, grain, run, context):
        middle = (begin + end) // 3
        run(middle, end, context)
        run(begin, middle, context)
        shares.append((end, grain))
        return 0

    assert kernels.parallel_for != 0
    by_torch = linear(i, *frozen)
    kernels.parallel_for = ctypes.cast(parallel_for, ctypes.c_void_p).value
    by_parts = linear(i, *frozen)
    kernels.parallel_for = 0
    alone = linear(i, *frozen)
    assert torch.equal(by_torch, alone)
    assert torch.equal(by_parts, alone)
    assert len(shares) == 3
    assert all(0 < grain < end for end, grain in shares)


THREADS = """
import os, sys, torch
from pathlib import Path
from lilora_kernels import cpu_library, functional
count = lambda: len(os.listdir("/proc/self/task"))
kernels = cpu_library.Kernels(Path(sys.argv[1]))
cpu_library.load = lambda: kernels
torch.set_num_threads(2)
x, weight, a, b0 = torch.randn(8, 512), torch.randn(600, 512), torch.randn(64, 512), torch.randn(600, 64)
alone = count()
x.repeat(64, 1) @ weight.T + torch.randn(1 << 20).exp_().sum()
before = count()
two = [functional.linear(x, weight, None, a, b0) for _ in range(100)][-1]
after = count()
torch.set_num_threads(1)
print(alone < before, after - before, torch.equal(two, functional.linear(x, weight, None, a, b0)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it counts threads in /proc")
def test_no_threads_but_those_of_torch(library):
    """In a process of its own: how many threads torch has started is seen only once."""
    environment = os.environ | {"LILORA_PLAN": "decode", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", THREADS, str(library)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["True", "0", "True"], result.stderr


def test_a_nan_stays_in_the_rows_of_its_task(instructions):
    i = make(rows=12, outputs=11, gate=True, dtype=torch.float32)
    i = i.with_(task=torch.tensor([0, 1, 2, -1] * 3, dtype=torch.int32))
    frozen = base(i)
    clean = linear(i, *frozen)
    for name in ("u", "v", "fusion"):
        broken = i.leaves(()).with_()
        getattr(broken, name)[1] = torch.nan
        y = linear(broken, *frozen)
        assert y[i.task == 1].isnan().all()
        assert torch.equal(y[i.task != 1], clean[i.task != 1])
    broken = i.leaves(())
    broken.b0[:] = torch.nan
    y = linear(broken, *frozen)
    assert torch.equal(y[3], linear(i.with_(x=i.x[3:4], task=i.task[3:4], gate_row=i.gate_row[3:4]), *frozen)[0])
    assert y[i.task >= 0].isnan().all()
    broken = i.leaves(())
    broken.x[4, 0] = torch.inf
    others = torch.arange(12) != 4
    assert torch.equal(linear(broken, *frozen)[others], clean[others])


@pytest.mark.parametrize("op", ["delta", "linear"])
def test_factors_of_one_task_without_a_dimension_of_tasks(op):
    i = make(rows=3, tasks=1, mix="one", dtype=torch.float32)
    frozen = base(i) if op == "linear" else (None, None)
    flat = i.with_(u=i.u[0], v=i.v[0])
    for one, other in zip(
        *(cpu_runtime.forward(op, i.x, (arguments(each), *frozen))[0] for each in (i, flat)), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "field, ids", [("task", [0, 3]), ("task", [-2, 1]), ("gate_row", [4, 0]), ("gate_row", [0, -5])]
)
def test_a_wrong_id_raises_what_eager_raises(field, ids):
    i = make(rows=2, gate=True, dtype=torch.float32).with_(**{field: torch.tensor(ids, dtype=torch.int32)})
    raised = []
    for name, plan in (("cpu", "decode"), ("eager", "composed")):
        with backends.backend(name), backends.plan(plan), pytest.raises((ValueError, IndexError)) as error:
            linear(i, *base(i))
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]


def test_ids_without_any_task_raise(monkeypatch):
    i = make(rows=2, dtype=torch.float32)
    none = i.with_(u=i.u[:0], v=i.v[:0], fusion=i.fusion[:0], task=torch.zeros(2, dtype=torch.int32))
    with backends.plan("composed"), pytest.raises(ValueError, match="task has the id 0") as error:
        linear(none, *base(i))
    with monkeypatch.context() as patch:
        patch.setitem(backends.forced, "plan", None)
        with pytest.raises(ValueError, match=re.escape(str(error.value))):
            linear(none, *base(i))


@pytest.mark.parametrize("rows, plan, taken", [(8, None, 1), (9, None, 0), (9, "decode", 1), (64, "decode", 1)])
def test_a_processor_that_multiplies_bf16_itself_decodes_few_rows_of_it(rows, plan, taken, monkeypatch):
    library = cpu_runtime.cpu_library.load()
    decode, seen = library.decode, []
    monkeypatch.setattr(library, "has_bf16", True)
    monkeypatch.setattr(library, "decode", lambda *call: seen.append(call) or decode(*call))
    for dtype, count in ((torch.bfloat16, taken), (torch.float32, 1)):
        i = make(rows=rows, dtype=dtype)
        seen.clear()
        with monkeypatch.context() as patch, backends.backend("cpu"):
            patch.setitem(backends.forced, "plan", plan)
            linear(i, *base(i))
        assert len(seen) == count


def test_what_the_kernels_cannot_run_is_composed_or_raises():
    many = make(rows=cpu_runtime.DECODE_ROWS + 1, dtype=torch.float32)
    few = make(rows=5, dtype=torch.float32)
    seed = torch.tensor([3])
    strided = few.with_(b0=few.b0.T.contiguous().T)
    cases = [
        (many, {}, "it takes up to 64 rows, here are 65"),
        (few, {"p": 0.5, "seed": seed}, "it has no dropout"),
        (strided, {}, "its parameters and ids must be contiguous"),
        (few.with_(gate=few.a[:1, :8].double()), {}, r"it does not support torch\.float64"),
    ]
    for i, more, reason in cases:
        words = (
            f"linear: the plan 'decode' cannot run here: {reason}; 'cpu' has \\['decode', 'composed', 'one_launch'\\]"
        )
        with pytest.raises(backends.Unsupported, match=words):
            linear(i, *base(i), **more)
        composed = []
        for name in ("cpu", "eager"):
            with backends.backend(name), backends.plan("composed"):
                composed.append(linear(i, *base(i), **more))
        assert torch.equal(*composed)


def test_the_kernels_are_the_first_choice_for_few_rows(monkeypatch):
    i = make(rows=5, dtype=torch.float32)
    frozen = base(i)
    decoded = linear(i, *frozen)
    with monkeypatch.context() as patch:
        patch.setitem(backends.forced, "plan", None)
        patch.setattr(eager, "forward", None)
        assert backends.unsupported_reasons("linear", i.x, 8, 4)["cpu"] is None
        assert torch.equal(linear(i, *frozen), decoded)


def test_why_the_kernels_cannot_run(monkeypatch):
    def reason(x):
        return backends.unsupported_reasons("linear", x, 8, 4)["cpu"]

    assert reason(torch.empty(1, 1, device="meta")) == "it needs tensors on the CPU"
    assert reason(torch.empty(1, 1, dtype=torch.float64)) == "it does not support torch.float64"
    monkeypatch.setattr(cpu_library, "load", lambda: "it was not built")
    assert reason(torch.empty(1, 1)) == "it was not built"
    assert reason(torch.empty(1, 1, dtype=torch.float64)) == "it does not support torch.float64"
    with lilora_kernels.backend("cpu"), pytest.raises(backends.Unsupported, match=r"'cpu' .* it was not built"):
        functional.delta(*adapter(i := make(dtype=torch.float32)), **options(i))


def test_the_instruction_set_can_be_capped(library, monkeypatch):
    most = cpu_library.Kernels(library).instructions
    for number, name in enumerate(cpu_library.INSTRUCTIONS, 1):
        monkeypatch.setenv("LILORA_CPU_ISA", name)
        assert cpu_library.Kernels(library).instructions == min(number, most)
    monkeypatch.setenv("LILORA_CPU_ISA", "sse")
    with pytest.raises(
        ValueError, match=r"LILORA_CPU_ISA is 'sse'; it must be one of \['baseline', 'avx2', 'avx512'\]"
    ):
        cpu_library.Kernels(library)
