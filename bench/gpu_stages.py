"""The timed stages of `bench.gpu_evidence`, one process each: python -m bench.gpu_stages STAGE [--into FILE]

Each result is one line of JSON, written when it is there. STAGE is a number, or `call`, one call for a profiler. The cases
of a stage come most informative first; after --seconds those that are left over are counted and left out. Exit codes: 0,
1 when something failed, 75 when this process has lost the device and another has to go on, with --start-at.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from lilora_kernels import backend, backends, cuda_library
from lilora_kernels.ops.philox import keep_mask, keep_scale
from lilora_kernels.ops.schema import AdapterArgs
from tools import traffic

from .compare import REGISTRY, Wrong, compare, error, gated, poisoned, row
from .environment import age_of_process
from .gpu_cases import Case, LostDevice, run_cases
from .gpu_profile import call_once, profile
from .interpreter import patch_once_a_launch
from .peers import OURS_ON_GPU, Built, lilora_adapter
from .problems import ATTENTION, DOWN, GATE_UP, GRADIENTS, TINY, Operands, Problem, operand_sets
from .timing import Ceilings, Machine, figures, marked, measure


def problem(dry_run: bool, rows: int, shape: tuple[int, int], tasks: int = 1, p: float = 0.0) -> Problem:
    """In bfloat16 with LLaVA's ranks, or tiny in fp32: what the interpreter computes."""
    if dry_run:
        return Problem(rows, *shape, tasks, p, rank=16, sub_rank=8, dtype=torch.float32)
    return Problem(rows, *shape, tasks, p)


def stage_1(dry_run: bool) -> Iterator[Case]:
    """The ceilings, and F.linear from 1 to 16384 rows."""
    yield Case("ceilings", measured_ceilings)
    if dry_run:
        yield Case("F.linear", partial(time_base, problem(True, 16, TINY)), ("base",))
        return
    for at, m in enumerate(
        (8192, 1, 64, 2048, 512, 16, 4096, 256, 1024, 128, 8, 32, 2, 4, 16384, 1536, 3072, 6144, 12288)
    ):
        for shape in (GATE_UP, DOWN, ATTENTION):
            yield Case("F.linear", partial(time_base, problem(False, m, shape)), ("base",), at > 3)


def measured_ceilings(machine: Machine, ceiling: Ceilings) -> Iterator[dict]:
    yield {
        "copy_gb_per_s": round(ceiling.bytes_per_second / 1e9, 1),
        "read_gb_per_s": round(ceiling.read_per_second / 1e9, 1),
        "matmul_tflop_per_s": round(ceiling.flops_per_second / 1e12, 3),
    }


def base_shape(problem: Problem) -> dict:
    return {key: problem.describe()[key] for key in ("M", "K", "N", "dtype")}


def time_base(problem: Problem, machine: Machine, ceiling: Ceilings) -> Iterator[dict]:
    m, k, n = problem.rows, problem.columns, problem.outputs
    bytes_, flops = problem.least("forward", adapted=False)
    count = machine.copies(bytes_)
    sets = [
        [torch.randn(*shape, dtype=problem.dtype, device=machine.device) for shape in ((m, k), (n, k))]
        for _ in range(count)
    ]
    # Short calls are timed together, each on inputs of its own.
    calls = count if m <= 512 else 1

    def run(turn: int) -> None:
        for at in range(calls):
            F.linear(*sets[(turn + at) % count])

    found = figures(measure(machine, {"base": marked(run)}, ["forward"], calls=calls)["base"]["forward"])
    rates = ceiling.rates(found["us"]["median"], bytes_, flops)
    yield {**base_shape(problem), "implementation": "base", "direction": "forward", **found, **rates}


def stage_2(dry_run: bool) -> Iterator[Case]:
    """addmm_ in place with beta 0 and 1: what accumulating onto the adapter's output costs."""
    for m in (16,) if dry_run else (8192, 2048, 4096, 16384):
        for shape in [TINY] if dry_run else (GATE_UP, DOWN, ATTENTION):
            given = problem(dry_run, m, shape)
            yield Case("addmm_", partial(time_addmm, given), ("base", "beta 0", "beta 1"), m != 8192)


def time_addmm(problem: Problem, machine: Machine, ceiling: Ceilings) -> Iterator[dict]:
    m, k, n = problem.rows, problem.columns, problem.outputs
    size, flops = problem.least("forward", adapted=False)
    count = machine.copies(size)
    sets = [
        [torch.randn(*shape, dtype=problem.dtype, device=machine.device) for shape in ((m, k), (n, k), (m, n))]
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
        written = (m * n if direction == "forward" else m * k) * problem.dtype.itemsize
        for name in runs:
            found = figures(times[name][direction], times["base"][direction])
            rates = ceiling.rates(found["us"]["median"], size + (written if name == "beta 1" else 0), flops)
            yield {**base_shape(problem), "implementation": name, "direction": direction, **found, **rates}


TRAINING = ("base", *OURS_ON_GPU, "peft", "formula", "grouped_mm")
SLOW_TO_INTERPRET = ("ours_operation", "ours_triton_one_launch")  # and like others that a dry run tries
COMPILED = ("base", "ours", "peft", "peft_compiled", "formula_compiled")
OUTSIDE = ("base", "ours", "peft", "lorafusion", "nemo_automodel")


def tried(peers: tuple[str, ...], dry_run: bool) -> tuple[str, ...]:
    return tuple(name for name in peers if not (dry_run and name in SLOW_TO_INTERPRET))


def stage_3(dry_run: bool) -> Iterator[Case]:
    """`linear` against every peer: forward, backward and both; and each launch alone."""

    def case(m: int, shape: tuple[int, int], tasks: int, p: float, extra: bool) -> Case:
        given = problem(dry_run, m, shape, tasks, p)
        peers = (*TRAINING, "peft_default") if tasks == 1 and m == 8192 else tried(TRAINING, dry_run)
        return Case("linear", partial(time_linear, given, peers=peers), ("base", "ours"), extra)

    def launches(m: int, shape: tuple[int, int], tasks: int, extra: bool) -> Case:
        return Case("launches", partial(time_launches, problem(dry_run, m, shape, tasks, 0.05)), ("ours",), extra)

    if dry_run:
        yield case(10, TINY, 2, 0.05, False)
        yield launches(10, TINY, 2, False)
        return
    for tasks in (8, 1, 64):
        for shape in (GATE_UP, DOWN):
            yield case(8192, shape, tasks, 0.05, tasks == 64)
            if tasks == 8:
                yield launches(8192, shape, tasks, False)
    for tasks in (1, 8):
        for shape in (GATE_UP, DOWN):
            yield case(8192, shape, tasks, 0.0, True)
    for m, shape in ((2048, GATE_UP), (2048, DOWN), (8192, ATTENTION), (512, GATE_UP), (4096, GATE_UP), (4096, DOWN)):
        for tasks, p in ((8, 0.05), (1, 0.05), (1, 0.0), (64, 0.05)):
            yield case(m, shape, tasks, p, True)
            if tasks == 8:
                yield launches(m, shape, tasks, True)


def time_linear(problem: Problem, machine: Machine, ceiling: Ceilings, peers: tuple[str, ...]) -> Iterator[dict]:
    yield from compare("linear", problem, peers, machine, ceiling, training=True, seconds=None if machine.tiny else 1.0)


def stage_9(dry_run: bool) -> Iterator[Case]:
    """Peers that take minutes to compile: torch.compile's, and the kernels that LILORA_PEERS names."""
    given = problem(True, 20, TINY) if dry_run else problem(False, 8192, GATE_UP, 1, 0.05)
    for peers in (OUTSIDE, COMPILED):
        yield Case("linear", partial(time_linear, given, peers=peers), ("base", "ours"))


def time_launches(problem: Problem, machine: Machine, ceiling: Ceilings) -> Iterator[dict]:
    """Every launch of the Triton kernels between marks of its own, after the launches before it."""
    from lilora_kernels.ops.delta import triton_backend, triton_jobs
    from lilora_kernels.ops.delta.triton_jobs import Backward, Forward

    sets = operand_sets(problem, machine)
    adapters = [s.adapter() for s in sets]
    inputs = [s.x.detach() for s in sets]
    needs = frozenset(GRADIENTS)
    check_delta(sets[0], adapters[0], triton_backend, one_launch=False)
    makers = {
        "forward": lambda at: Forward(inputs[at], None, adapters[at]),
        "backward": lambda at: Backward(sets[at].dy, inputs[at], sets[at].h, adapters[at], needs),
    }
    for direction, make in makers.items():
        jobs = [job.__name__ for job in make(0).jobs]

        def run(turn: int, mark: Callable[[], None], make=make) -> None:
            work = make(turn % len(sets))
            for job in work.jobs:
                job(work)
                mark()

        sizes: dict[str, dict[str, int]] = {}

        def noting(
            made, items, device, groups, tensors, numbers, waits=None, sizes=sizes, launch=triton_jobs.run
        ) -> None:
            sizes[made.kernel.__name__] = traffic.sizes(made, numbers)
            launch(made, items, device, groups, tensors, numbers, waits)

        with patch.object(triton_jobs, "run", noting):
            run(0, lambda: None)
        times = measure(machine, {"ours": run}, jobs)["ours"]
        item = problem.dtype.itemsize
        shape = traffic.Shape(
            problem.rows, problem.columns, problem.outputs, problem.rank, problem.sub_rank, problem.tasks, item, item
        )
        for job in jobs:
            moved = traffic.moved(job, shape, sizes[job])
            result = figures(times[job])
            bytes_ = sum(found.unique for found in moved)
            yield {
                **problem.describe(),
                "implementation": "ours",
                "direction": direction,
                "job": job,
                **result,
                **ceiling.rates(result["us"]["median"], bytes_, traffic.flops(job, shape)),
                "bytes_issued": sum(found.issued for found in moved),
                "config": sizes[job],
            }


def stage_4(dry_run: bool) -> Iterator[Case]:
    """`delta` by its plans one_launch and by_phase, of every backend with kernels."""

    def case(m: int, shape: tuple[int, int], tasks: int, extra: bool) -> Case:
        given = problem(dry_run, m, shape, tasks, 0.05)
        return Case("delta", partial(time_delta, given), must, extra)

    names = ["triton"] if dry_run or cuda_library.load_error() is not None else ["triton", "cuda"]
    must = tuple(f"{name}, {plan}" for name in names for plan in ("one_launch", "by_phase"))
    if dry_run:
        yield case(20, TINY, 2, False)
        return
    for at, m in enumerate((8192, 256, 64, 1024, 16, 512, 2048, 1)):
        for tasks in (8, 1):
            for shape in (GATE_UP, DOWN):
                if tasks <= m:
                    yield case(m, shape, tasks, extra=at > 3 or tasks == 1)


def kernels_of(problem: Problem, x: Tensor) -> dict[str, ModuleType]:
    """The backends with kernels for a GPU that can run here."""
    reasons = backends.unsupported_reasons("delta", x, problem.rank, problem.sub_rank)
    able = [name for name, reason in reasons.items() if reason is None and name not in ("cpu", "eager")]
    return {name: import_module(f"lilora_kernels.ops.delta.{name}_backend") for name in able}


def check_delta(s: Operands, adapter: AdapterArgs, kernels: ModuleType, one_launch: bool) -> None:
    """y and all gradients against fp64, dropout as the kernels draw it."""
    x, *factors = (t.detach().double().requires_grad_() for t in s.gradients())
    dropped = x
    if s.problem.p:
        dropped = x * keep_mask(s.seed, *x.shape, s.problem.p) * keep_scale(s.problem.p)
    want = lilora_adapter(s.problem)(dropped, factors)
    with poisoned(s.x.device):
        y, h = kernels.run_forward(s.x.detach(), None, adapter, one_launch)
    error("y of delta", y, want)
    exact = torch.autograd.grad(want, [x, *factors], y.double())
    with poisoned(s.x.device):
        grads = kernels.run_backward(y, s.x.detach(), h, adapter, frozenset(GRADIENTS), one_launch)
    for name, gradient in zip(GRADIENTS, exact, strict=True):
        error(f"gradient of {name} of delta", grads[name], gradient)


def time_delta(problem: Problem, machine: Machine, ceiling: Ceilings) -> Iterator[dict]:
    sets = operand_sets(problem, machine)
    adapters = [s.adapter() for s in sets]
    inputs = [s.x.detach() for s in sets]
    needs = frozenset(GRADIENTS)

    def candidate(kernels: ModuleType, one_launch: bool):
        def run(turn: int, mark: Callable[[], None]) -> None:
            at = turn % len(sets)
            _, h = kernels.run_forward(inputs[at], None, adapters[at], one_launch)
            mark()
            kernels.run_backward(sets[at].dy, inputs[at], h, adapters[at], needs, one_launch)
            mark()

        return run

    runs = {}
    for name, kernels in kernels_of(problem, inputs[0]).items():
        for plan, one_launch in (("one_launch", True), ("by_phase", False)):
            try:
                check_delta(sets[0], adapters[0], kernels, one_launch)
                runs[f"{name}, {plan}"] = candidate(kernels, one_launch)
            except Wrong as reason:  # it takes no figure from the others
                failed = {"implementation": f"ours: {name}, {plan}", "error": str(reason)}
                yield {**problem.describe(), **failed}
    times = measure(machine, runs, ["forward", "backward"])
    base = Problem(problem.rows, problem.columns, problem.outputs, dtype=problem.dtype)
    for name in runs:
        by_phase = name.split(",")[0] + ", by_phase"
        by_phase = by_phase if by_phase in runs else name
        for direction in ("forward", "backward"):
            result = figures(times[name][direction], times[by_phase][direction])
            result["ratio_to_by_phase"] = result.pop("ratio_to_base")
            # Of the adapter alone: what base and adapter need, less the base's weight and operations.
            bytes_, flops = problem.least(direction, adapted=True)
            bytes_ -= problem.columns * problem.outputs * problem.dtype.itemsize
            flops -= base.least(direction, adapted=False)[1]
            yield {
                **problem.describe(),
                "implementation": name,
                "direction": direction,
                **result,
                **ceiling.rates(result["us"]["median"], bytes_, flops),
                "host_us": figures(times[name]["host"])["us"]["median"],
            }


DECODING = ("base", *OURS_ON_GPU, "formula", "peft", "peft_names", "grouped_mm", "merged", "vllm", "sglang")


def stage_5(dry_run: bool) -> Iterator[Case]:
    """Decoding: a few rows in a CUDA graph."""

    def case(m: int, shape: tuple[int, int], tasks: int, extra: bool) -> Case:
        given = problem(dry_run, m, shape, tasks)
        run = partial(time_decode, given, peers=tried(DECODING, dry_run))
        return Case("decode", run, ("base", "ours"), extra)

    if dry_run:
        yield case(4, TINY, 2, False)
        return
    for at, (m, tasks) in enumerate(((1, 1), (8, 8), (64, 64), (16, 8), (32, 8), (64, 8), (64, 1), (8, 1), (4, 4))):
        for shape in (GATE_UP, DOWN):
            yield case(m, shape, tasks, at > 4)
    for m, tasks in ((1, 1), (8, 8)):
        yield case(m, ATTENTION, tasks, True)


def time_decode(problem: Problem, machine: Machine, ceiling: Ceilings, peers: tuple[str, ...]) -> Iterator[dict]:
    reasons = {name: REGISTRY[name].no_graph for name in peers}
    field = gated("decode", problem, [name for name in peers if reasons[name] is None], machine, training=False)
    yield from field.absent
    for name in peers:
        if reasons[name] is not None:
            yield {**field.about, "implementation": name, "unavailable": f"no CUDA graph of it: {reasons[name]}"}
    replays = {name: graph_of(name, built, len(field.sets), machine) for name, built in field.built.items()}
    runs = {name: marked(lambda _, replay=replay: replay()) for name, replay in replays.items()}
    times = measure(machine, runs, ["forward"], calls=len(field.sets))
    for name in runs:
        yield row(field, problem, times, name, "forward", ceiling)


def graph_of(name: str, built: Built, sets: int, machine: Machine) -> Callable[[], object]:
    """A call of every set of inputs, in one CUDA graph where there is a GPU."""

    @torch.no_grad()
    def run() -> list[Tensor]:
        with built.ordered():
            return [built.forward(at) for at in range(sets)]

    want = run()
    if not machine.on_gpu:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            got = run()
        for y in got:
            y.fill_(torch.nan)
        graph.replay()
        machine.synchronize()
    except Exception as reason:
        raise LostDevice(f"the capture of {name} failed: {reason}") from reason
    for y, eager_y in zip(got, want, strict=True):
        error(f"the graph's y of {name}", y, eager_y.double())
    return graph.replay


TUNE_CLOSING = 8.0  # seconds of stage 6 for a step that takes longer than it should, and for its file


def stage_6(
    dry_run: bool, machine: Machine, configs: Path | None, seconds: float, write: Callable[[dict], None]
) -> None:
    """Launch configurations of the most rows, a launch for each job: searched, validated on other problems, and kept where
    they are better. `python -m bench.tune` searches the others.
    """
    from . import tune, tune_launches

    machine = machine if dry_run else replace(machine, rounds=tune.ROUNDS)
    kernels = ["shrink"] if dry_run else [each for each in tune_launches.KERNELS if each not in tune_launches.AT_ONCE]
    minutes = 0.05 if dry_run else max(seconds - TUNE_CLOSING, 1.0) / 60
    better, _ = tune.tune(
        machine, kernels, tune_launches.ROWS[-1:], minutes, lambda decision: write({"case": "tune", **decision})
    )
    if better and configs is not None:
        tune.save(better, configs, machine.device)


def stage_7(dry_run: bool) -> Iterator[Case]:
    """A training step and mixed generation of a whole LLaVA, and its parts."""
    from . import models  # with transformers and what the learner's side needs, which no other stage does

    memory = 0 if dry_run else torch.cuda.get_device_properties(0).total_memory
    size = models.TINY if dry_run else models.llava_7b(memory)
    for part in models.PARTS[:1] if dry_run else models.PARTS:  # `pytest bench/ --tiny` tries all of them
        yield Case(part, partial(time_model, part, size), ("base", "ours"), part not in models.PARTS[:2])


def time_model(part: str, size: object, machine: Machine, _: Ceilings) -> Iterator[dict]:
    from . import models

    with nullcontext() if machine.on_gpu else backend("eager"):  # the interpreter takes minutes for a model
        yield from models.time_part(part, size, machine, seconds=12)


def stage_8(dry_run: bool) -> Iterator[Case]:
    """Nsight Compute on every launch of one `linear`, forward and backward."""
    shapes = [(20, TINY)] if dry_run else [(8192, GATE_UP), (64, GATE_UP), (8192, DOWN)]
    for m, shape in shapes:
        yield Case("ncu", partial(profile, problem(dry_run, m, shape, 2 if dry_run else 8, 0.05)))


STAGES = {
    1: stage_1,
    2: stage_2,
    3: stage_3,
    4: stage_4,
    5: stage_5,
    7: stage_7,
    8: stage_8,
    9: stage_9,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--into", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no case is begun")
    parser.add_argument("--start-at", type=int, default=0, help="the case to begin with, counted from 0")
    parser.add_argument("--configs", type=Path, help="for stage 6: where better launch configurations go")
    parser.add_argument("--problem", type=int, nargs=4, help="for `call`: M K N T")
    options = parser.parse_args()

    def write(result: dict) -> None:
        if options.into is not None:
            with options.into.open("a") as file:
                file.write(json.dumps({k: v for k, v in result.items() if k != "times_us"}) + "\n")

    options.seconds -= age_of_process()  # they count from the start of the process
    torch.manual_seed(0)
    if options.stage == "call":
        call_once(*options.problem)
        return 0
    if options.dry_run:
        patch_once_a_launch()
    machine = Machine.here(options.rounds, options.dry_run)
    if options.stage == "6":
        stage_6(options.dry_run, machine, options.configs, options.seconds, write)
        return 0
    cases = list(STAGES[int(options.stage)](options.dry_run))
    outcome = run_cases(cases, machine, write, options.seconds, options.start_at)
    if outcome.go_on_at is not None:  # what is left of the device may abort while the interpreter ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(outcome.exit_code)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
