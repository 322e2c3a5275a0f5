"""Registers, spills and shared memory of the Triton kernels, compiled ahead of time: no GPU needed.

python -m tools.resources          the table of lilora_kernels/ops/RESOURCES.md

What is compiled are the launches that the Triton backend makes of operands without data.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import lilora_kernels
from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.delta import task_rows, triton_backend, triton_configs, triton_jobs, triton_parts
from lilora_kernels.ops.delta_pair import triton_backend as delta_pair
from lilora_kernels.ops.rank_gate import triton_backend as rank_gate
from lilora_kernels.ops.schema import DIFFERENTIABLE, AdapterArgs
from lilora_kernels.ops.triton_launcher import Launch

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    int: "i32",
    float: "fp32",
}
FLOATS = torch.bfloat16, torch.float16, torch.float32
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB that one block may have
COLUMNS, OUTPUTS = 4096, 11008
JOBS = "shrink", "expand", "from_dy", "from_x", "add_partials"
AT_ONCE = "delta_forward", "delta_backward"
COMPOSED = "compose", "u_gradient", "v_gradient_partials", "sum_gradients"


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel takes: registers per thread, instructions that spill, bytes of shared memory, its code."""

    registers: int
    spills: int
    shared: int
    sass: str

    @property
    def tensor_cores(self) -> bool:
        return bool(re.search(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCMMA)", self.sass))


@dataclass(frozen=True)
class Variant:
    """Of a call: what decides what is compiled for it. sub_rank 0: without task factors; needs: the gradients wanted."""

    dtype: torch.dtype = torch.bfloat16
    masters: torch.dtype | None = None
    rank: int = 128
    sub_rank: int = 64
    tasks: int = 4
    fusion: bool = True
    gate: bool = False
    p: float = 0.05
    pair: bool = False
    needs: frozenset[str] = frozenset(DIFFERENTIABLE)

    def adapter(self, rows: int) -> AdapterArgs:
        dtype, rank, outputs, t = self.masters or self.dtype, self.rank, OUTPUTS, self.tasks
        task = None
        if t > 1:
            task = made(rows, dtype=torch.int32)
            ids = (torch.arange(rows) * t // max(rows, 1)).to(torch.int32)
            task.layouts = [task_rows.layout(ids, t, task.device)]  # as a BatchContext knows it
        u = v = fusion = gate = gate_row = None
        if self.sub_rank:
            u, v = made(t, outputs, self.sub_rank, dtype=dtype), made(t, self.sub_rank, rank, dtype=dtype)
            fusion = made(t, dtype=dtype) if self.fusion else None
        if self.gate:
            gate, gate_row = made(4, rank, dtype=dtype), made(rows, dtype=torch.int32)
        seed = made(1, dtype=torch.int64) if self.p else None
        a, b0 = made(rank, COLUMNS, dtype=dtype), made(outputs, rank, dtype=dtype)
        return AdapterArgs(a, b0, u, v, fusion, task, gate, gate_row, seed, 2.0, self.p, None)


def made(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# --- the launches of a call -----------------------------------------------------------------------------------------


@contextmanager
def recorded(names: tuple[str, ...], own: dict[str, dict[str, int]] = {}) -> Iterator[dict[str, tuple]]:  # noqa: B006
    """By kernel the arguments of what would be launched on a GPU of these names; `own`: sizes in the place of a kernel's."""
    found: dict[str, tuple] = {}

    def record(launch: Launch, grid: tuple, tensors: tuple, numbers: tuple, groups: tuple = ()) -> None:
        found[launch.kernel.__name__] = launch, (*groups, *tensors, *numbers)

    def configuration(kernel: str, x: Tensor, adapter: AdapterArgs, pair: bool = False):
        sizes = own.get(kernel) or triton_configs.chosen(names, kernel, triton_configs.bucket(len(x)), pair)
        return triton_configs.Configuration(triton_configs.shrink_tiles(sizes, *triton_configs.widths(x, adapter)))

    with ExitStack() as stack:
        for module in (triton_jobs, triton_parts, rank_gate):
            stack.enter_context(patch.object(module, "launch", record))
            stack.enter_context(patch.object(module, "current", lambda device: nullcontext()))
        stack.enter_context(patch.object(triton_runtime, "processors", lambda device: 1))
        stack.enter_context(patch.object(triton_configs, "configuration", configuration))
        yield found


def launches(
    plan: str,
    arch: int,
    rows: int,
    variant: Variant = Variant(),
    own: dict[str, dict[str, int]] = {},  # noqa: B006
) -> dict[str, tuple]:
    """By kernel the launches of a forward and a backward by this plan, and their arguments."""
    x, dy = made(rows, COLUMNS, dtype=variant.dtype), made(rows, OUTPUTS, dtype=variant.dtype)
    adapter = variant.adapter(rows)
    h = made(rows, variant.rank, dtype=variant.dtype)
    present = {name for name in DIFFERENTIABLE[1:] if getattr(adapter, name) is not None} | {"x"}
    needs = variant.needs & present
    with recorded((f"sm_{arch}",), own) as found, lilora_kernels.plan(plan):
        if variant.pair:
            none = None, None
            delta_pair.forward(x, none, none, (adapter, adapter))
            delta_pair.backward((dy, dy), x, none, (h, h), (adapter, adapter), (needs, needs))
        else:
            triton_backend.forward(x, adapter)
            triton_backend.backward(dy, x, h, adapter, needs)
    return found


def compile_kernel(
    kernel: str, arch: int, rows: int, variant: Variant = Variant(), sizes: dict[str, int] | None = None
) -> Compiled:
    """Compile one kernel for sm_<arch>, as a call of so many rows launches it; `sizes`: instead of its configuration."""
    plan = "composed" if kernel in COMPOSED else "one_launch" if kernel in AT_ONCE else "by_phase"
    return compiled(arch, *launches(plan, arch, rows, variant, {} if sizes is None else {kernel: sizes})[kernel])


def compile_rank_gate(arch: int, dtype: torch.dtype = torch.bfloat16) -> Compiled:
    """Compile `rank_gate` for sm_<arch> and scores of this dtype, of any layout: it has no other variants."""
    with recorded(()) as found:
        rank_gate.forward(made(2, 256, dtype=dtype), 32)
    return compiled(arch, *found["rank_gate"])


def compiled(arch: int, launch: Launch, arguments: tuple) -> Compiled:
    """For 16-byte aligned tensors."""
    kernel = launch.kernel
    names = [name for name in kernel.arg_names if name not in launch]
    signature, attributes = dict.fromkeys(kernel.arg_names, "constexpr"), {}
    constants: dict = {name: value for name, value in launch.items() if name in kernel.arg_names}

    def of(argument, path: tuple[int, ...], specialised: bool) -> object:
        if argument is None:
            constants[path] = None
            return "constexpr"
        if isinstance(argument, tuple):
            return type(argument)(*(of(each, (*path, i), True) for i, each in enumerate(argument)))
        if specialised and (isinstance(argument, Tensor) or (isinstance(argument, int) and argument % 16 == 0)):
            attributes[path] = [["tt.divisibility", 16]]
        return "*" + TYPES[argument.dtype] if isinstance(argument, Tensor) else TYPES[type(argument)]

    for name, argument in zip(names, arguments, strict=True):
        path = (kernel.arg_names.index(name),)
        signature[name] = of(argument, path, name not in kernel.do_not_specialize)
    options = {name: value for name, value in launch.items() if name not in kernel.arg_names} | launch.options
    source = ASTSource(kernel, signature, constants, attributes)
    return measure(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))


def measure(made) -> Compiled:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(str(tools / "cuobjdump"), "-res-usage", file.name)
        sass = run(str(tools / "nvdisasm"), "-c", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    return Compiled(registers, len(re.findall(r"\b(?:LDL|STL)\b", sass)), made.metadata.shared, sass)


# --- the table ------------------------------------------------------------------------------------------------------


def shipped(arch: int) -> list[tuple[str, int]]:
    """(kernel, rows) of every distinct launch, rows being the fewest that it is for."""
    fewest, found, seen = [1, *(rows + 1 for rows in triton_configs.ROWS)], [], set()
    for kernel in (*AT_ONCE, *JOBS):
        for rows in fewest:
            sizes = triton_configs.chosen((f"sm_{arch}",), kernel, triton_configs.bucket(rows))
            key = kernel, *sorted((name, size) for name, size in sizes.items() if name != "CHUNK")
            if key not in seen:
                seen.add(key)
                found.append((kernel, rows))
    return found


def main() -> None:
    jobs = [(arch, *launch) for arch in SHARED_MEMORY for launch in shipped(arch)]
    jobs += [(arch, kernel, 4096) for arch in SHARED_MEMORY for kernel in COMPOSED]
    print(HEADER, flush=True)
    with ProcessPoolExecutor() as pool:
        for job, used in zip(jobs, pool.map(compile_job, jobs), strict=True):
            print(table_row(*job, used))
        for arch, used in zip(SHARED_MEMORY, pool.map(compile_rank_gate, SHARED_MEMORY), strict=True):
            print(table_row(arch, "rank_gate", 0, used))


def table_row(arch: int, kernel: str, rows: int, used: Compiled) -> str:
    rows_from = "any" if kernel in (*COMPOSED, "rank_gate") else rows
    cells = (f"sm_{arch}", kernel, rows_from, used.registers, used.spills, f"{used.shared / 1024:.0f} KB")
    return f"| {' | '.join(map(str, cells))} |"


def compile_job(job: tuple[int, str, int]) -> Compiled:
    arch, kernel, rows = job
    return compile_kernel(kernel, arch, rows)


HEADER = """\
# What the Triton kernels take

Compiled ahead of time for bf16, R = 128, S = 64, dropout and all gradients but that of a gate. Rows: the fewest that the
configuration is for. Written by `python -m tools.resources`.

| architecture | kernel | rows from | registers | spilling instructions | shared memory |
|---|---|--:|--:|--:|--:|"""

if __name__ == "__main__":
    main()
