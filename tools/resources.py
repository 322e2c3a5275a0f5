"""Registers, spills and shared memory of the Triton kernels, compiled ahead of time: no GPU needed.

python -m tools.resources          the table of lilora_kernels/ops/RESOURCES.md
"""

import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lilora_kernels.ops import triton_runtime as runtime
from lilora_kernels.ops.delta import composed_kernels, triton_parts
from lilora_kernels.ops.delta import triton_kernels as kernels
from lilora_kernels.ops.rank_gate import triton_backend as rank_gate

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB that one block may have
INTEGERS = {"M", "K", "N", "T", "G", "x_stride", "CHUNK", "drop_below", "low_rank", "high_rank"}
INTEGERS |= {"share", "splits", "columns", "tasks"}
FLOATS = {"scaling", "keep_scale"}
IDS = {"task", "gate_row", "present", "state", "ids"}
WIDE = {"planes", "da_planes", "db0_planes", "du_planes", "dv_planes", "planes_2", "da_planes_2"}
WIDE |= {"dq_h", "dfusion_rows", "dm", "dv_partials", "dfusion_partials"}
PARAMETERS = {"a", "b0", "u", "v", "fusion", "gate", "bias", "da", "db0", "du", "dv", "dfusion", "dgate"}
PARAMETERS |= {"a_2", "v_2", "fusion_2"}
GATE = frozenset({"gate", "gate_row", "bias", "dgate", "dq_h"})
COMPOSED = ("compose", "u_gradient", "v_gradient_partials", "sum_gradients")
PAIR = frozenset({"a_2", "fusion_2", "v_2", "h_2", "z_2", "planes_2", "dh_2", "da_planes_2"})


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


def compile_kernel(
    name: str,
    arch: int,
    config: dict[str, int],
    first: int,
    last: int,
    dtype: torch.dtype = torch.bfloat16,
    masters: torch.dtype | None = None,
    rank: int = 128,
    sub_rank: int = 64,
    absent: frozenset[str] = GATE | PAIR,
) -> Compiled:
    """Compile `delta_<name>` for sm_<arch> with 16-byte aligned tensors and sizes divisible by 16, as models have them.

    `absent` names the arguments that are None.
    """
    kernel = getattr(kernels, f"delta_{name}")
    widest = max(dtype.itemsize, (masters or dtype).itemsize)
    pair = "a_2" not in absent
    config = runtime.phase_config(
        runtime.fitted(config, dtype.itemsize, widest, runtime.padded(rank)), first, last, pair
    )
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
    config = {key: value for key, value in config.items() if key not in ("CHUNK", "PROGRAMS")}
    constants = {
        "R": rank, "S": sub_rank, "BLOCK_R": runtime.padded(rank), "BLOCK_S": runtime.padded(sub_rank),
        "FIRST": first, "LAST": last, **config,
    }  # fmt: skip
    split = constants.get("SPLIT_K", constants.get("SPLIT_N"))
    absent = absent | ({"planes", "planes_2"} if split == 1 else set()) | ({"state"} if first == last else set())
    constants |= dict.fromkeys(absent & set(kernel.arg_names))
    if first < last:
        options["launch_cooperative_grid"] = True
    return compiled(kernel, arch, constants, options, dtype, masters)


def compile_composed(
    name: str,
    arch: int,
    dtype: torch.dtype = torch.bfloat16,
    masters: torch.dtype | None = None,
    rank: int = 128,
    sub_rank: int = 64,
) -> Compiled:
    """As `compile_kernel`, one of `COMPOSED`."""
    kernel = getattr(composed_kernels, name)
    constants = triton_parts.constants_of(kernel, rank, sub_rank, dtype)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    return compiled(kernel, arch, constants, options, dtype, masters)


def compiled(
    kernel, arch: int, constants: dict, options: dict, dtype: torch.dtype, masters: torch.dtype | None
) -> Compiled:
    """A kernel of adapters: its arguments' types follow from their names."""
    signature, attributes = {}, {}
    for at, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in INTEGERS:
            signature[argument] = "i32"
        elif argument in FLOATS:
            signature[argument] = "fp32"
        else:
            element = (
                "i32" if argument in IDS else "i64" if argument == "seed" else "fp32" if argument in WIDE else None
            )
            signature[argument] = "*" + (element or TYPES[(masters or dtype) if argument in PARAMETERS else dtype])
        specialised = argument in ("K", "N", "x_stride") or signature[argument].startswith("*")
        if specialised and argument not in kernel.do_not_specialize:
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return measure(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))


def compile_rank_gate(arch: int, dtype: torch.dtype = torch.bfloat16) -> Compiled:
    """Compile `rank_gate` for sm_<arch> and scores of this dtype, of any layout: it has no other variants."""
    options = dict(rank_gate.CONSTANTS)
    constants = {"BLOCK": options.pop("BLOCK")}
    kernel, element = rank_gate.kernels.rank_gate, "*" + TYPES[dtype]
    types = {"scores": element, "gate": element, "chosen": "*i64", "BLOCK": "constexpr"}
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in ("gate", "chosen")}
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


# The constants that a phase reads, of those in a configuration; a launch of several phases reads all.
READ = {
    ("forward", 0): {"BLOCK_M", "BLOCK_K", "SPLIT_K"},
    ("forward", 1): {"BLOCK_M", "SPLIT_K"},
    ("forward", 2): {"BLOCK_M", "BLOCK_N", "TILES_N"},
    ("backward", 0): {"BLOCK_M", "BLOCK_N", "SPLIT_N"},
    ("backward", 1): {"BLOCK_M", "SPLIT_N"},
    ("backward", 2): {"BLOCK_M", "BLOCK_K"},
    ("backward", 3): set(),
}


def launches(arch: int) -> list[tuple[str, int, dict, int, int]]:
    """(kernel, rows, configuration, first phase, last phase) of every distinct launch of the shipped configurations."""
    found, seen = [], set()
    for plan, kernel_buckets in runtime.table((f"sm_{arch}",)).items():
        for kernel, buckets in kernel_buckets.items():
            last = 2 if kernel == "forward" else 3
            for bucket in buckets:
                split = bucket.get("SPLIT_K", bucket.get("SPLIT_N"))
                phases = [phase for phase in range(last + 1) if phase != 1 or split > 1]
                for first, end in [(0, last)] if plan == "one_launch" else [(phase, phase) for phase in phases]:
                    constants = runtime.phase_config({"phases": {}} | bucket, first, end)
                    read = set(constants) if first < end else READ[kernel, first] | {"num_warps", "num_stages"}
                    key = (
                        kernel,
                        first,
                        end,
                        *sorted((k, n) for k, n in constants.items() if k in read - {"rows", "CHUNK"}),
                    )
                    if key not in seen:
                        seen.add(key)
                        found.append((kernel, bucket["rows"], bucket, first, end))
    return found


def main() -> None:
    jobs = [(arch, *launch) for arch in SHARED_MEMORY for launch in launches(arch)]
    print(HEADER, flush=True)
    with ProcessPoolExecutor() as pool:
        for (arch, kernel, rows, _, first, last), used in zip(jobs, pool.map(compile_job, jobs), strict=True):
            print(table_row(arch, kernel, rows, f"{first}" if first == last else f"{first}-{last}", used))
        composed = [(name, arch) for arch in SHARED_MEMORY for name in COMPOSED]
        for (name, arch), used in zip(composed, pool.map(compile_composed, *zip(*composed, strict=True)), strict=True):
            print(table_row(arch, name, "any", "-", used))
        for arch, used in zip(SHARED_MEMORY, pool.map(compile_rank_gate, SHARED_MEMORY), strict=True):
            print(table_row(arch, "rank_gate", "any", "-", used))


def table_row(arch: int, kernel: str, rows: int | str, phases: str, used: Compiled) -> str:
    cells = (f"sm_{arch}", kernel, rows, phases, used.registers, used.spills, f"{used.shared / 1024:.0f} KB")
    return f"| {' | '.join(map(str, cells))} |"


def compile_job(job: tuple) -> Compiled:
    arch, kernel, _, bucket, first, last = job
    return compile_kernel(kernel, arch, bucket, first, last)


HEADER = """\
# What the Triton kernels take

Compiled ahead of time for bf16, R = 128, S = 64, dropout and all gradients but that of a gate. Rows: the bucket of the
configuration; phases: those of one launch. Written by `python -m tools.resources`.

| architecture | kernel | rows | phases | registers | spilling instructions | shared memory |
|---|---|--:|---|--:|--:|--:|"""

if __name__ == "__main__":
    main()
