"""A call of our own each way, or library products: python -m bench.small_training [--out FOLDER]

Of `lilora::linear` with all gradients, and of its forward alone, in fp32 on one thread: thread time by the plan one_launch of
the CPU kernels over that by composed, the least of repetitions that alternate; without an adapter over F.linear's; in bf16 by
decode over composed's. What `MOST_PRODUCTS`, `FORWARD_ROWS`, `FORWARD_X` and `OUTRUN_ROWS` of cpu_training.py, `PROMPTS_FROM` of
accelerated.py and `BF16_ROWS` of cpu_runtime.py were read from. With --out, a file named by the processor's instructions goes
there.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lilora_kernels import backends, cpu_library
from lilora_kernels.ops import cpu_runtime, cpu_training
from lilora_kernels.ops.linear import eager
from lilora_kernels.ops.schema import AdapterArgs

from .environment import environment

SMALL = (64, 64, 16, 8), (96, 256, 64, 26), (256, 96, 64, 26), (512, 512, 32, 16)  # K, N, R, S
LARGE = (576, 1536, 32, 13), (2048, 5504, 128, 64), (5504, 2048, 128, 64)
SIZES = SMALL + LARGE
ROWS = 8, 32, 64, 128, 256, 512
# Of forward alone, as prompts of one task and of eight have them.
PROMPT_SIZES = (
    (64, 64, 16, 8),
    (576, 1536, 64, 26),
    (1536, 576, 64, 26),
    (2048, 5504, 64, 26),
    (5504, 2048, 64, 26),
    (11008, 4096, 64, 26),
)
PROMPT_ROWS, PROMPT_TASKS = (72, 128, 256, 512), (1, 8)
BARE_SIZES = (576, 576), (1536, 576), (1024, 1024), (2048, 2048), (4096, 4096)  # K, N without an adapter
BF16_SIZES = (512, 1376, 32, 16), (2048, 5504, 128, 64), (4096, 11008, 128, 64)
BF16_ROWS = 1, 4, 8, 16, 64
SECONDS = 1.0  # of a cell


def runs(
    rows: int, columns: int, outputs: int, rank: int, sub_rank: int, tasks: int = 1, backward: bool = True
) -> dict[str, Callable[[], object]]:
    """By plan: a forward, and a backward with all gradients; rows of one task lie together."""
    shapes = (rank, columns), (outputs, rank), (tasks, outputs, sub_rank), (tasks, sub_rank, rank), (tasks,)
    task = torch.arange(rows, dtype=torch.int32) * tasks // rows
    adapter = AdapterArgs(*map(torch.randn, shapes), task, None, None, None, 2.0, 0.0, None)
    x, dy, weight = torch.randn(rows, columns), torch.randn(rows, outputs), torch.randn(outputs, columns)
    needs = cpu_training.OPERANDS
    with backends.plan("one_launch"):  # without its limits
        own = cpu_training.Training([weight, None], adapter)

    def one_launch() -> object:
        y, h, _ = own.forward(x, [weight, None], adapter)
        return own.backward(dy, x, weight, h, adapter, (True,) * len(needs)) if backward else [y]

    def composed() -> object:
        y, h = eager.forward(x, weight, None, adapter)
        return eager.backward(dy, x, weight, h, adapter, frozenset(needs)) if backward else {"y": y}

    return {"one_launch": one_launch, "composed": composed}


def bare(rows: int, columns: int, outputs: int) -> dict[str, Callable[[], object]]:
    """A product without an adapter, as `accelerate_linears` has it for large weights, and as torch has it."""
    x, weight = torch.randn(rows, columns), torch.randn(outputs, columns)
    none = AdapterArgs(torch.empty(0, columns), torch.empty(outputs, 0), *[None] * 7, 1.0, 0.0, None)
    with backends.plan("one_launch"):
        own = cpu_training.bind_forward(x, weight, None, none)
    return {"one_launch": lambda: own(x), "composed": lambda: nn.functional.linear(x, weight)}


def decoded(rows: int, columns: int, outputs: int, rank: int, sub_rank: int, tasks: int) -> dict[str, Callable]:
    """A forward in bf16 by the plan decode, and by composed."""
    sizes = (rows, columns), (outputs, columns), (rank, columns), (outputs, rank)
    x, weight, a, b0 = (torch.randn(size, dtype=torch.bfloat16) / size[-1] ** 0.5 for size in sizes)
    u, v = torch.randn(tasks, outputs, sub_rank).bfloat16(), torch.randn(tasks, sub_rank, rank).bfloat16()
    task = (torch.arange(rows) % tasks).int()
    adapter = AdapterArgs(a, b0, u, v, torch.zeros(tasks).bfloat16(), task, None, None, None, 2.0, 0.0, None)
    return {
        "decode": lambda: cpu_runtime.decode(x, (adapter, weight, None)),
        "composed": lambda: eager.forward(x, weight, None, adapter),
    }


def least(of: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Microseconds of this thread, the least of each."""
    best, end = dict.fromkeys(of, float("inf")), time.monotonic() + seconds
    while time.monotonic() < end or float("inf") in best.values():
        for name, run in of.items():
            start = time.thread_time_ns()
            run()
            best[name] = min(best[name], (time.thread_time_ns() - start) / 1e3)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the file goes, as avx2.json")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each cell")
    options = parser.parse_args()
    torch.set_num_threads(1)
    both = [(rows, *size, 1, True) for size in SIZES for rows in ROWS]
    forward = [(rows, *size, tasks, False) for size in PROMPT_SIZES for rows in PROMPT_ROWS for tasks in PROMPT_TASKS]
    without = [(rows, *size, 0, 0, 0, False) for size in BARE_SIZES for rows in PROMPT_ROWS[:3]]
    found = []
    for cell in both + forward + without:
        rows, columns, outputs, rank, sub_rank, tasks, backward = cell
        us = least(runs(*cell) if rank else bare(*cell[:3]), options.seconds)
        products = rows * (columns * outputs + rank * (columns + outputs))
        sizes = {"M": rows, "K": columns, "N": outputs, "R": rank, "S": sub_rank, "T": tasks, "backward": backward}
        found.append(sizes | {"products": products} | {f"{name}_us": round(each, 1) for name, each in us.items()})
        what = "both directions" if backward else f"forward, T={tasks}" if rank else "no adapter"
        over = us["one_launch"] / us["composed"]
        print(f"{rows:5} x {columns:5} -> {outputs:5}  {products:14,}  {what:15}  {over:.2f} of composed", flush=True)
    in_bf16 = [(rows, *size, tasks) for size in BF16_SIZES for rows in BF16_ROWS for tasks in sorted({1, min(rows, 8)})]
    for cell in in_bf16:
        us = least(decoded(*cell), options.seconds)
        sizes = dict(zip("MKNRST", cell, strict=True)) | {"dtype": "bfloat16"}
        found.append(sizes | {f"{name}_us": round(each, 1) for name, each in us.items()})
        rows, columns, outputs, *_, tasks = cell
        over = us["decode"] / us["composed"]
        print(f"{rows:5} x {columns:5} -> {outputs:5}  bf16, decode, T={tasks}  {over:.2f} of composed", flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment("python -m bench.small_training", on_gpu=False), "results": found}
        name = cpu_library.INSTRUCTIONS[cpu_library.load().instructions - 1]
        (options.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
