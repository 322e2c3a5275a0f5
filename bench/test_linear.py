"""One adapted linear against every peer: inference and training, over rows, tasks, dropout and dtype."""

from dataclasses import dataclass

import pytest
import torch

from .bases import BASES
from .compare import compare
from .peers import OURS_ON_GPU
from .problems import ATTENTION, DOWN, GATE_UP, TINY, Problem

ON_GPU = torch.cuda.is_available()
# Of one task, and of several.
INFERENCE = ("base", "ours", "formula", "merged", "peft", "peft_names")
MIXED_INFERENCE = (*INFERENCE, "grouped_mm")
TRAINING = ("base", "ours", "formula", "peft")
MIXED_TRAINING = (*TRAINING, "grouped_mm")
# Where there is a GPU.
SERVING = ("vllm", "sglang")
LORA_TRAINING = ("lorafusion", "nemo_automodel")
COMPILED = ("formula_compiled", "peft_compiled")
# For the rows of our CPU kernels.
DECODE = ("base_streamed", "ours_cpu_composed")
OTHER_BASES = tuple(name for name in BASES if name not in DECODE)


@dataclass(frozen=True)
class Comparison:
    name: str
    problem: Problem
    training: bool
    peers: tuple[str, ...]

    def __str__(self) -> str:
        p = self.problem
        kind = "training" if self.training else "inference"
        return f"{kind}-{self.name}-M{p.rows}-K{p.columns}-T{p.tasks}-p{p.p}-{p.dtype_name}"


def on_gpu() -> list[Comparison]:
    found = []
    shapes = {"gate_up": GATE_UP, "down": DOWN, "attention": ATTENTION}
    for name, shape in shapes.items():
        for m in (1, 8, 64, 512, 4096):
            for tasks in (1, 2, 8, 64):
                peers = (*(INFERENCE if tasks == 1 else MIXED_INFERENCE), *OURS_ON_GPU[1:], *SERVING)
                if tasks <= m:
                    found.append(Comparison(name, Problem(m, *shape, tasks), False, peers))
        for m in (512, 2048, 8192, 16384):
            for tasks in (1, 2, 8, 64):
                peers = (*TRAINING, *LORA_TRAINING) if tasks == 1 else MIXED_TRAINING
                for p in (0.0, 0.05):
                    given = Problem(m, *shape, tasks, p)
                    found.append(Comparison(name, given, True, (*peers, "peft_default", *OURS_ON_GPU[1:])))
    found.append(Comparison("gate_up", Problem(8192, *GATE_UP, 1, 0.05), True, (*TRAINING, *COMPILED)))
    return found


def decode_on_cpu() -> list[Comparison]:
    """LLaVA's edges, and half of them, with its ranks; one task, and up to eight mixed."""
    half, fp32, bf16, found = (2048, 5504), torch.float32, torch.bfloat16, []
    for name, shape, dtype, rows, against_all in (
        ("gate_up", half, fp32, (1, 2, 4, 8, 16, 32), (1, 8, 32)),
        ("down", half[::-1], fp32, (1, 4, 8, 32), (8,)),
        ("gate_up", GATE_UP, fp32, (1, 4, 8, 32), (8,)),
        ("down", DOWN, fp32, (1, 4, 8, 32), (8,)),
        ("gate_up", half, bf16, (1, 4, 8, 16, 32), (8,)),
    ):
        for m in rows:
            mixed = min(m, 8)
            for tasks in sorted({mixed if dtype == bf16 else 1, mixed}):
                peers = ("base", "ours", *DECODE)
                if m in against_all:
                    peers += ("formula", "peft") if tasks == 1 else ("formula", "peft_names", "grouped_mm")
                    peers += OTHER_BASES if tasks == mixed else ()
                if m == tasks == 8 and (shape, dtype) == (half, fp32):
                    peers += ("peft", "formula_compiled")
                found.append(Comparison(name, Problem(m, *shape, tasks, dtype=dtype), False, peers))
    return found


def on_cpu() -> list[Comparison]:
    """Half of LLaVA's edges with its ranks in fp32; less in bf16, which most CPUs only emulate."""
    gate_up = (2048, 5504)
    fp32, quarter, eighth = (
        {"rank": r, "sub_rank": r // 2, "dtype": dtype}
        for r, dtype in ((128, torch.float32), (64, torch.bfloat16), (32, torch.bfloat16))
    )
    mixed = ("base", "ours", "formula", "peft_names", "grouped_mm")
    found = decode_on_cpu()
    found.append(Comparison("attention", Problem(8, 2048, 2048, 8, **fp32), False, mixed))
    for m in (128, 512):
        found.append(Comparison("gate_up", Problem(m, *gate_up, 8, **fp32), False, mixed))
    found.append(Comparison("gate_up", Problem(8, 1024, 2752, 8, **quarter), False, (*mixed, "merged")))
    found.append(Comparison("gate_up", Problem(512, 1024, 2752, 8, **quarter), False, mixed))
    for m, tasks, p in ((512, 1, 0.0), (512, 1, 0.05), (512, 8, 0.05), (128, 1, 0.05), (32, 1, 0.05)):
        peers = TRAINING if tasks == 1 else MIXED_TRAINING
        found.append(Comparison("gate_up", Problem(m, *gate_up, tasks, p, **fp32), True, peers))
    for p in (0.0, 0.05):
        found.append(Comparison("gate_up", Problem(64, 512, 1376, 1, p, **eighth), True, (*TRAINING, "peft_default")))
    small = quarter | {"dtype": torch.float32}
    found.append(Comparison("gate_up", Problem(512, 1024, 2752, 1, 0.05, **small), True, (*TRAINING, *COMPILED)))
    return found


def tiny() -> list[Comparison]:
    ranks = {"rank": 16, "sub_rank": 8, "dtype": torch.float32}
    return [
        Comparison(
            "tiny",
            Problem(6, *TINY, 3, **ranks),
            False,
            (*MIXED_INFERENCE, "ours_operation", "ours_cpu_composed", *BASES, *SERVING),
        ),
        Comparison("tiny", Problem(20, *TINY, 2, 0.05, **ranks), True, (*MIXED_TRAINING, "ours_operation")),
        Comparison("tiny", Problem(20, *TINY, **ranks), True, (*TRAINING, *LORA_TRAINING)),
        Comparison("tiny", Problem(40, *TINY, dtype=torch.bfloat16), True, ("base", "ours", "peft", "peft_default")),
    ]


def pytest_generate_tests(metafunc):
    cases = tiny() if metafunc.config.getoption("tiny") else on_gpu() if ON_GPU else on_cpu()
    parameters = [
        pytest.param(case, peer, direction, id=f"{case}-{direction}-{peer}")
        for case in cases
        for direction in (("forward", "backward", "both") if case.training else ("forward",))
        for peer in case.peers
    ]
    metafunc.parametrize("case, peer, direction", parameters)


def test_linear(case, peer, direction, machine, ceiling, seconds, measured, report, benchmark):
    benchmark.group = f"{case}, {direction}"

    def run():
        about = case.problem, case.peers, machine, ceiling(case.problem.dtype)
        return compare(f"linear, {case.name}", *about, case.training, seconds)

    report(measured(case, run), peer, direction)
