"""What is measured: shapes, and random tensors of these shapes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from lilora_kernels.ops.schema import AdapterArgs

from .timing import Machine, nbytes

SCALING = 2.0
GRADIENTS = ("x", "a", "b0", "u", "v", "fusion")
GATE_UP, DOWN, ATTENTION = (4096, 11008), (11008, 4096), (4096, 4096)  # K, N of LLaVA-1.5-7B
TINY = (32, 48)


@dataclass(frozen=True)
class Problem:
    """One adapted linear: M rows in T contiguous samples of equal length, K to N through R and S."""

    rows: int
    columns: int
    outputs: int
    tasks: int = 1
    p: float = 0.0
    rank: int = 128
    sub_rank: int = 64
    dtype: torch.dtype = torch.bfloat16

    def describe(self) -> dict:
        names = {"M": self.rows, "K": self.columns, "N": self.outputs, "R": self.rank, "S": self.sub_rank}
        return {**names, "T": self.tasks, "p": self.p, "dtype": self.dtype_name}

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def least(self, direction: str, adapted: bool) -> tuple[int, int]:
        """Bytes and operations that have to be, each tensor read or written once: of the base, or of base and adapter."""
        x, y, weight = self.rows * self.columns, self.rows * self.outputs, self.columns * self.outputs
        flops = 2 * self.rows * self.columns * self.outputs
        elements = {"forward": x + weight + y, "backward": y + weight + x}
        work = {"forward": flops, "backward": flops}
        if adapted:
            r, s = self.rank, self.sub_rank
            h = self.rows * r
            parameters = r * (self.columns + self.outputs) + self.tasks * (s * (r + self.outputs) + 1)
            adapter = 2 * self.rows * r * (self.columns + self.outputs)  # of h = x A^T and y = h M_t^T
            elements["forward"] += parameters + h
            elements["backward"] += x + 2 * parameters + h
            work["forward"] += adapter
            work["backward"] += 2 * adapter
        elements["both"] = elements["forward"] + elements["backward"]
        work["both"] = work["forward"] + work["backward"]
        return elements[direction] * self.dtype.itemsize, work[direction]


class Operands:
    """Random tensors of one call, the parameters requiring gradients."""

    def __init__(self, problem: Problem, device: torch.device, seed: int) -> None:
        g = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            t = torch.randn(*shape, generator=g, dtype=problem.dtype, device=device)
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
            at = torch.arange(m, device=device) * problem.tasks // m
            self.task = at.to(torch.int32)
        self.seed = torch.tensor([seed + 1], device=device) if problem.p else None
        with torch.no_grad():
            self.h = (self.x @ self.a.T).contiguous()

    @cached_property
    @torch.no_grad()
    def product(self) -> Tensor:
        """Of the base in fp64."""
        return self.x.double() @ self.weight.double().T

    def nbytes(self) -> int:
        return nbytes(vars(self).values())

    def factors(self) -> tuple[Tensor, ...]:
        return self.a, self.b0, self.u, self.v, self.fusion

    def adapter(self) -> AdapterArgs:
        factors = (t.detach() for t in self.factors())
        return AdapterArgs(*factors, self.task, None, None, self.seed, SCALING, self.problem.p, None)

    def gradients(self) -> list[Tensor]:
        return [getattr(self, name) for name in GRADIENTS]


def operand_sets(problem: Problem, machine: Machine) -> list[Operands]:
    """As many as have to take turns for each to be cold."""
    first = Operands(problem, machine.device, 0)
    return [first, *(Operands(problem, machine.device, i) for i in range(1, machine.copies(first.nbytes())))]


def samples(problem: Problem) -> Iterator[tuple[int, slice]]:
    """Every task with its rows."""
    m, t = problem.rows, problem.tasks
    starts = [-(-m * i // t) for i in range(t + 1)]
    for task, (start, stop) in enumerate(pairwise(starts)):
        yield task, slice(start, stop)
