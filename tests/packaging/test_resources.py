"""Every launch of the shipped Triton configurations compiles ahead of time, without a GPU, and fits its architecture."""

from pathlib import Path

import pytest
import torch
from support.cases import make

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from lilora_kernels.ops import barrier
from lilora_kernels.ops.delta import triton_backend, triton_configs, triton_jobs
from lilora_kernels.ops.rank_gate import triton_backend as rank_gate
from lilora_kernels.ops.schema import DIFFERENTIABLE, AdapterArgs
from tools import resources
from tools.resources import Variant

LAUNCHES = [(arch, *launch) for arch in resources.SHARED_MEMORY for launch in resources.shipped(arch)]


@pytest.mark.parametrize("arch, kernel, rows", LAUNCHES, ids=lambda each: str(each))
def test_no_spills_and_fitting_shared_memory(arch, kernel, rows):
    used = resources.compile_kernel(kernel, arch, rows)
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
def test_the_passes_over_the_outputs_do_not_spill_for_one_task(arch, kernel):
    for rows in (1024, 8192):
        assert resources.compile_kernel(kernel, arch, rows, Variant(tasks=1)).spills == 0


OTHERS = {
    "fp16": Variant(dtype=torch.float16),
    "fp32": Variant(dtype=torch.float32),
    "masters": Variant(masters=torch.float32),
    "gate": Variant(gate=True),
    "one-task": Variant(tasks=1),
    "plain": Variant(fusion=False),
    "lora": Variant(sub_rank=0, tasks=1),
    "lora-gate": Variant(sub_rank=0, tasks=1, gate=True),
    "frozen": Variant(needs=frozenset({"x", "u", "v", "fusion"})),
    "dx-alone": Variant(needs=frozenset({"x"})),
    "no-dropout": Variant(p=0.0),
    "ranks-256": Variant(rank=256, sub_rank=128),
    "ranks-5": Variant(rank=5, sub_rank=3),
}


@pytest.mark.parametrize("kernel", resources.AT_ONCE)
@pytest.mark.parametrize("other", OTHERS)
def test_other_variants_fit_the_smallest_shared_memory(other, kernel):
    used = resources.compile_kernel(kernel, 89, 8192, OTHERS[other])
    assert used.shared <= resources.SHARED_MEMORY[89] * 1024
    assert used.tensor_cores == (other != "fp32")  # fp32 products are exact, on the ordinary cores


@pytest.mark.parametrize("arch", [89, 90, 100])
@pytest.mark.parametrize("kernel", ["shrink", "from_x"])
def test_the_passes_over_x_of_a_pair_do_not_spill(arch, kernel):
    for rows in (1, 1024, 8192):
        used = resources.compile_kernel(kernel, arch, rows, Variant(pair=True))
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
def test_the_kernels_of_the_composed_plan_do_not_spill(name, arch):
    for rank, sub_rank, masters in ((128, 64, None), (256, 128, None), (128, 64, torch.float32)):
        used = resources.compile_kernel(name, arch, 4096, Variant(masters=masters, rank=rank, sub_rank=sub_rank))
        assert used.spills == 0
        assert used.shared <= resources.SHARED_MEMORY[arch] * 1024
        assert used.tensor_cores == (name != "sum_gradients")


@pytest.mark.parametrize("arch", resources.SHARED_MEMORY)
@pytest.mark.parametrize("dtype", resources.FLOATS, ids=str)
def test_the_kernel_of_rank_gate_does_not_spill(dtype, arch):
    used = resources.compile_rank_gate(arch, dtype)
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


def test_the_committed_table_has_every_launch():
    text = (Path(__file__).parents[2] / "lilora_kernels/ops/RESOURCES.md").read_text()
    rows = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in text.splitlines() if "| sm_" in line]
    want = [(f"sm_{arch}", kernel, str(fewest)) for arch, kernel, fewest in LAUNCHES]
    want += [(f"sm_{arch}", name, "any") for arch in resources.SHARED_MEMORY for name in resources.COMPOSED]
    want += [(f"sm_{arch}", "rank_gate", "any") for arch in resources.SHARED_MEMORY]
    assert rows == want


@pytest.mark.parametrize("variant", ["masters", "ranks-256"])
def test_the_programs_of_a_launch_fit_for_wider_elements_too(variant):
    for kernel in resources.AT_ONCE:
        for rows in (1, 8192):
            used = resources.compile_kernel(kernel, 90, rows, OTHERS[variant])
            assert fits(used, chosen(90, kernel, rows), 90) >= 1
