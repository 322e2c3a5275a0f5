"""Every launch of the shipped Triton configurations compiles ahead of time, without a GPU, and fits its architecture.

What it takes is read from the record of `tools/resources.py`, once its key has shown that the record is of what is launched now.
"""

from pathlib import Path

import pytest
import torch
from support.cases import make

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from lilora_kernels.ops import barrier
from lilora_kernels.ops.delta import triton_backend, triton_backward, triton_configs, triton_jobs, triton_rows
from lilora_kernels.ops.rank_gate import triton_backend as rank_gate
from lilora_kernels.ops.schema import DIFFERENTIABLE, AdapterArgs
from tools import resources
from tools.resources import Case, program

ROOT = Path(__file__).parents[2]
RECORD = resources.read()
LAUNCHES = [(arch, *launch) for arch in resources.SHARED_MEMORY for launch in resources.shipped(arch)]


@pytest.fixture
def taken():
    """What a launch takes, as the record says; fails if that is not of it. Another Triton than the record's compiles."""

    def taken(arch, kernel, rows, variant="standard"):
        case = Case(arch, kernel, rows, variant)
        if RECORD.triton not in ("", triton.__version__):
            return case.compiled()
        key, used = RECORD.launches.get(case, (None, None))
        if key != case.program().key:
            pytest.fail(f"RESOURCES.json is not of today's {case}: run `make resources`", pytrace=False)
        return used

    return taken


def test_the_record_is_of_the_pinned_triton():
    assert f"triton=={RECORD.triton}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_record_has_every_launch_and_no_other_and_its_table_is_committed(taken):
    for case in resources.cases():
        taken(*case)
    again = "is not of today's launches: run `make resources`"
    assert RECORD.launches.keys() == set(resources.cases()), f"RESOURCES.json {again}"
    assert (ROOT / "lilora_kernels/ops/RESOURCES.md").read_text() == resources.table(RECORD) + "\n", (
        f"RESOURCES.md {again}"
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(80, "compose", 4096, "masters"),
        Case(89, "rank_gate", 0, "fp16"),
        Case(90, "expand", 4097),
        Case(100, "shrink", 256),
    ],
    ids=str,
)
def test_what_is_compiled_now_takes_what_the_record_says(case, taken, monkeypatch):
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)  # whatever Triton's cache has
    assert taken(*case) == case.compiled()


def test_a_key_tells_apart_all_that_decides_what_is_compiled():
    present = triton_configs.delta_backward(1, False)
    found = [program("delta_backward", 80, 1).key, program("delta_backward", 89, 1).key]
    for name, size in present.items() - {"CHUNK": 256}.items():
        found.append(program("delta_backward", 80, 1, sizes=present | {name: 2 * size}).key)
    found += [program("delta_backward", 80, 1, resources.VARIANTS[name]).key for name in resources.OTHERS]
    assert len(set(found)) == len(found)
    assert program("delta_backward", 80, 1, sizes=present).key == found[0]


@pytest.mark.parametrize(
    "owner, name, value, unchanged",
    [
        (triton_rows.grid_barrier, "raw_src", ["def grid_barrier(state):\n", "    pass\n"], {"add_partials", "from_x"}),
        (triton_rows.END, "value", 7, {"add_partials"}),
        (triton_backward, "SUM_BLOCK", triton.language.constexpr(7), {"from_x"}),
        (triton_rows.Rows, "_fields", ("a",), {"add_partials"}),
        (triton, "__version__", "0.0", set()),
    ],
    ids=["function", "constant", "constant of one module", "named tuple", "Triton"],
)
def test_a_key_changes_with_what_a_kernel_is_made_of(owner, name, value, unchanged, monkeypatch):
    def keys():
        return {kernel: program(kernel, 80, 1).key for kernel in ("delta_backward", "from_x", "add_partials")}

    before = keys()
    monkeypatch.setattr(owner, name, value)
    assert {kernel for kernel, key in keys().items() if key == before[kernel]} == unchanged


def test_what_a_key_cannot_be_made_of_is_refused(monkeypatch):
    monkeypatch.setattr(triton_rows, "END", 7)
    with pytest.raises(TypeError, match=r"triton_rows.*: END is 7: tools.resources cannot tell"):
        program("from_x", 80, 1).key  # noqa: B018


@pytest.mark.parametrize("arch, kernel, rows", LAUNCHES, ids=lambda each: str(each))
def test_no_spills_and_fitting_shared_memory(arch, kernel, rows, taken):
    used = taken(arch, kernel, rows)
    assert used.spills == 0
    assert used.shared <= resources.SHARED_MEMORY[arch] * 1024
    assert used.tensor_cores == (kernel != "add_partials")
    sizes = chosen(arch, kernel, rows)
    assert fits(used, sizes, arch) >= sizes.get("PROGRAMS", 1)


def chosen(arch, kernel, rows):
    return triton_configs.chosen((f"sm_{arch}",), kernel, triton_configs.bucket(rows))


def fits(used, sizes, arch):
    """How many programs one multiprocessor holds at once: 64 K registers, 1 KB of shared memory taken by each program."""
    registers = -(-used.registers // 8) * 8 * 32 * sizes["num_warps"]
    return min(65536 // registers, (resources.SHARED_MEMORY[arch] + 1) * 1024 // (used.shared + 1024))


@pytest.mark.parametrize("arch", [89, 90])
@pytest.mark.parametrize("kernel", ["expand", "from_dy"])
def test_the_passes_over_the_outputs_do_not_spill_for_one_task(arch, kernel, taken):
    for rows in (1024, 8192):
        assert taken(arch, kernel, rows, "one-task").spills == 0


@pytest.mark.parametrize("kernel", resources.AT_ONCE)
@pytest.mark.parametrize("other", resources.OTHERS)
def test_other_variants_fit_the_smallest_shared_memory(other, kernel, taken):
    used = taken(89, kernel, 8192, other)
    assert used.shared <= resources.SHARED_MEMORY[89] * 1024
    assert used.tensor_cores == (other != "fp32")  # fp32 products are exact, on the ordinary cores


@pytest.mark.parametrize("kernel", ["delta_forward", *resources.JOBS])
@pytest.mark.parametrize("other", ["ranks-128", "ranks-128-masters"])
def test_the_largest_factors_fit_the_smallest_shared_memory(other, kernel, taken):
    for rows in (1024, 8192):
        assert taken(89, kernel, rows, other).shared <= resources.SHARED_MEMORY[89] * 1024


@pytest.mark.parametrize("arch", [89, 90, 100])
@pytest.mark.parametrize("kernel", ["shrink", "from_x"])
def test_the_passes_over_x_of_a_pair_do_not_spill(arch, kernel, taken):
    for rows in (1, 1024, 8192):
        used = taken(arch, kernel, rows, "pair")
        assert used.spills == 0
        assert used.shared <= resources.SHARED_MEMORY[arch] * 1024


def test_variants_do_not_multiply_with_the_number_of_rows(monkeypatch):
    """What Triton compiles for: which arguments are None, the constants, and the integers that it specialises."""
    variants = set()

    def recording(made, items, device, groups, tensors, numbers, waits=None):
        kernel = made.kernel
        names = kernel.arg_names[-len(numbers) - 1 : -1]
        fixed = [n for name, n in zip(names, numbers, strict=True) if name not in kernel.do_not_specialize]
        given = [t is None for group in (*groups, tensors) for t in group]
        variants.add((kernel, tuple(given), tuple(fixed), tuple(made.items())))

    monkeypatch.setattr(triton_jobs, "run", recording)
    for rows in range(1, 128, 3):
        i = make(rows=rows, columns=128, outputs=96, rank=16, sub_rank=8, tasks=1 + rows % 7, dtype=torch.float16)
        args = AdapterArgs(i.a, i.b0, i.u, i.v, i.fusion, i.task, None, None, None, 1.0, 0.0, None)
        _, h = triton_backend.forward(i.x, args)
        triton_backend.backward(torch.randn(rows, 96).half(), i.x, h, args, frozenset(DIFFERENTIABLE) - {"gate"})
    assert len(variants) == 2


def binder(kernel):
    """bind(*arguments, **constants)[1]: what Triton compiles them for, its own key, without a GPU."""
    return create_function_from_signature(kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", 90, 32)))


def slots(count):
    """The states of `count` streams of one device."""
    found = []
    for stream in range(1, count + 1):
        found.append(barrier.barrier_state(torch.device("cpu")))
        barrier._states[torch.device("cpu"), stream] = barrier._states.pop((torch.device("cpu"), 0))
    return found


@pytest.fixture
def fresh_slots(monkeypatch):
    monkeypatch.setattr(barrier, "_states", {})
    monkeypatch.setattr(barrier, "_blocks", {})


def test_every_stream_has_a_line_of_memory_for_its_barrier(fresh_slots):
    states = slots(barrier.SLOTS + 2)
    assert all(not state.any() and state.dtype == torch.int32 for state in states)
    addresses = [state.data_ptr() for state in states]
    first, second = sorted(addresses[: barrier.SLOTS]), sorted(addresses[barrier.SLOTS :])
    for block in (first, second):  # a block of CUDA begins at a multiple of 512 bytes
        assert all((address - block[0]) % 128 == 0 for address in block)
        assert len(set(block)) == len(block)


@pytest.mark.parametrize("shift", range(1, 4))
def test_calls_of_the_same_shapes_are_one_variant(shift, fresh_slots, monkeypatch):
    """Another stream, ids, seeds and fusions cut out of longer tensors, other numbers that shapes do not fix."""
    variants, states = {}, slots(8)

    def recording(made, items, device, groups, tensors, numbers, waits=None):
        for state in (*states, torch.zeros(8, dtype=torch.int32)[shift:]):
            key = binder(made.kernel)(*groups, *tensors, state, *numbers, **made)[1]
            variants.setdefault(made.kernel, set()).add(tuple(key))

    def cut(tensor, by):
        return torch.cat([tensor[:1].expand(by, *tensor.shape[1:]), tensor])[by:]

    monkeypatch.setattr(triton_jobs, "run", recording)
    i = make(rows=40, columns=128, outputs=96, rank=16, sub_rank=8, tasks=3, gate=True, dtype=torch.float16)
    for by, p, ranks in ((0, 0.5, None), (shift, 0.1, (1, 16)), (shift, 0.3, (0, 1))):
        task, gate_row, fusion = (cut(t, by) for t in (i.task, i.gate_row, i.fusion))
        seed = cut(torch.tensor([1]), by)
        args = AdapterArgs(i.a, i.b0, i.u, i.v, fusion, task, i.gate, gate_row, seed, 1.0, p, ranks)
        _, h = triton_backend.forward(i.x, args)
        triton_backend.backward(torch.randn(40, 96).half(), i.x, h, args, frozenset(DIFFERENTIABLE))
    assert {kernel.__name__: len(keys) for kernel, keys in variants.items()} == {
        "delta_forward": 1,
        "delta_backward": 1,
    }


@pytest.mark.parametrize("arch", resources.SHARED_MEMORY)
@pytest.mark.parametrize("name", resources.COMPOSED)
def test_the_kernels_of_the_composed_plan_do_not_spill(name, arch, taken):
    for variant in ("standard", "ranks-256", "masters"):
        used = taken(arch, name, 4096, variant)
        assert used.spills == 0
        assert used.shared <= resources.SHARED_MEMORY[arch] * 1024
        assert used.tensor_cores == (name != "sum_gradients")


@pytest.mark.parametrize("arch", resources.SHARED_MEMORY)
@pytest.mark.parametrize("variant", ["standard", "fp16", "fp32"])
def test_the_kernel_of_rank_gate_does_not_spill(variant, arch, taken):
    used = taken(arch, "rank_gate", 0, variant)
    assert used.spills == 0
    assert used.registers <= 64  # 32 warps a multiprocessor
    assert used.shared <= 1024


def test_the_kernel_of_rank_gate_is_compiled_once_for_each_dtype():
    """Scores of any shape, layout and alignment."""
    bind = binder(rank_gate.kernels.rank_gate)
    keys = set()
    for rows, n, r in ((1, 1, 1), (1, 12, 8), (5, 256, 64), (7, 4097, 100)):
        for scores in (torch.randn(rows, n), torch.randn(n, rows).T, torch.randn(rows, n + 1)[:, 1:]):
            gate, chosen = scores.new_empty(rows, n), scores.new_empty(rows, r, dtype=torch.int64)
            _, key, _ = bind(scores, gate, chosen, n, r, *scores.stride(), **rank_gate.CONSTANTS)
            keys.add(tuple(key))
    assert len(keys) == 1


@pytest.mark.parametrize("variant", ["masters", "ranks-256"])
def test_the_programs_of_a_launch_fit_for_wider_elements_too(variant, taken):
    for kernel in resources.AT_ONCE:
        for rows in (1, 8192):
            used = taken(90, kernel, rows, variant)
            assert fits(used, chosen(90, kernel, rows), 90) >= 1
