"""One adapted linear against every peer: inference and training, over rows, tasks, dropout and dtype."""

from dataclasses import dataclass

import pytest
import torch

from .compare import compare
from .peers import OURS
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


@dataclass(frozen=True)
class Comparison:
    name: str
    problem: Problem
    training: bool
    peers: tuple[str, ...]

    def __str__(self) -> str:
        p = self.problem
        kind = "training" if self.training else "inference"
        return f"{kind}-{self.name}-M{p.rows}-T{p.tasks}-p{p.p}-{p.dtype_name}"


def on_gpu() -> list[Comparison]:
    found = []
    shapes = {"gate_up": GATE_UP, "down": DOWN, "attention": ATTENTION}
    for name, shape in shapes.items():
        for m in (1, 8, 64, 512, 4096):
            for tasks in (1, 2, 8, 64):
                peers = (*(INFERENCE if tasks == 1 else MIXED_INFERENCE), *OURS[1:], *SERVING)
                if tasks <= m:
                    found.append(Comparison(name, Problem(m, *shape, tasks), False, peers))
        for m in (512, 2048, 8192, 16384):
            for tasks in (1, 2, 8, 64):
                peers = (*TRAINING, *LORA_TRAINING) if tasks == 1 else MIXED_TRAINING
                for p in (0.0, 0.05):
                    given = Problem(m, *shape, tasks, p)
                    found.append(Comparison(name, given, True, (*peers, "peft_default", *OURS[1:])))
    found.append(Comparison("gate_up", Problem(8192, *GATE_UP, 1, 0.05), True, (*TRAINING, *COMPILED)))
    return found


def on_cpu() -> list[Comparison]:
    """Half of LLaVA's edges with its ranks in fp32; less in bf16, which most CPUs only emulate."""
    half = {"gate_up": (2048, 5504), "down": (5504, 2048), "attention": (2048, 2048)}
    fp32, quarter, eighth = (
        {"rank": r, "sub_rank": r // 2, "dtype": dtype}
        for r, dtype in ((128, torch.float32), (64, torch.bfloat16), (32, torch.bfloat16))
    )
    alone = ("base", "ours", "formula", "peft_names")
    mixed = (*alone, "grouped_mm")
    found = [Comparison("gate_up", Problem(8, *half["gate_up"], 8, **fp32), False, MIXED_INFERENCE)]
    for name in ("down", "attention"):
        found.append(Comparison(name, Problem(8, *half[name], 8, **fp32), False, mixed))
    for m in (1, 32, 128, 512):
        peers = alone if m == 1 else mixed
        found.append(Comparison("gate_up", Problem(m, *half["gate_up"], min(m, 8), **fp32), False, peers))
    for m in (8, 512):
        found.append(Comparison("gate_up", Problem(m, 1024, 2752, 8, **quarter), False, mixed))
    for m, tasks, p in ((512, 1, 0.0), (512, 1, 0.05), (512, 8, 0.05), (128, 1, 0.05), (32, 1, 0.05)):
        peers = TRAINING if tasks == 1 else MIXED_TRAINING
        found.append(Comparison("gate_up", Problem(m, *half["gate_up"], tasks, p, **fp32), True, peers))
    for p in (0.0, 0.05):
        found.append(Comparison("gate_up", Problem(64, 512, 1376, 1, p, **eighth), True, (*TRAINING, "peft_default")))
    small = quarter | {"dtype": torch.float32}
    found.append(Comparison("gate_up", Problem(512, 1024, 2752, 1, 0.05, **small), True, (*TRAINING, *COMPILED)))
    found.append(Comparison("gate_up", Problem(8, 1024, 2752, 8, **small), False, (*mixed, *COMPILED)))
    return found


def tiny() -> list[Comparison]:
    ranks = {"rank": 16, "sub_rank": 8, "dtype": torch.float32}
    return [
        Comparison("tiny", Problem(6, *TINY, 3, **ranks), False, (*MIXED_INFERENCE, "ours_operation", *SERVING)),
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
