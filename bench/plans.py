"""Launches and bytes of each plan at LLaVA-1.5-7B's shapes, counted, not timed: python -m bench.plans [--out FOLDER]

Of one adapted linear in bf16 with R 128 and S 64, all gradients wanted, rows of the tasks one behind the other. A launch is
a torch operation that computes or copies, or one of our kernels; a byte counts once for each launch that reads or writes it.
The composed plan runs on the meta device, as on any but a CPU; of the Triton plans tools/traffic.py says the
bytes. The floor: every tensor of the call read or written once. With --out, plans.json and RESULTS.md go there.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.delta import task_rows
from lilora_kernels.ops.linear import eager as linear
from lilora_kernels.ops.schema import AdapterArgs
from tools import traffic

from .problems import ATTENTION, DOWN, GATE_UP, SCALING, Problem

SHAPES = {"gate, up": GATE_UP, "down": DOWN, "attention": ATTENTION}
ROWS, TASKS = (512, 2048, 8192), (1, 8)
NEEDS = frozenset(("x", "a", "b0", "u", "v", "fusion"))
CONFIGURED = ("sm_90",)
DIRECTIONS = ("forward", "backward")


class Counter(TorchDispatchMode):
    """Counts what computes or copies, and its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name, changes = operation.overloadpacket.__name__, operation._schema.is_mutable
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}.values()
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in read}
        view = not changes and written and {t.untyped_storage()._cdata for t in written} <= storages
        if not view and not name.startswith(("empty", "new_empty")):
            self.launches += 1
            self.bytes += sum(t.numel() * t.element_size() for t in (*read, *written))
        return result


def of_composed(problem: Problem) -> dict[str, tuple[int, int]]:
    """(launches, bytes) by direction."""
    m, k, n, r, s, tasks = (
        *(problem.rows, problem.columns, problem.outputs),
        problem.rank,
        problem.sub_rank,
        problem.tasks,
    )
    ids = torch.arange(m, dtype=torch.int32) * tasks // m
    layout = task_rows.layout(ids, tasks, ids.device)
    found = {}

    def made(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    task = None
    if tasks > 1:
        task = made(m, dtype=torch.int32)
        task.layouts = [layout]
    x, weight, dy, h = made(m, k), made(n, k), made(m, n), made(m, r)
    factors = made(r, k), made(n, r), made(tasks, n, s), made(tasks, s, r), made(tasks)
    adapter = AdapterArgs(*factors, task, None, None, None, SCALING, 0.0, None)
    for direction in DIRECTIONS:
        with Counter() as seen:
            if direction == "forward":
                linear.forward(x, weight, None, adapter)
            else:
                linear.backward(dy, x, weight, h, adapter, NEEDS)
        found[direction] = seen.launches, seen.bytes
    return found


def of_triton(problem: Problem, plan: str) -> dict[str, tuple[int, int]]:
    shape = traffic.Shape(
        problem.rows, problem.columns, problem.outputs, problem.rank, problem.sub_rank, problem.tasks,
        problem.dtype.itemsize, problem.dtype.itemsize,
    )  # fmt: skip
    found, size = {}, problem.dtype.itemsize
    for direction in DIRECTIONS:
        buckets = triton_runtime.table(CONFIGURED)[plan][direction]
        at = triton_runtime.nearest(tuple(bucket["rows"] for bucket in buckets), problem.rows)
        moved = list(getattr(traffic, direction)(shape, buckets[at]))
        launches = len({part.phase for part in moved}) if plan == "by_phase" else 1
        # The base's product adds to what the kernels wrote.
        wide = 2 * problem.rows * (problem.outputs if direction == "forward" else problem.columns)
        read = problem.rows * (problem.columns if direction == "forward" else problem.outputs)
        base = (wide + read + problem.columns * problem.outputs) * size
        found[direction] = launches + 1, base + sum(part.unique for part in moved)
    return found


def rows() -> Iterator[dict]:
    for name, (columns, outputs) in SHAPES.items():
        for m in ROWS:
            for tasks in TASKS:
                problem = Problem(m, columns, outputs, tasks)
                plans = {"composed": of_composed(problem)}
                plans |= {plan: of_triton(problem, plan) for plan in ("one_launch", "by_phase")}
                for plan, found in plans.items():
                    row = {"shape": name, **problem.describe(), "plan": plan}
                    for direction, (launches, moved) in found.items():
                        least = problem.least(direction, True)[0]
                        row |= {f"{direction}_launches": launches, f"{direction}_bytes": moved}
                        row |= {f"{direction}_floor": least, f"{direction}_ratio": round(moved / least, 2)}
                    yield row


def table(found: list[dict]) -> str:
    head = "| shape | rows | tasks | plan | launches forward | bytes / floor | launches backward | bytes / floor |"
    lines = [head, "|---|--:|--:|---|--:|--:|--:|--:|"]
    for row in found:
        cells = [row["shape"], row["M"], row["T"], row["plan"]]
        cells += [row[f"{direction}_{what}"] for direction in DIRECTIONS for what in ("launches", "ratio")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where plans.json and RESULTS.md go")
    options = parser.parse_args()
    found = list(rows())
    text = f"# Launches and bytes of each plan\n\n{table(found)}\n\nCounted by `python -m bench.plans`, not timed.\n"
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "plans.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "RESULTS.md").write_text(text)


if __name__ == "__main__":
    main()
