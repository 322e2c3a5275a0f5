"""A call of our own each way, or library products: python -m bench.small_training [--out FOLDER]

Of `lilora::linear` with all gradients, in fp32 on one thread: thread time by the plan one_launch of the CPU kernels over that
by composed, the least of repetitions that alternate. What `cpu_training.MOST_PRODUCTS` was read from. With --out,
small_training.json goes there.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lilora_kernels.ops import cpu_training
from lilora_kernels.ops.linear import eager
from lilora_kernels.ops.schema import AdapterArgs

from .environment import environment

SIZES = (64, 64, 16, 8), (96, 256, 64, 26), (256, 96, 64, 26), (512, 512, 32, 16), (576, 1536, 32, 13)  # K, N, R, S
ROWS = 8, 64, 320, 640
SECONDS = 1.0  # of a cell


def runs(rows: int, columns: int, outputs: int, rank: int, sub_rank: int) -> dict[str, Callable[[], object]]:
    """By plan: a forward, and a backward with all gradients."""
    shapes = (rank, columns), (outputs, rank), (outputs, sub_rank), (sub_rank, rank), (1,)
    adapter = AdapterArgs(*map(torch.randn, shapes), None, None, None, None, 2.0, 0.0, None)
    x, dy, weight = torch.randn(rows, columns), torch.randn(rows, outputs), torch.randn(outputs, columns)
    own, needs = cpu_training.Training([weight, None], adapter), cpu_training.OPERANDS
    own.most_rows = cpu_training.MOST_ROWS

    def one_launch() -> object:
        _, h, _ = own.forward(x, [weight, None], adapter)
        return own.backward(dy, x, weight, h, adapter, (True,) * len(needs))

    def composed() -> object:
        _, h = eager.forward(x, weight, None, adapter)
        return eager.backward(dy, x, weight, h, adapter, frozenset(needs))

    return {"one_launch": one_launch, "composed": composed}


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
    parser.add_argument("--out", type=Path, help="where small_training.json goes")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each cell")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for columns, outputs, rank, sub_rank in SIZES:
        for rows in ROWS:
            us = least(runs(rows, columns, outputs, rank, sub_rank), options.seconds)
            products = rows * (columns * outputs + rank * (columns + outputs))
            cell = {"M": rows, "K": columns, "N": outputs, "R": rank, "S": sub_rank, "products": products}
            found.append(cell | {f"{name}_us": round(each, 1) for name, each in us.items()})
            print(
                f"{rows:5} x {columns:4} -> {outputs:4}  {products:11,}  {us['one_launch'] / us['composed']:.2f} of composed"
            )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment("python -m bench.small_training", on_gpu=False), "results": found}
        (options.out / "small_training.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
