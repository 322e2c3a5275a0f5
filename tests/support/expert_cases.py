"""Random inputs of `expert_linear`, in the order that it wants."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lilora_kernels import functional, group_rows
from lilora_kernels.ops.experts import reference

NAMES = ("x", "a", "b0", "u", "v", "fusion")
SCALING = 0.7


@dataclass
class Case:
    """Rows in order, with the expert and task of each."""

    x: Tensor
    weight: Tensor
    factors: list[Tensor | None]  # a, b0, u, v, fusion
    expert: Tensor
    task: Tensor | None
    ends: Tensor

    def leaves(self, names=NAMES):
        given = dict(zip(NAMES, (self.x, *self.factors), strict=True))
        made = {n: None if t is None else t.detach().clone().requires_grad_(n in names) for n, t in given.items()}
        return made.pop("x"), list(made.values())

    def run(self, x=None, factors=None, **options):
        x, factors = self.x if x is None else x, self.factors if factors is None else factors
        return functional.expert_linear(x, self.weight, self.ends, *factors, scaling=SCALING, **options)

    def arguments(self, p=0.0):
        return self.x, self.weight, self.ends, *self.factors, torch.tensor([5]), SCALING, p

    def reference(self, x, factors, **options):
        return reference.expert_linear(x, self.weight, *factors, self.expert, self.task, scaling=SCALING, **options)


def make(tokens=9, choices=2, experts=4, tasks=3, k=8, n=12, r=4, s=2, fusion=True, dtype=torch.float64, seed=0):
    """tasks: None for one of all rows. Some expert has no row, some rows have no task."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    expert = torch.randint(0, max(1, experts - 1), (tokens, choices), generator=g)
    task = None if tasks is None else torch.randint(-1, tasks, (tokens,), generator=g, dtype=torch.int32)
    order, ends = group_rows(expert, task, experts, tasks or 1)
    own = () if tasks is None else (tasks,)
    factors = [randn(experts, r, k), randn(experts, n, r), randn(*own, experts, n, s), randn(*own, experts, s, r)]
    factors.append(randn(*own, experts) if fusion else None)
    rows = None if task is None else task.repeat_interleave(choices)[order]
    return Case(randn(tokens, k)[order // choices], randn(experts, n, k), factors, expert.flatten()[order], rows, ends)


def gradients(y, leaves, dy):
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return torch.autograd.grad(y, wanted, dy)
