"""Time of an adapted linear on an H200, predicted from counts and named ceilings: python -m bench.model [--out FOLDER]

Launches, bytes and operations of every plan at LLaVA-1.5-7B's MLP shapes in bf16, R 128 and S 64, and the time that they
mean by the ceilings and assumptions of bench/roofline.py. The composed plan runs on the meta device under a counter; the
Triton backend makes its own plans there, its composed one too, and tools/traffic.py says the bytes of their jobs;
tools/cuda_traffic.py says what the phases of the CUDA kernels do. Assumed beside:

- Tasks have equally many rows, which lie one behind the other; rows are computed in whole tiles, once for each task of a tile.
  All gradients are wanted; no gate, no bias.
- The fused product runs at the rate of the library's, in its own tiles, and reads each operand once.
- Within a phase nothing leaves the L2 cache. In one launch a processor has one block of a CUDA kernel at once: ptxas gives a
  thread 214 registers for few rows and 156 for many in the forward, 238 and 240 in the backward. By phase it has as many as
  tools/cuda_traffic.py says: a thread takes 112, 80 and 150 registers for few rows and 116, 80 and 128 for many in the
  phases of the forward, 59, 195, 123, 171 and 64 for few and 59, 189, 123, 170 and 64 for many in those of the backward.
- Times are those of a CUDA graph. In eager mode the host needs a time for each launch, and a call the longer of the two.

Where bench/results/<device>/results.json has what bench.gpu_evidence measured, its medians follow beside the predictions.
With --out, RESULTS.md goes there.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from unittest.mock import patch

import torch

from lilora_kernels import plan as forced
from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.cuda_runtime import DECODE_ROWS
from lilora_kernels.ops.delta import composed_kernels, task_rows, triton_jobs, triton_parts
from lilora_kernels.ops.linear import eager as composed_linear
from lilora_kernels.ops.linear import triton_backend as triton_linear
from lilora_kernels.ops.schema import AdapterArgs
from tools import cuda_traffic, traffic
from tools.traffic import ceil

from .problems import DOWN, GATE_UP, GRADIENTS, SCALING, Problem
from .roofline import (
    CLOCK,
    DIRECTIONS,
    EAGER_LAUNCH,
    FUSED_TILE,
    MEMORY_LATENCY,
    PROCESSORS,
    START,
    Call,
    Launch,
    base,
    floor,
    made,
    nbytes,
    peft,
    waves,
)

SHAPES = {"gate, up": GATE_UP, "down": DOWN}
ROWS, TASKS, DROPOUT = (1, 8, 64, 512, 2048, 8192), (1, 8, 64), (0.0, 0.05)
UNITS = {"MB": 1e6, "L2 MB": 1e6, "GFLOP": 1e9}
KEYS = ("memory", "issued", "flops")  # in these units
RESULTS = Path(__file__).parent / "results"

# --- our plans --------------------------------------------------------------------------------------------------------


class Ours(Call):
    """With the factors of every task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        p = self.problem
        m, r, s, tasks = p.rows, p.rank, p.sub_rank, p.tasks
        self.h, task = made(m, r), None
        if tasks > 1:
            task = made(m, dtype=torch.int32)
            ids = torch.arange(m, dtype=torch.int32) * tasks // m
            task.layouts = [task_rows.layout(ids, tasks, task.device)]  # as a BatchContext knows it
        factors = self.a, self.b, made(tasks, p.outputs, s), made(tasks, s, r), made(tasks)
        seed = made(1, dtype=torch.int64) if p.p else None
        self.adapter = AdapterArgs(*factors, task, None, None, seed, SCALING, p.p, None)
        self.shape = traffic.Shape(m, p.columns, p.outputs, r, s, tasks, p.dtype.itemsize, p.dtype.itemsize)
        self.draws = m * p.columns if p.p else 0

    def run(self, backend) -> None:
        """The functions of a backend of `linear`."""
        self.in_backward = False
        with self.forward:
            backend.forward(self.x, self.weight, None, self.adapter)
        if self.adapter.u is None:
            return
        self.in_backward = True
        with self.backward:
            backend.backward(self.dy, self.x, self.weight, self.h, self.adapter, frozenset(GRADIENTS))


def composed(call: Ours) -> None:
    call.run(composed_linear)


ONE_FACTOR = {"x", "a", "partials", "h", "dx", "dh", "da"}  # what passes over x move


JOBS = {"delta_forward": ("shrink", "expand"), "delta_backward": ("from_dy", "from_x", "add_partials")}


def triton(call: Ours, name: str) -> None:
    """The Triton backend makes its plan for sm_90; in the place of its launches are their counts."""
    passes_over_x = name == "composed"
    shape = replace(call.shape, sub_rank=0, tasks=1) if passes_over_x else call.shape

    def count(made, items, device, groups, tensors, numbers, waits=None) -> None:
        name, sizes = made.kernel.__name__, traffic.sizes(made, numbers)
        for at, job in enumerate(JOBS.get(name, (name,))):
            direction = call.forward if job in JOBS["delta_forward"] else call.backward
            direction.launches += launches_of(
                job, shape, sizes, passes_over_x, call.draws, "barrier" if at else "launch"
            )

    def count_part(kernel, programs, tensors, numbers, sizes, dtype=None) -> None:
        """Of the kernels around M_t: every tensor once, and a product of N, R and S for each task in all but the sums."""
        moved, counter = (
            sum(nbytes(t) for t in tensors if t is not None),
            call.backward if call.in_backward else call.forward,
        )
        tasks = 0 if kernel is composed_kernels.sum_gradients else programs[1]
        flops = 2 * tasks * sizes.outputs * sizes.rank * sizes.sub_rank
        counter.launches.append(Launch(kernel.__name__, moved, flops, issued=moved, waves=waves(math.prod(programs))))

    names = patch.object(triton_runtime, "device_names", lambda device: ("sm_90",))
    launches = patch.object(triton_jobs, "run", count), patch.object(triton_parts, "run", count_part)
    with names, launches[0], launches[1], forced(name):
        call.run(triton_linear)


def kept(call: Ours) -> None:
    """Inference of one task, were its M_t kept from call to call: it is read in the place of B0, U and V. Not built."""
    call.adapter = call.adapter._replace(u=None, v=None, fusion=None)
    call.shape = replace(call.shape, sub_rank=0)
    triton(call, "one_launch")


def launches_of(
    job: str, shape: traffic.Shape, sizes: dict, passes_over_x: bool, draws: int, start: str
) -> Iterator[Launch]:
    """A job; and, where its last programs add up what all have stored, that by itself."""
    moved, tile = traffic.moved(job, shape, sizes), sizes["BLOCK_M"]
    if passes_over_x:
        moved = [each for each in moved if each.tensor in ONE_FACTOR]
    rows_computed = tile * traffic.visits(ceil(shape.rows, tile), shape.tasks) if tile else 0
    tail = [replace(each, issued=each.unique) for each in moved if each.tensor == "partials"]
    moved = [replace(each, issued=each.unique) if each.tensor == "partials" else each for each in moved]
    own_draws = draws if job in ("shrink", "from_x") else 0
    flops, items = traffic.flops(job, shape) * rows_computed / shape.rows, traffic.items(job, shape, sizes)
    yield of_phase(job, moved, flops, start, items, own_draws)
    if tail:
        yield of_phase(f"{job}, sums", tail, 0, "arrival", ceil(shape.rows, tile), 0)


def of_phase(
    name: str,
    moved: list[traffic.Traffic],
    flops: float,
    start: str,
    items: int,
    draws: int,
    loads: int = 0,
    at_once: int = 1,
) -> Launch:
    memory, issued = (sum(getattr(each, kind) for each in moved) for kind in ("unique", "issued"))
    loads *= ceil(items, at_once * PROCESSORS)
    return Launch(name, memory, flops, issued=issued, draws=draws, loads=loads, waves=waves(items), start=start)


def cuda_phases(phases: Iterable[cuda_traffic.Phase], start: str, draws: dict[int, int]) -> Iterator[Launch]:
    """start: of all phases but the first. draws: elements of dropout by phase."""
    for at, phase in enumerate(phases):
        begins, at_once = start if at else "launch", 1 if start == "barrier" else phase.at_once
        yield of_phase(
            f"phase {at}", phase.traffic, phase.flops, begins, phase.items, draws.get(at, 0), phase.loads, at_once
        )


def cuda(call: Ours, start: str) -> None:
    """The kernels of csrc, and the base's product on top."""
    expanding = PROCESSORS * (1 if start == "barrier" else cuda_traffic.expanding_at_once(call.shape))
    forward = cuda_traffic.forward(call.shape, False, PROCESSORS, expanding)
    backward = cuda_traffic.backward(call.shape, PROCESSORS, True)
    call.forward.launches += cuda_phases(forward, start, {0: call.draws})
    call.backward.launches += cuda_phases(backward, start, {3: 2 * call.draws})
    with call.forward:
        made(*call.dy.shape).addmm_(call.x, call.weight.T)
    with call.backward:
        made(*call.x.shape).addmm_(call.dy, call.weight)


STAGES = 4  # kMostStages of csrc/tile.h
STEP_CYCLES = 159  # of a warp, for 32 outputs and sixteen rows


def flight(shape: traffic.Shape, ranges: int) -> float:
    """Seconds of the loads of one warp that streams its share of the base's weight, as csrc/stream.h has it.

    It waits once for all loads that are under way, multiplies, and asks for as many again: the compiler has one scoreboard for
    them. The cycles of a step are stall counts in the machine code of nvcc 13.0 for sm_90a and 16 rows; tests/cuda bounds them.
    """
    width = ceil(ceil(shape.outputs, 8), ranges) * 8
    across = ceil(width, cuda_traffic.STREAMED)
    slices = 2 ** int(math.log2(min(8, 2 * cuda_traffic.TILE // (across * cuda_traffic.STREAMED))))
    steps, ahead = ceil(ceil(shape.columns, 32), slices), 3 if shape.rows <= 16 else 2
    return ceil(steps, ahead) * (MEMORY_LATENCY + ahead * STEP_CYCLES * ceil(shape.rows, 16) / CLOCK)


def decode(call: Ours) -> None:
    """Inference: forward alone. The last phase has its base product while the others run, which it then waits for.

    Its start is priced behind theirs, and from 17 rows on behind the whole of phase 0: a processor has no registers for both. The
    first tiles of B0 and U have come by then.
    """
    *others, last = cuda_traffic.forward(call.shape, True, PROCESSORS)
    *given, expand = cuda_phases((*others, last), "dependent", {})
    base_flops = 2 * ceil(call.problem.rows, 16) * 16 * call.problem.columns * call.problem.outputs
    of_base = [each for each in last.traffic if each.tensor in ("x", "weight")]
    of_tasks = [each for each in last.traffic if each.tensor in ("b0", "u")]
    of_panel = [each for each in last.traffic if each.tensor in ("qz", "y")]
    stream, tiles = (of_phase("base", each, base_flops, "dependent", last.items, 0) for each in (of_base, of_tasks))
    steps = ceil(call.shape.rank, cuda_traffic.STEP) + call.problem.tasks * ceil(call.shape.sub_rank, cuda_traffic.STEP)
    early = min(1.0, (STAGES - 1) / steps)
    alone = given[:1] if call.shape.rows > 16 else []
    memory, issued = (
        sum(getattr(each, kind) for each in given[len(alone) :]) + early * getattr(tiles, kind) for kind in KEYS[:2]
    )
    seconds = sum(launch.seconds() - START[launch.start] for launch in given[len(alone) :])
    call.forward.launches += alone
    call.forward.launches += [Launch(launch.name, start=launch.start) for launch in given[len(alone) :]]
    late = [replace(each, unique=(1 - early) * each.unique, issued=(1 - early) * each.issued) for each in of_tasks]
    call.forward.launches += [
        replace(
            stream, memory=stream.memory + memory, issued=stream.issued + issued, beside=seconds,
            flight=flight(call.shape, last.items),
        ),
        of_phase("expand", late + of_panel, expand.flops - base_flops, "refill" if early < 1 else "panel", last.items, 0),
    ]  # fmt: skip


def fused(call: Ours) -> None:
    p, shape, height = call.problem, call.shape, FUSED_TILE[0]
    m, k, n, r, s, size = p.rows, p.columns, p.outputs, p.rank, p.sub_rank, p.dtype.itemsize
    groups = ceil(m, 2 * height)  # of rows, each with a slot for each of its tasks
    slots, rows_computed = traffic.visits(groups, p.tasks) * 2 * height, 2 * height * groups

    def product(outputs: int, multiplied: int, elements: int, draws: int = 0) -> Launch:
        computed = waves(rows_computed // height * ceil(outputs, FUSED_TILE[1]))
        return Launch("product", size * elements, 2 * outputs * multiplied, draws=draws, waves=computed)

    shrink, prepare, _ = cuda_traffic.forward(shape, False, PROCESSORS)
    call.forward.launches += cuda_phases((shrink, prepare), "dependent", {0: call.draws})
    call.forward.launches.append(Launch("slots", (m + slots) * s * size, waves=waves(groups * min(p.tasks, 8))))
    elements = m * (k + n + r) + n * (k + r + p.tasks * s) + slots * s
    call.forward.launches.append(product(n, rows_computed * (k + r) + slots * s, elements))
    backward = cuda_traffic.backward(shape, PROCESSORS, False)
    call.backward.launches += cuda_phases(backward, "dependent", {3: call.draws})
    elements = m * (n + k + r) + k * (n + r)
    call.backward.launches.append(product(k, rows_computed * (n + r), elements, call.draws))


KEPT = "Triton one_launch, M_t kept (not built)"
PLANS: dict[str, Callable[[Ours], None]] = {
    "composed": composed,
    "Triton composed": partial(triton, name="composed"),
    "Triton one_launch": partial(triton, name="one_launch"),
    "Triton by_phase": partial(triton, name="by_phase"),
    KEPT: kept,
    "CUDA one_launch": partial(cuda, start="barrier"),
    "CUDA by_phase": partial(cuda, start="dependent"),
    "CUDA decode": decode,
    "CUDA fused": fused,
    "base": base,
    "PEFT": peft,
    "floor": floor,
}
IMPLEMENTATIONS = {  # names of measured ones
    "base": "base",
    "composed": "ours_eager",
    "PEFT": "peft",
    **{
        name: f"ours_{name.lower().replace(' ', '_')}"
        for name in PLANS
        if name.startswith(("Triton", "CUDA")) and name != KEPT
    },
}


def takes(plan: str, problem: Problem) -> bool:
    """The base and the floor know no tasks and no dropout; PEFT trains one adapter."""
    if plan in ("CUDA decode", KEPT):
        return problem.rows <= DECODE_ROWS and problem.p == 0 and (plan != KEPT or problem.tasks == 1)
    return plan not in ("base", "PEFT", "floor") or (problem.tasks == 1 and (problem.p == 0 or plan == "PEFT"))


# --- tables -----------------------------------------------------------------------------------------------------------


def figures(launches: list[Launch], plain: list[Launch]) -> dict:
    """What a direction does and takes, next to the base's launches. bound: where most of the time beyond the base's goes."""
    seconds, base_seconds = (sum(launch.seconds() for launch in each) for each in (launches, plain))
    bounds: dict[str, float] = {}
    for sign, each in ((1, launches), (-1, plain)):
        for launch in each:
            name, longest = max(launch.parts().items(), key=itemgetter(1))
            bounds[name] = bounds.get(name, 0) + sign * longest
            bounds["launches"] = bounds.get("launches", 0) + sign * START[launch.start]
    count = sum(launch.start in ("launch", "dependent") for launch in launches)
    return {
        "launches": count,
        "memory": sum(launch.memory for launch in launches),
        "issued": sum(launch.issued for launch in launches),
        "flops": sum(launch.flops + launch.wide_flops for launch in launches),
        "us": 1e6 * seconds,
        "host_us": 1e6 * EAGER_LAUNCH * count,
        "ratio": seconds / base_seconds,
        "bound": max(bounds, key=bounds.__getitem__),
    }


def predict(problem: Problem, plan: str) -> dict[str, dict]:
    """Figures by direction; `both` where there is a backward."""
    call, plain = Ours(problem), Call(problem)
    PLANS[plan](call)
    base(plain)
    launches, plains = (
        {direction: getattr(each, direction).launches for direction in DIRECTIONS} for each in (call, plain)
    )
    if launches["backward"]:
        for each in (launches, plains):
            each["both"] = each["forward"] + each["backward"]
    return {direction: figures(found, plains[direction]) for direction, found in launches.items() if found}


def problems() -> Iterator[tuple[str, Problem]]:
    for name, shape in SHAPES.items():
        for m in ROWS:
            for tasks in TASKS:
                for p in DROPOUT if tasks <= m else ():
                    yield name, Problem(m, *shape, tasks, p)


def line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(found: Iterable[tuple[str, Problem]]) -> str:
    """A line for each problem and plan."""
    directions = [f"{d} {cell}" for d in DIRECTIONS for cell in ("launches", *UNITS, "us", "/ base", "bound")]
    head = ["shape", "rows", "tasks", "p", "plan", *directions, "both us", "/ base", "host us"]
    lines = [line(head), line(["---", "--:", "--:", "--:", "---", *["--:"] * (len(head) - 5)])]
    for name, problem in found:
        for plan in PLANS:
            if not takes(plan, problem):
                continue
            predicted, cells = predict(problem, plan), [name, problem.rows, problem.tasks, problem.p, plan]
            for direction in DIRECTIONS:
                if (row := predicted.get(direction)) is None:
                    cells += ["-"] * (len(directions) // 2)
                    continue
                units = (f"{row[key] / unit:.1f}" for key, unit in zip(KEYS, UNITS.values(), strict=True))
                cells += [row["launches"], *units, f"{row['us']:.1f}", f"{row['ratio']:.3f}", row["bound"]]
            both = predicted.get("both")
            cells += (
                ["-"] * 3 if both is None else [f"{both['us']:.1f}", f"{both['ratio']:.3f}", f"{both['host_us']:.0f}"]
            )
            lines.append(line(cells))
    return "\n".join(lines)


def measured(content: dict) -> Iterator[dict]:
    """What bench.gpu_evidence measured of `linear` in bf16, with what is predicted of it."""
    plans = {implementation: plan for plan, implementation in IMPLEMENTATIONS.items()}
    for stage in content["stages"].values():
        for row in stage.get("results", []):
            plan = plans.get(row.get("implementation"))
            if (
                plan is None
                or row.get("case") not in ("linear", "decode")
                or "us" not in row
                or row["dtype"] != "bfloat16"
            ):
                continue
            shape = (row[key] for key in ("M", "K", "N", "T", "p", "R", "S"))
            predicted = predict(Problem(*shape), plan).get(row["direction"])
            if predicted is not None:
                yield {**row, "plan": plan, "predicted": predicted}


def comparison(content: dict) -> str:
    """Measured medians, each beside its prediction."""
    head = ["rows", "K", "N", "tasks", "p", "case", "plan", "direction", "predicted us", "measured us"]
    head += ["measured / predicted", "predicted / base", "measured / base"]
    lines = [line(head), line(["--:"] * 5 + ["---"] * 3 + ["--:"] * 5)]
    for row in measured(content):
        us, predicted = row["us"]["median"], row["predicted"]
        cells = [row[key] for key in ("M", "K", "N", "T", "p", "case", "plan", "direction")]
        cells += [f"{predicted['us']:.1f}", f"{us:.1f}", f"{us / predicted['us']:.2f}", f"{predicted['ratio']:.3f}"]
        lines.append(line([*cells, f"{row['ratio_to_base']['median']:.3f}" if "ratio_to_base" in row else "-"]))
    return "\n".join(lines)


HEAD = """# Predicted time of an adapted linear on an H200

Written by `python -m bench.model`; nothing here is measured but what is said to be. bench/roofline.py and bench/model.py say
what is assumed."""
PREDICTED = """## Predicted

bound: where most of the time beyond the base's goes. host us: of the launches in eager mode. L2: 0 where the library's rates
have it in them."""


def document(results: Path, found: Iterable[tuple[str, Problem]]) -> str:
    """The predictions, after what is measured of them in results/<device>/results.json."""
    parts = [HEAD]
    for file in sorted(results.glob("*/results.json")):
        content = json.loads(file.read_text())
        if "stages" in content:
            parts += [f"## Measured: {content['environment']['device']}", comparison(content)]
    return "\n\n".join([*parts, PREDICTED, table(found)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where RESULTS.md goes")
    options = parser.parse_args()
    text = document(RESULTS, problems())
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "RESULTS.md").write_text(text)


if __name__ == "__main__":
    main()
