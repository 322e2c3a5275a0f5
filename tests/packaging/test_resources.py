"""Every launch of the shipped Triton configurations compiles ahead of time, without a GPU, and fits its architecture."""

from pathlib import Path

import pytest
import torch
from cases import make

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from lilora_kernels import resources
from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.call import DIFFERENTIABLE
from lilora_kernels.ops.delta import triton_backend
from lilora_kernels.ops.rank_gate import triton_backend as rank_gate

LAUNCHES = [(arch, *launch) for arch in resources.SHARED_MEMORY for launch in resources.launches(arch)]


def launch_id(launch):
    arch, kernel, rows, _, first, last = launch
    return f"sm_{arch}-{kernel}-{rows}-{first}-{last}"


@pytest.mark.parametrize("launch", LAUNCHES, ids=launch_id)
def test_no_spills_and_fitting_shared_memory(launch):
    arch, kernel, _, bucket, first, last = launch
    used = resources.compile_kernel(kernel, arch, bucket, first, last)
    assert used.spills == 0
    assert used.shared <= resources.SHARED_MEMORY[arch] * 1024
    sums_only = (kernel, first, last) == ("backward", 3, 3)
    assert used.tensor_cores or sums_only
    assert fits(used, bucket, arch) >= bucket.get("PROGRAMS", 1)


def fits(used, bucket, arch):
    """How many programs one multiprocessor holds at once: 64 K registers, 1 KB of shared memory taken by each program."""
    registers = -(-used.registers // 8) * 8 * 32 * bucket["num_warps"]
    return min(65536 // registers, (resources.SHARED_MEMORY[arch] + 1) * 1024 // (used.shared + 1024))


@pytest.mark.parametrize("arch", [89, 90])
@pytest.mark.parametrize("kernel, phase", [("forward", 2), ("backward", 0)])
def test_the_passes_over_the_outputs_do_not_spill_for_one_task(arch, kernel, phase):
    absent = resources.GATE | resources.PAIR | {"task", "present"}
    for bucket in triton_runtime.table((f"sm_{arch}",))["by_phase"][kernel]:
        assert resources.compile_kernel(kernel, arch, bucket, phase, phase, absent=absent).spills == 0


UP = frozenset(
    {"u", "v", "fusion", "z", "du", "dv", "dfusion", "present", "scaled_q_u", "dfusion_rows", "du_planes", "dv_planes"}
)
OUTPUTS = UP - {"u", "v", "fusion", "z"} | {"da", "db0", "dgate", "da_planes", "db0_planes", "dq_h"}
OTHERS = {
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
    "masters": {"masters": torch.float32},
    "gate": {"absent": resources.PAIR},
    "one-task": {"absent": resources.GATE | resources.PAIR | {"task", "present"}},
    "plain": {"absent": resources.GATE | resources.PAIR | {"fusion", "dfusion", "dfusion_rows"}},
    "lora": {"absent": UP | resources.GATE | resources.PAIR | {"task"}, "sub_rank": 1},
    "lora-gate": {"absent": UP | resources.PAIR, "sub_rank": 1},
    "frozen": {"absent": resources.GATE | resources.PAIR | {"da", "db0", "da_planes", "db0_planes"}},
    "dx-alone": {"absent": OUTPUTS | resources.GATE | resources.PAIR},
    "no-dropout": {"absent": resources.GATE | resources.PAIR | {"seed"}},
    "ranks-256": {"rank": 256, "sub_rank": 128},
    "ranks-5": {"rank": 5, "sub_rank": 3},
}


@pytest.mark.parametrize("kernel, last", [("forward", 2), ("backward", 3)])
@pytest.mark.parametrize("other", OTHERS)
def test_other_variants_fit_the_smallest_shared_memory(other, kernel, last):
    buckets = triton_runtime.table(())["one_launch"][kernel]
    used = resources.compile_kernel(kernel, 89, buckets[-1], 0, last, **OTHERS[other])
    assert used.shared <= resources.SHARED_MEMORY[89] * 1024
    assert used.tensor_cores == (other != "fp32")  # fp32 products are exact, on the ordinary cores


@pytest.mark.parametrize("arch", [89, 90])
@pytest.mark.parametrize("kernel, phase", [("forward", 0), ("backward", 2)])
def test_the_passes_over_x_of_a_pair_do_not_spill(arch, kernel, phase):
    for bucket in triton_runtime.table((f"sm_{arch}",))["by_phase"][kernel]:
        used = resources.compile_kernel(kernel, arch, bucket, phase, phase, absent=resources.GATE)
        assert used.spills == 0
        assert used.shared <= resources.SHARED_MEMORY[arch] * 1024


def test_variants_do_not_multiply_with_the_number_of_rows(monkeypatch):
    """What Triton compiles for: which arguments are None, the constants, and the integers that it specialises."""
    variants = set()

    def recording(kernel, device, first, last, items, tensors, numbers, constants):
        names = kernel.arg_names[len(tensors) + 1 :]
        fixed = [n for name, n in zip(names, numbers, strict=False) if name not in kernel.do_not_specialize]
        variants.add((kernel, first, tuple(t is None for t in tensors), tuple(fixed), tuple(constants.items())))

    monkeypatch.setattr(triton_backend, "run", recording)
    for rows in range(1, 65):
        i = make(rows=rows, columns=128, outputs=96, rank=16, sub_rank=8, tasks=1 + rows % 7, dtype=torch.float16)
        call = triton_backend.Call(i.a, i.b0, i.u, i.v, i.fusion, i.task, None, None, None, 1.0, 0.0, None)
        _, h = triton_backend.forward(i.x, call)
        triton_backend.backward(torch.randn(rows, 96).half(), i.x, h, call, frozenset(DIFFERENTIABLE) - {"gate"})
    assert len(variants) == 2


@pytest.mark.parametrize("arch", resources.SHARED_MEMORY)
@pytest.mark.parametrize("dtype", resources.TYPES, ids=str)
def test_the_kernel_of_rank_gate_does_not_spill(dtype, arch):
    used = resources.compile_rank_gate(arch, dtype)
    assert used.spills == 0
    assert used.registers <= 64  # 32 warps a multiprocessor
    assert used.shared <= 1024


def test_the_kernel_of_rank_gate_is_compiled_once_for_each_dtype():
    """Scores of any shape, layout and alignment: Triton's own key of what it compiles for, without a GPU."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    kernel = rank_gate.kernels.rank_gate
    bind = create_function_from_signature(kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", 90, 32)))
    keys = set()
    for rows, n, r in ((1, 1, 1), (1, 12, 8), (5, 256, 64), (7, 4097, 100)):
        for scores in (torch.randn(rows, n), torch.randn(n, rows).T, torch.randn(rows, n + 1)[:, 1:]):
            gate, chosen = scores.new_empty(rows, n), scores.new_empty(rows, r, dtype=torch.int64)
            _, key, _ = bind(scores, gate, chosen, n, r, *scores.stride(), **rank_gate.CONSTANTS)
            keys.add(tuple(key))
    assert len(keys) == 1


def test_the_committed_table_has_every_launch():
    text = (Path(__file__).parents[2] / "lilora_kernels/ops/RESOURCES.md").read_text()
    rows = [tuple(cell.strip() for cell in line.split("|")[1:5]) for line in text.splitlines() if "| sm_" in line]
    phases = {True: "{}", False: "{}-{}"}
    want = [
        (f"sm_{arch}", kernel, str(rows), phases[first == last].format(first, last))
        for arch, kernel, rows, _, first, last in LAUNCHES
    ] + [(f"sm_{arch}", "rank_gate", "any", "-") for arch in resources.SHARED_MEMORY]
    assert rows == want


@pytest.mark.parametrize("variant", ["masters", "ranks-256"])
def test_the_programs_of_a_launch_fit_for_wider_elements_too(variant):
    more = {**{"dtype": torch.bfloat16}, **OTHERS[variant]}
    for kernel, last in (("forward", 2), ("backward", 3)):
        for bucket in triton_runtime.table(("sm_90",))["one_launch"][kernel]:
            used = resources.compile_kernel(kernel, 90, bucket, 0, last, **more)
            rank, widest = more.get("rank", 128), max(t.itemsize for t in more.values() if isinstance(t, torch.dtype))
            shipped = triton_runtime.fitted(bucket, 2, widest, triton_runtime.padded(rank))
            assert fits(used, shipped, 90) >= shipped.get("PROGRAMS", 1)
