"""The stages of `bench.gpu_evidence`, one process each: python -m bench.gpu_stages STAGE [--into FILE]

Each result is one line of JSON, written when it is there. STAGE is a number, or `warm`, which compiles what the timed
stages will launch, or `tiny`, one small call each way for a memory checker.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import which
from xml.etree import ElementTree

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilora_kernels import backend, functional
from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.call import DIFFERENTIABLE, Call
from lilora_kernels.ops.delta import reference, traffic
from lilora_kernels.ops.philox import keep_mask, keep_scale

from .gpu_timing import Ceilings, Machine, against_floor, ceilings, figures, marked, measure, nbytes

ROOT = Path(__file__).parent.parent
SCALING = 2.0
GRADIENTS = ("x", "a", "b0", "u", "v", "fusion")
GATE_UP, DOWN, ATTENTION = (4096, 11008), (11008, 4096), (4096, 4096)  # K, N of LLaVA-1.5-7B
TINY = (32, 48)
CHECKED_ROWS = 32


@dataclass(frozen=True)
class Problem:
    """M rows in T contiguous samples, K to N through R and S."""

    rows: int
    columns: int
    outputs: int
    tasks: int = 1
    p: float = 0.0
    rank: int = 128
    sub_rank: int = 64

    def describe(self, machine: Machine) -> dict:
        names = {"M": self.rows, "K": self.columns, "N": self.outputs, "R": self.rank, "S": self.sub_rank}
        return {**names, "T": self.tasks, "p": self.p, "dtype": str(machine.dtype).removeprefix("torch.")}

    def base_flops(self) -> int:
        return 2 * self.rows * self.columns * self.outputs

    def adapter_flops(self) -> int:
        """Of h = x A^T and y = h M_t^T; backward takes twice as many."""
        return 2 * self.rows * self.rank * (self.columns + self.outputs)


class Operands:
    """Random tensors of one call, the parameters requiring gradients."""

    def __init__(self, problem: Problem, machine: Machine, seed: int) -> None:
        g = torch.Generator(machine.device).manual_seed(seed)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            t = torch.randn(*shape, generator=g, dtype=machine.dtype, device=machine.device)
            return t.mul_(scale).requires_grad_()

        m, k, n, r, s = problem.rows, problem.columns, problem.outputs, problem.rank, problem.sub_rank
        self.problem = problem
        self.x, self.dy = randn(m, k), randn(m, n).detach()
        self.weight = randn(n, k, scale=k**-0.5).detach()
        self.a, self.b0 = randn(r, k, scale=k**-0.5), randn(n, r, scale=r**-0.5)
        self.u, self.v = randn(problem.tasks, n, s, scale=s**-0.5), randn(problem.tasks, s, r, scale=r**-0.5)
        self.fusion = randn(problem.tasks)
        self.task = None
        if problem.tasks > 1:
            at = torch.arange(m, device=machine.device) * problem.tasks // m
            self.task = at.to(torch.int32)
        self.seed = torch.tensor([seed + 1], device=machine.device) if problem.p else None
        with torch.no_grad():
            self.h = (self.x @ self.a.T).contiguous()

    def nbytes(self) -> int:
        return nbytes(vars(self).values())

    def factors(self) -> tuple[Tensor, ...]:
        return self.a, self.b0, self.u, self.v, self.fusion

    def call(self) -> Call:
        factors = (t.detach() for t in self.factors())
        return Call(*factors, self.task, None, None, self.seed, SCALING, self.problem.p, None)

    def gradients(self) -> list[Tensor]:
        return [getattr(self, name) for name in GRADIENTS]


def operand_sets(problem: Problem, machine: Machine) -> list[Operands]:
    first = Operands(problem, machine, 0)
    return [first] + [Operands(problem, machine, i) for i in range(1, machine.copies(first.nbytes()))]


def ordered(name: str | None) -> AbstractContextManager:
    return nullcontext() if name is None else backend(name)


# --- the competitors ------------------------------------------------------------------------------------------------


def base(s: Operands) -> Tensor:
    return F.linear(s.x, s.weight)


def ours(s: Operands, seed: Tensor | None = None) -> Tensor:
    """As the layer calls it: a new dropout seed for every forward."""
    p = s.problem.p
    if p and seed is None:
        seed = functional.draw_seed(s.x.device)
    return functional.linear(s.x, s.weight, None, *s.factors(), task=s.task, seed=seed, scaling=SCALING, p=p)


def peft_layer(s: Operands) -> nn.Module:
    """PEFT's LoRA of the same rank on the same base, its parameters in the base's dtype: one adapter for all rows."""
    import peft

    problem = s.problem
    plain = nn.Linear(problem.columns, problem.outputs, bias=False, device="meta")
    plain.weight = nn.Parameter(s.weight, requires_grad=False)
    config = peft.LoraConfig(
        r=problem.rank, lora_alpha=SCALING * problem.rank, lora_dropout=problem.p, target_modules=["0"]
    )
    model = peft.get_peft_model(nn.Sequential(plain), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight = nn.Parameter(s.a.detach().clone())
    layer.lora_B["default"].weight = nn.Parameter(s.b0.detach().clone())
    return layer


def truth(s: Operands) -> tuple[Tensor, Tensor]:
    """y and dx of some rows in fp64; dy is the formula's own."""
    m = s.problem.rows
    pick = torch.linspace(0, m - 1, min(m, CHECKED_ROWS), device=s.x.device).long()
    x = s.x.detach()[pick].double().requires_grad_()
    keep = keep_mask(s.seed, *s.x.shape, s.problem.p)[pick] if s.problem.p else None
    task = None if s.task is None else s.task[pick]
    wide = (t.detach().double() for t in s.factors())
    y = reference.delta(
        x, *wide, task=task, keep=keep, keep_scale=keep_scale(s.problem.p) if s.problem.p else 1.0, scaling=SCALING
    )
    y = y + x @ s.weight.double().T
    (dx,) = torch.autograd.grad(y, x, s.dy[pick].double())
    return pick, y.detach(), dx


def check(name: str, got: Tensor, want: Tensor) -> None:
    tolerance = 1e-4 if got.dtype == torch.float32 else 2e-2
    error = ((got.double() - want).abs().max() / want.abs().max()).item()
    if not error <= tolerance:
        raise AssertionError(f"{name} is wrong by {error:.1e} of its largest value; no figure is taken")


def check_ours(s: Operands, name: str | None) -> None:
    pick, y_truth, dx_truth = truth(s)
    with ordered(name):
        y = ours(s, s.seed)
        (dx,) = torch.autograd.grad(y, s.x, s.dy)
    check(f"y of {name or 'ours'}", y.detach()[pick], y_truth)
    check(f"dx of {name or 'ours'}", dx[pick], dx_truth)


def check_peft(s: Operands, layer: nn.Module) -> None:
    layer.eval()
    wide = [t.detach().double() for t in (s.x[:CHECKED_ROWS], s.a, s.b0)]
    want = reference.delta(*wide, scaling=SCALING) + wide[0] @ s.weight.double().T
    check("y of PEFT", layer(s.x[:CHECKED_ROWS]).detach(), want)
    layer.train()


# --- the timed stages -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """`run(machine, ceilings)` yields results. Cases of one `variant` launch the same compiled kernels."""

    name: str
    run: Callable[[Machine, Ceilings], Iterator[dict]]
    variant: tuple | None = None


def stage_1(dry_run: bool) -> Iterator[Case]:
    """The ceilings, and F.linear from 1 to 16384 rows."""
    yield Case("ceilings", measured_ceilings)
    rows = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
    for shape in [TINY] if dry_run else (GATE_UP, DOWN, ATTENTION):
        for m in (3, 16) if dry_run else reversed(rows):
            yield Case("F.linear", partial(time_base, Problem(m, *shape)))


def measured_ceilings(machine: Machine, ceiling: Ceilings) -> Iterator[dict]:
    yield {
        "copy_gb_per_s": round(ceiling.bytes_per_second / 1e9, 1),
        "matmul_tflop_per_s": round(ceiling.flops_per_second / 1e12, 1),
    }


def time_base(problem: Problem, machine: Machine, ceiling: Ceilings) -> Iterator[dict]:
    m, k, n = problem.rows, problem.columns, problem.outputs
    size = (m * k + n * k + m * n) * machine.dtype.itemsize
    count = machine.copies(size)
    sets = [
        [torch.randn(*shape, dtype=machine.dtype, device=machine.device) for shape in ((m, k), (n, k))]
        for _ in range(count)
    ]
    # Short calls are timed together, each on inputs of its own.
    calls = count if m <= 512 else 1

    def run(turn: int) -> None:
        for at in range(calls):
            F.linear(*sets[(turn + at) % count])

    times = measure(machine, {"base": marked(run)}, ["forward"], calls=calls)["base"]
    found = figures(times["forward"])
    yield {
        **{key: problem.describe(machine)[key] for key in ("M", "K", "N", "dtype")},
        "implementation": "base",
        "direction": "forward",
        **found,
        **against_floor(found["us"]["median"], size, problem.base_flops(), ceiling),
    }


def stage_2(dry_run: bool) -> Iterator[Case]:
    """addmm_ in place with beta 0 and 1: what accumulating onto the adapter's output costs."""
    for m in (16,) if dry_run else (8192, 2048, 4096, 16384):
        for shape in [TINY] if dry_run else (GATE_UP, DOWN, ATTENTION):
            yield Case("addmm_", partial(time_addmm, Problem(m, *shape)))


def time_addmm(problem: Problem, machine: Machine, ceiling: Ceilings) -> Iterator[dict]:
    m, k, n = problem.rows, problem.columns, problem.outputs
    size = (m * k + n * k + m * n) * machine.dtype.itemsize
    count = machine.copies(size)
    sets = [
        [torch.randn(*shape, dtype=machine.dtype, device=machine.device) for shape in ((m, k), (n, k), (m, n))]
        for _ in range(count)
    ]

    def forward(turn: int, beta: int) -> Tensor:
        x, weight, y = sets[turn % count]
        return y.addmm_(x, weight.T, beta=beta)

    def backward(turn: int, beta: int) -> Tensor:
        dx, weight, dy = sets[turn % count]
        return dx.addmm_(dy, weight, beta=beta)

    for direction, function in (("forward", forward), ("backward", backward)):
        runs = {f"beta {beta}": marked(partial(function, beta=beta)) for beta in (0, 1)}
        if direction == "forward":
            runs["base"] = marked(lambda turn: F.linear(*sets[turn % count][:2]))
        else:
            runs["base"] = marked(lambda turn: sets[turn % count][2] @ sets[turn % count][1])
        times = measure(machine, runs, [direction])
        written = (m * n if direction == "forward" else m * k) * machine.dtype.itemsize
        for name in runs:
            found = figures(times[name][direction], times["base"][direction])
            bytes_ = size + (written if name == "beta 1" else 0)
            yield {
                **{key: problem.describe(machine)[key] for key in ("M", "K", "N", "dtype")},
                "implementation": name,
                "direction": direction,
                **found,
                **against_floor(found["us"]["median"], bytes_, problem.base_flops(), ceiling),
            }


def bucket(kernel: str, rows: int, one_launch: bool) -> int:
    """The bucket of rows whose launch configuration a call of so many rows takes."""
    table = triton_runtime.table(triton_runtime.table_names(torch.device("cuda")))
    buckets = tuple(bucket["rows"] for bucket in table["one_launch" if one_launch else "by_phase"][kernel])
    return buckets[triton_runtime.nearest(buckets, rows)]


def stage_3(dry_run: bool) -> Iterator[Case]:
    """`linear`: forward, backward and both; and each launch alone."""
    if dry_run:
        yield Case("linear", partial(time_linear, Problem(20, *TINY, 2, 0.05, 16, 8)), ())
        yield Case("launches", partial(time_launches, Problem(20, *TINY, 2, 0.05, 16, 8)))
        return
    order = [(8192, GATE_UP), (8192, DOWN), (8192, ATTENTION), (2048, GATE_UP), (2048, DOWN), (2048, ATTENTION)]
    order += [(4096, GATE_UP), (4096, DOWN), (4096, ATTENTION)]
    for m, shape in order:
        for tasks, p in ((8, 0.05), (1, 0.05), (1, 0.0), (64, 0.05), (8, 0.0), (64, 0.0)):
            problem = Problem(m, *shape, tasks, p)
            variant = ("linear", bucket("forward", m, False), bucket("backward", m, False), tasks > 1, p > 0)
            yield Case("linear", partial(time_linear, problem), variant)
            if p and (m == 8192 or shape is GATE_UP):
                yield Case("launches", partial(time_launches, problem))


def time_linear(problem: Problem, machine: Machine, ceiling: Ceilings) -> Iterator[dict]:
    sets = operand_sets(problem, machine)
    check_ours(sets[0], None)

    def candidate(forward: Callable[[int], tuple[Tensor, list[Tensor]]], name: str | None = None):
        def run(turn: int, mark: Callable[[], None]) -> None:
            with ordered(name):
                y, inputs = forward(turn % len(sets))
                mark()
                torch.autograd.grad(y, inputs, sets[turn % len(sets)].dy)
                mark()

        return run

    runs = {
        "base": candidate(lambda at: (base(sets[at]), [sets[at].x])),
        "ours": candidate(lambda at: (ours(sets[at]), sets[at].gradients())),
    }

    def eager() -> Callable:
        if machine.on_gpu:  # on a CPU eager draws another mask
            check_ours(sets[0], "eager")
        return candidate(lambda at: (ours(sets[at]), sets[at].gradients()), "eager")

    def peft() -> Callable:
        layers = [peft_layer(s) for s in sets]
        check_peft(sets[0], layers[0])
        adapters = [[layer.lora_A["default"].weight, layer.lora_B["default"].weight] for layer in layers]
        return candidate(lambda at: (layers[at](sets[at].x), [sets[at].x, *adapters[at]]))

    for peer in (eager, peft):
        try:
            runs[peer.__name__] = peer()
        except Exception as error:  # says why in its place; the others are still compared
            yield {**problem.describe(machine), "implementation": peer.__name__, "error": f"{error}"[:500]}
    times = measure(machine, runs, ["forward", "backward"])
    s = sets[0]
    x, y, weight = s.x.nbytes, s.dy.nbytes, s.weight.nbytes
    parameters = nbytes(s.factors())
    least = {
        "base": {"forward": (x + weight + y, problem.base_flops()), "backward": (y + weight + x, problem.base_flops())}
    }
    least["adapted"] = {
        "forward": (x + weight + y + parameters + s.h.nbytes, problem.base_flops() + problem.adapter_flops()),
        "backward": (
            y + weight + 2 * x + 2 * parameters + s.h.nbytes,
            problem.base_flops() + 2 * problem.adapter_flops(),
        ),
    }
    for floors in least.values():
        floors["both"] = tuple(map(sum, zip(floors["forward"], floors["backward"], strict=True)))
    for found in times.values():
        found["both"] = [sum(pair) for pair in zip(found["forward"], found["backward"], strict=True)]
    for name in runs:
        for direction in ("forward", "backward", "both"):
            result = figures(times[name][direction], times["base"][direction])
            bytes_, flops = least["base" if name == "base" else "adapted"][direction]
            yield {
                **problem.describe(machine),
                "implementation": name,
                "direction": direction,
                **result,
                **against_floor(result["us"]["median"], bytes_, flops, ceiling),
                "host_us": figures(times[name]["host"])["us"]["median"],
            }


def phase_flops(direction: str, phase: int, problem: Problem, finish: int) -> int:
    """Of the products of one phase; `finish` is the phase that completes h or dh."""
    m, k, n, r, s = problem.rows, problem.columns, problem.outputs, problem.rank, problem.sub_rank
    parts = {
        "forward": {0: m * k * r, 2: m * n * (r + s)},
        "backward": {0: m * n * (r + s) + m * n * r, 2: 2 * m * k * r + m * s * r},
    }
    return 2 * (parts[direction].get(phase, 0) + (m * r * s if phase == finish else 0))


def time_launches(problem: Problem, machine: Machine, ceiling: Ceilings) -> Iterator[dict]:
    """Every launch between marks of its own, after the launches before it."""
    from lilora_kernels.ops.delta.triton_backend import Backward, Forward

    sets = operand_sets(problem, machine)
    calls = [s.call() for s in sets]
    inputs = [s.x.detach() for s in sets]
    needs = frozenset(GRADIENTS)
    makers = {
        "forward": lambda at: Forward(inputs[at], None, calls[at], one_launch=False),
        "backward": lambda at: Backward(sets[at].dy, inputs[at], sets[at].h, calls[at], needs, one_launch=False),
    }
    for direction, make in makers.items():
        work = make(0)
        phases = [first for first, _ in work.phases]

        def run(turn: int, mark: Callable[[], None], make=make) -> None:
            work = make(turn % len(sets))
            for first, last in work.phases:
                work.launch(first, last)
                mark()

        times = measure(machine, {"ours": run}, [str(phase) for phase in phases])["ours"]
        item = machine.dtype.itemsize
        shape = traffic.Shape(
            problem.rows, problem.columns, problem.outputs, problem.rank, problem.sub_rank, problem.tasks, item, item
        )
        finish = 1 if 1 in phases else 0
        for phase in phases:
            sizes = triton_runtime.phase_config(work.config, phase, phase)
            if direction == "backward":
                sizes["CHUNK"] = work.chunk  # may have grown for many tasks
            moved = [found for found in getattr(traffic, direction)(shape, sizes) if found.phase == phase]
            result = figures(times[str(phase)])
            flops = phase_flops(direction, phase, problem, finish)
            yield {
                **problem.describe(machine),
                "implementation": "ours",
                "direction": direction,
                "phase": phase,
                **result,
                **against_floor(result["us"]["median"], sum(found.unique for found in moved), flops, ceiling),
                "bytes_issued": sum(found.issued for found in moved),
                "config": sizes,
            }


def stage_4(dry_run: bool) -> Iterator[Case]:
    """`delta` in one launch each way against a launch for each phase."""
    if dry_run:
        yield Case("delta", partial(time_delta, Problem(20, *TINY, 2, 0.05, 16, 8)), ())
        return
    for tasks in (8, 1):
        for m in (8192, 64, 256, 1024, 2048, 16, 1):
            for shape in (GATE_UP, DOWN):
                buckets = [bucket(kernel, m, one) for kernel in ("forward", "backward") for one in (True, False)]
                if tasks <= m:
                    variant = ("delta", *buckets, tasks > 1)
                    yield Case("delta", partial(time_delta, Problem(m, *shape, tasks, 0.05)), variant)


def time_delta(problem: Problem, machine: Machine, ceiling: Ceilings) -> Iterator[dict]:
    from lilora_kernels.ops.delta.triton_backend import run_backward, run_forward

    sets = operand_sets(problem, machine)
    calls = [s.call() for s in sets]
    inputs = [s.x.detach() for s in sets]
    needs = frozenset(GRADIENTS)

    def candidate(one_launch: bool):
        def run(turn: int, mark: Callable[[], None]) -> None:
            at = turn % len(sets)
            _, h = run_forward(inputs[at], None, calls[at], one_launch)
            mark()
            run_backward(sets[at].dy, inputs[at], h, calls[at], needs, one_launch)
            mark()

        return run

    for one_launch in (True, False):
        pick, y_truth, _ = truth(sets[0])
        y = run_forward(inputs[0], None, calls[0], one_launch)[0] + F.linear(inputs[0], sets[0].weight)
        check("delta", y[pick], y_truth)
    runs = {"one launch": candidate(True), "by phase": candidate(False)}
    times = measure(machine, runs, ["forward", "backward"])
    s = sets[0]
    parameters = nbytes(s.factors())
    least = {
        "forward": (s.x.nbytes + s.dy.nbytes + parameters + s.h.nbytes, problem.adapter_flops()),
        "backward": (s.dy.nbytes + 2 * s.x.nbytes + 2 * parameters + s.h.nbytes, 2 * problem.adapter_flops()),
    }
    for name in runs:
        for direction in ("forward", "backward"):
            result = figures(times[name][direction], times["by phase"][direction])
            result["ratio_to_by_phase"] = result.pop("ratio_to_base")
            yield {
                **problem.describe(machine),
                "implementation": name,
                "direction": direction,
                **result,
                **against_floor(result["us"]["median"], *least[direction], ceiling),
                "host_us": figures(times[name]["host"])["us"]["median"],
            }


def stage_5(dry_run: bool) -> Iterator[Case]:
    """Decoding: a few rows in a CUDA graph."""
    if dry_run:
        yield Case("decode", partial(time_decode, Problem(4, *TINY, 2, 0.0, 16, 8)), ())
        return
    for m, tasks in ((1, 1), (8, 8), (64, 64), (8, 1), (64, 1), (64, 8)):
        for shape in (GATE_UP, DOWN, ATTENTION):
            variant = ("decode", bucket("forward", m, True), tasks > 1)
            yield Case("decode", partial(time_decode, Problem(m, *shape, tasks)), variant)


def time_decode(problem: Problem, machine: Machine, ceiling: Ceilings) -> Iterator[dict]:
    sets = operand_sets(problem, machine)
    for name in (None, "eager"):
        check_ours(sets[0], name)
    functions = {"base": (base, None), "ours": (ours, None), "eager": (ours, "eager")}

    def graph_of(function: Callable[[Operands], Tensor], name: str | None) -> Callable[[], None]:
        def run() -> list[Tensor]:
            with ordered(name), torch.no_grad():
                return [function(s) for s in sets]

        want = run()
        if not machine.on_gpu:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
        graph.replay()
        for y, eager_y in zip(got, want, strict=True):
            check("the graph's y", y, eager_y.double())
        return graph.replay

    replays = {name: graph_of(*function) for name, function in functions.items()}
    runs = {name: marked(lambda _, replay=replay: replay()) for name, replay in replays.items()}
    times = measure(machine, runs, ["forward"], calls=len(sets))
    s = sets[0]
    least = s.x.nbytes + s.weight.nbytes + s.dy.nbytes, problem.base_flops()
    adapted = least[0] + nbytes(s.factors()), least[1] + problem.adapter_flops()
    for name in runs:
        result = figures(times[name]["forward"], times["base"]["forward"])
        yield {
            **problem.describe(machine),
            "implementation": name,
            "direction": "forward",
            **result,
            **against_floor(result["us"]["median"], *(least if name == "base" else adapted), ceiling),
        }


STAGES = {1: stage_1, 2: stage_2, 3: stage_3, 4: stage_4, 5: stage_5}


def run_cases(cases: Iterator[Case], machine: Machine, write: Callable[[dict], None]) -> int:
    """Every case, whatever happens to others; returns how many failed."""
    failed = 0
    ceiling = ceilings(machine)
    for case in cases:
        start = time.perf_counter()
        try:
            for result in case.run(machine, ceiling):
                write({"case": case.name, **result})
                print(brief({"case": case.name, **result}), flush=True)
        except Exception as error:
            failed += 1
            traceback.print_exc()
            problem = case.run.args[0] if isinstance(case.run, partial) else None
            shape = problem.describe(machine) if problem else {}
            write({"case": case.name, **shape, "error": f"{type(error).__name__}: {error}"[:500]})
            machine.synchronize()  # raises when the device is lost to this process: later cases would all fail
        print(f"  {time.perf_counter() - start:.1f} s", flush=True)
        if machine.on_gpu:
            torch.cuda.empty_cache()
    return failed


def brief(result: dict) -> str:
    """One line of a table."""
    names = ("case", "M", "K", "N", "T", "p", "implementation", "direction", "phase")
    cells = [str(result[name]) for name in names if name in result]
    if "us" in result:
        cells.append(f"{result['us']['median']:.1f} us")
        cells.append(f"{result['percent_of_floor']:.0f} % of floor")
    for name in ("ratio_to_base", "ratio_to_by_phase"):
        if name in result:
            cells.append(f"x{result[name]['median']:.3f}")
    cells += [f"{name} {result[name]}" for name in ("copy_gb_per_s", "matmul_tflop_per_s") if name in result]
    return "  ".join(cells)


def warm(dry_run: bool, part: int, parts: int) -> int:
    """Compile the kernels of the timed stages into Triton's cache: this part of the cases with kernels of their own."""
    variants = {}
    for stage in (3, 4, 5):
        for case in STAGES[stage](dry_run):
            if case.variant is not None:
                variants.setdefault((stage, *case.variant), case)
    return run_cases(list(variants.values())[part::parts], Machine.here(dry_run, 2), lambda _: None)


# --- correctness ------------------------------------------------------------------------------------------------------


def tiny(dry_run: bool) -> None:
    """One call each way, in one launch and by phase, small enough for a memory checker."""
    from lilora_kernels.ops.delta.triton_backend import run_backward, run_forward

    machine = Machine.here(dry_run, 2)
    problem = Problem(40, 32, 48, 3, 0.1, 16, 8)
    s = Operands(problem, replace(machine, device=torch.device("cpu"), dtype=torch.float32), 0)
    given = {name: t.detach() for name, t in vars(s).items() if isinstance(t, Tensor)}
    cast = {name: t.to(machine.dtype) if t.is_floating_point() else t for name, t in given.items()}
    moved = {name: t.to(machine.device) for name, t in cast.items()}
    adapter = (moved[name] for name in DIFFERENTIABLE[1:6])
    call = Call(*adapter, moved["task"], None, None, moved["seed"], SCALING, problem.p, None)
    for one_launch in (True, False):
        run_forward(moved["x"], None, call, one_launch)
        run_backward(moved["dy"], moved["x"], moved["h"], call, frozenset(GRADIENTS), one_launch)
    machine.synchronize()
    print("tiny: done")


def stage_0(dry_run: bool, seconds: float, write: Callable[[dict], None]) -> int:
    """The GPU tests, a process for each file, and the memory checkers, all at the same time."""
    deadline = time.monotonic() + seconds
    checker = which("compute-sanitizer") or which("/usr/local/cuda/bin/compute-sanitizer")
    tiny_command = [sys.executable, "-m", "bench.gpu_stages", "tiny"] + ["--dry-run"] * dry_run
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        tests = ROOT / "tests" / "gpu"
        # A file named on the command line is collected in any case, a folder's only where there is a GPU.
        for target in [tests] if dry_run else sorted(tests.glob("test_*.py")):
            report = Path(folder) / f"{target.stem}.xml"
            pytest = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-ra",
                "--tb=short",
                "--durations=5",
                "-p",
                "no:cacheprovider",
            ]
            jobs[target.name] = [*pytest, f"--junitxml={report}", str(target)]
        if checker is not None:
            for tool in ("memcheck", "racecheck"):
                jobs[tool] = [checker, "--tool", tool, "--error-exitcode", "9", *tiny_command]
        else:
            jobs["tiny"] = tiny_command
            write({"case": "memcheck and racecheck", "error": "compute-sanitizer is not on this machine"})
        # Without the caching allocator every tensor is an allocation of its own, with ends that memcheck knows.
        plain = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        started = time.monotonic()
        running = {}
        for name, command in jobs.items():
            with (Path(folder) / f"{name}.log").open("wb") as log:
                environment = plain if name in ("memcheck", "racecheck") else None
                running[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while running:
            time.sleep(0.1)
            late = time.monotonic() > deadline
            if late:  # pytest, interrupted, writes what it knows
                for process in running.values():
                    process.send_signal(signal.SIGINT)
                time.sleep(8)
            for name, process in list(running.items()):
                code = process.poll()
                if code is None and not late:
                    continue
                del running[name]
                result = {"case": name, "seconds": round(time.monotonic() - started, 1), "exit_code": code}
                if late:
                    process.kill()
                    result["error"] = f"stopped after {seconds:.0f} s"
                result |= outcomes(Path(folder) / f"{Path(name).stem}.xml")
                # 5: pytest found no tests, as on a machine without a GPU.
                failed += code not in ((0, 5) if dry_run else (0,))
                write(result)
                text = (Path(folder) / f"{name}.log").read_text(errors="replace")
                print(
                    f"{text[-100_000:]}\n--- {name}: {json.dumps({k: v for k, v in result.items() if k != 'failures'})}"
                )
    return failed


def outcomes(report: Path) -> dict:
    """Counts and failures of pytest's JUnit file, if there is one."""
    if not report.is_file():
        return {}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    broken = {case: fault for case in cases for fault in case if fault.tag in ("failure", "error")}
    skipped = sum(1 for case in cases if case.find("skipped") is not None)
    return {
        "tests": len(cases),
        "passed": len(cases) - len(broken) - skipped,
        "failures": [
            {"test": case.get("name"), "message": (fault.get("message") or "")[:1000]} for case, fault in broken.items()
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--into", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=200.0, help="for stage 0")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="for warm: which part of how many")
    options = parser.parse_args()

    def write(result: dict) -> None:
        if options.into is not None:
            with options.into.open("a") as file:
                file.write(json.dumps(result) + "\n")

    torch.manual_seed(0)
    if options.stage == "tiny":
        tiny(options.dry_run)
        return 0
    if options.stage == "warm":
        return int(warm(options.dry_run, *options.part) > 0)
    if options.stage == "0":
        return int(stage_0(options.dry_run, options.seconds, write) > 0)
    cases = STAGES[int(options.stage)](options.dry_run)
    return int(run_cases(cases, Machine.here(options.dry_run, options.rounds), write) > 0)


if __name__ == "__main__":
    sys.exit(main())
