"""Registers, spills and shared memory of the Triton kernels, compiled ahead of time: no GPU needed.

python -m tools.resources          writes lilora_kernels/ops/RESOURCES.json and prints the tables of RESOURCES.md beside it

What is compiled are the launches that the Triton backend makes of operands without data. The record has a key of all that
decides what is compiled for each, so that tests need not compile what they assert of. A launch whose key the record has is
not compiled again: remove the file to have all of them measured anew.
"""

import ast
import hashlib
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import lilora_kernels
from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.delta import task_rows, triton_backend, triton_configs, triton_jobs, triton_parts
from lilora_kernels.ops.delta_pair import triton_backend as delta_pair
from lilora_kernels.ops.rank_gate import triton_backend as rank_gate
from lilora_kernels.ops.schema import DIFFERENTIABLE, AdapterArgs
from lilora_kernels.ops.triton_launcher import Launch

RECORD = Path(__file__).parents[1] / "lilora_kernels/ops/RESOURCES.json"
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    int: "i32",
    float: "fp32",
}
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB that one block may have
COLUMNS, OUTPUTS = 4096, 11008
JOBS = "shrink", "expand", "from_dy", "from_x", "add_partials"
AT_ONCE = "delta_forward", "delta_backward"
COMPOSED = "compose", "u_gradient", "v_gradient_partials", "sum_gradients"


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel takes: registers per thread, instructions that spill, bytes of shared memory."""

    registers: int
    spills: int
    shared: int
    tensor_cores: bool


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
        widths = triton_configs.widths(x, adapter)
        return triton_configs.Configuration(triton_configs.shrink_tiles(sizes, names, *widths))

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


class Program(NamedTuple):
    """What Triton is asked to compile."""

    source: ASTSource
    target: GPUTarget
    options: dict[str, object]

    @property
    def key(self) -> str:
        """Of all that decides what is compiled. Needs no compilation, and is the same on every machine and in every folder."""
        asked = self.source.signature, self.source.constants, self.source.attrs, self.options
        parts = triton.__version__, self.target, *(list(each.items()) for each in asked), texts(self.source.fn)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def compiled(self) -> Compiled:
        return measure(triton.compile(self.source, target=self.target, options=self.options))


def program(
    kernel: str, arch: int, rows: int, variant: Variant = Variant(), sizes: dict[str, int] | None = None
) -> Program:
    """A kernel for sm_<arch>, as a call of so many rows launches it; `sizes`: instead of its configuration.

    `rank_gate` for scores of the variant's dtype, of any shape and layout: it has no other variants.
    """
    if kernel == "rank_gate":
        with recorded(()) as found:
            rank_gate.forward(made(2, 256, dtype=variant.dtype), 32)
    else:
        plan = "composed" if kernel in COMPOSED else "one_launch" if kernel in AT_ONCE else "by_phase"
        found = launches(plan, arch, rows, variant, {} if sizes is None else {kernel: sizes})
    return program_of(arch, *found[kernel])


def program_of(arch: int, launch: Launch, arguments: tuple) -> Program:
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
    return Program(ASTSource(kernel, signature, constants, attributes), GPUTarget("cuda", arch, 32), options)


def texts(kernel: JITFunction) -> list[tuple[str, str]]:
    """By name what a kernel is made of, sorted: the source of it and of what it calls, constants, fields of named tuples.

    Triton's own functions go by their names and its version. Triton's cache_key would depend on the numbers of lines too.
    """
    found: dict[str, str] = {}

    def add(name: str, value: object) -> None:
        if isinstance(value, JITFunction):
            found[name] = function = f"{value.__module__}.{value.__name__}"
            if function in found or function.startswith("triton."):
                return
            found[function] = "".join(value.raw_src)
            scope = value.get_capture_scope()
            for used in names_in(value.src):
                if used in scope:
                    add(f"{function}: {used}", scope[used])
        elif isinstance(value, tl.constexpr):
            found[name] = repr(value)
        elif isinstance(value, type) and hasattr(value, "_fields"):
            found[name] = repr(value._fields)
        elif not (isinstance(value, ModuleType) and value.__name__.startswith("triton")):
            raise TypeError(f"{name} is {value!r}: tools.resources cannot tell what is compiled of it")

    add("kernel", kernel)
    return sorted(found.items())


@cache
def names_in(source: str) -> list[str]:
    return sorted({node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)})


def measure(made) -> Compiled:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(str(tools / "cuobjdump"), "-res-usage", file.name)
        sass = run(str(tools / "nvdisasm"), "-c", file.name)
    registers, spills = int(re.search(r"REG:(\d+)", usage)[1]), len(re.findall(r"\b(?:LDL|STL)\b", sass))
    tensor_cores = re.search(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCMMA)", sass) is not None
    return Compiled(registers, spills, made.metadata.shared, tensor_cores)


# --- the record -----------------------------------------------------------------------------------------------------

VARIANTS = {
    "standard": Variant(),
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
    "ranks-128": Variant(sub_rank=128),
    "ranks-128-masters": Variant(sub_rank=128, masters=torch.float32),
    "ranks-256": Variant(rank=256, sub_rank=128),
    "ranks-5": Variant(rank=5, sub_rank=3),
    "pair": Variant(pair=True),
}
OTHERS = [name for name in VARIANTS if name not in ("standard", "pair")]


class Case(NamedTuple):
    """A launch of the record. rows: of the call, 0 for `rank_gate`; variant: its name."""

    arch: int
    kernel: str
    rows: int
    variant: str = "standard"

    def program(self) -> Program:
        return program(self.kernel, self.arch, self.rows, VARIANTS[self.variant])

    def compiled(self) -> Compiled:
        return self.program().compiled()


class Record(NamedTuple):
    """The version of Triton that compiled; each launch's key, and what it takes."""

    triton: str
    launches: dict[Case, tuple[str, Compiled]]


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


def cases() -> list[Case]:
    """All that the record has."""
    found = [Case(arch, *launch) for arch in SHARED_MEMORY for launch in shipped(arch)]
    found += product(SHARED_MEMORY, COMPOSED, [4096], ["standard", "masters", "ranks-256"])
    found += product(SHARED_MEMORY, ["rank_gate"], [0], ["standard", "fp16", "fp32"])
    found += product([89, 90], ["expand", "from_dy"], [1024, 8192], ["one-task"])
    found += product([89], ["delta_forward", *JOBS], [1024, 8192], ["ranks-128", "ranks-128-masters"])
    found += product([89, 90, 100], ["shrink", "from_x"], [1, 1024, 8192], ["pair"])
    found += product([89], AT_ONCE, [8192], OTHERS)
    return found + product([90], AT_ONCE, [1, 8192], ["masters", "ranks-256"])


def product(*choices: Iterable) -> list[Case]:
    return [Case(*each) for each in itertools.product(*choices)]


def read() -> Record:
    if not RECORD.is_file():
        return Record("", {})
    content = json.loads(RECORD.read_text())
    launches = {}
    for line in content["launches"]:
        case, key = Case(*(line.pop(name) for name in Case._fields)), line.pop("key")
        launches[case] = key, Compiled(**line)
    return Record(content["triton"], launches)


def write(record: Record) -> None:
    """A line for each launch, sorted."""
    found = sorted(record.launches.items())
    lines = ",\n".join(json.dumps(case._asdict() | asdict(used) | {"key": key}) for case, (key, used) in found)
    RECORD.write_text(f'{{"triton": "{record.triton}", "launches": [\n{lines}\n]}}\n')


def table(record: Record) -> str:
    """Of the standard variant, as RESOURCES.md has it."""
    rows = [table_row(case, record.launches[case][1]) for case in cases() if case.variant == "standard"]
    return "\n".join([HEADER, *rows])


def table_row(case: Case, used: Compiled) -> str:
    rows_from = "any" if case.kernel in (*COMPOSED, "rank_gate") else case.rows
    cells = f"sm_{case.arch}", case.kernel, rows_from, used.registers, used.spills, f"{used.shared / 1024:.0f} KB"
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    keys = {case: case.program().key for case in cases()}
    known = dict(read().launches.values())
    missing = {key: case for case, key in keys.items() if key not in known}
    with ProcessPoolExecutor() as pool:
        known |= zip(missing, pool.map(Case.compiled, missing.values()), strict=True)
    record = Record(triton.__version__, {case: (key, known[key]) for case, key in keys.items()})
    write(record)
    print(table(record))


HEADER = """\
# What the Triton kernels take

Compiled ahead of time for bf16, R = 128, S = 64, dropout and all gradients but that of a gate. Rows: the fewest that the
configuration is for. Written by `python -m tools.resources`, as is `RESOURCES.json`, which has other variants too.

| architecture | kernel | rows from | registers | spilling instructions | shared memory |
|---|---|--:|--:|--:|--:|"""

if __name__ == "__main__":
    main()
