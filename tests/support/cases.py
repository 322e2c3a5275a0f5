"""Random inputs for the operations, an independent oracle, and the project's one tolerance (law 6 of the operations)."""

import itertools
import random
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lilora_kernels import functional
from lilora_kernels.ops.delta import reference
from lilora_kernels.ops.philox import keep_mask, keep_scale

SCALING = 0.7
NAMES = ("x", "a", "b0", "u", "v", "fusion", "gate")


@dataclass
class Inputs:
    x: Tensor
    a: Tensor
    b0: Tensor
    u: Tensor | None
    v: Tensor | None
    fusion: Tensor | None
    task: Tensor | None
    gate: Tensor | None
    gate_row: Tensor | None

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(
            **{
                f.name: t.to(dtype) if t is not None and t.is_floating_point() else t
                for f in fields(self)
                for t in [getattr(self, f.name)]
            }
        )

    def leaves(self, names=NAMES) -> "Inputs":
        """Copies; those named (and given) require gradients."""
        return Inputs(
            **{
                f.name: None if t is None else t.detach().clone().requires_grad_(f.name in names)
                for f in fields(self)
                for t in [getattr(self, f.name)]
            }
        )

    def with_(self, **changes) -> "Inputs":
        return replace(self, **changes)

    def differentiable(self) -> list[str]:
        return [name for name in NAMES if getattr(self, name) is not None]


def make(
    rows=17,
    columns=24,
    outputs=20,
    rank=8,
    sub_rank=4,
    tasks=3,
    coefficients="fusion",
    mix="random",
    gate=False,
    dtype=torch.float64,
    seed=0,
) -> Inputs:
    """O(1) outputs, random in every element.

    mix: one (no task ids), same, distinct, runs (of 40 rows), sorted, random; all but one and same have -1 rows.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    if coefficients == "lora":
        tasks = 1
    task = {
        "one": lambda: None,
        "same": lambda: torch.full((rows,), tasks - 1),
        "distinct": lambda: torch.arange(rows) % (tasks + 1) - 1,
        "runs": lambda: torch.arange(rows) // 40 % (tasks + 1) - 1,
        "sorted": lambda: torch.randint(-1, tasks, (rows,), generator=g).sort().values,
        "random": lambda: torch.randint(-1, tasks, (rows,), generator=g),
    }[mix]()
    if mix == "one":
        tasks = 1
    lora = coefficients == "lora"
    inputs = Inputs(
        x=randn(rows, columns),
        a=randn(rank, columns) / columns**0.5,
        b0=randn(outputs, rank) / rank**0.5,
        u=None if lora else randn(tasks, outputs, sub_rank) / sub_rank**0.5,
        v=None if lora else randn(tasks, sub_rank, rank) / rank**0.5,
        fusion=randn(tasks) if coefficients == "fusion" else None,
        task=None if task is None else task.to(torch.int32),
        gate=randn(4, rank) if gate else None,
        gate_row=torch.randint(0, 4, (rows,), generator=g).to(torch.int32) if gate else None,
    )
    return inputs.to(dtype)


def oracle(i: Inputs, scaling: float, keep: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The formula row by row: a matrix of its own for every row, contracted at once."""
    rows, rank = i.x.shape[0], i.a.shape[0]
    dropped = i.x if keep is None else torch.where(keep, i.x * scale, 0)
    g = i.x.new_ones(rows, rank) if i.gate is None else i.gate[i.gate_row]
    on = i.x.new_ones(rows) if i.task is None else (i.task >= 0).to(i.x.dtype)
    task = torch.zeros(rows, dtype=torch.long) if i.task is None else i.task.clamp(min=0).long()
    if i.u is None:
        m = i.b0.expand(rows, -1, -1)
    else:
        f = torch.ones_like(on) if i.fusion is None else i.fusion.sigmoid()[task]
        e = torch.ones_like(on) if i.fusion is None else 1 - f
        m = f[:, None, None] * i.b0 + e[:, None, None] * torch.einsum("mns,msr->mnr", i.u[task], i.v[task])
    return scaling * torch.einsum("m,mk,rk,mr,mnr->mn", on, dropped, i.a, g, m)


FEW = 8  # numbers that may all but cancel in one draw: their full scale is that of all draws together


class Errors:
    """Errors against fp64 in units of full scale, pooled over random inputs, ours beside the eager formula's."""

    def __init__(self) -> None:
        # Ours and eager: errors, each with the scales that its full scale is the RMS of.
        self.pools: dict[str, tuple[list, list]] = {}
        self.few: dict[str, list[Tensor]] = {}

    def add(self, name: str, got: Tensor, eager: Tensor, truth: Tensor) -> None:
        assert got.shape == truth.shape, f"{name}: {got.shape} for {truth.shape}"
        if truth.numel():
            scale = self.few.setdefault(name, []) if truth.numel() < FEW else []
            scale.append(truth.abs().max().clamp_min(1e-30).detach().double())
            for pool, t in zip(self.pools.setdefault(name, ([], [])), (got, eager), strict=True):
                pool.append(((t.double() - truth).abs().detach().flatten(), scale))

    def check(self) -> None:
        """RMS at most 1.1 times and maximum at most 2 times that of eager, floor 1e-6 of full scale.

        n errors leave the ratio of two equal RMS uncertain by about 1 / sqrt(n): three times that is allowed on top.
        """
        for name, pools in self.pools.items():
            ours, eager = (
                torch.cat([each / torch.stack(scale).square().mean().sqrt() for each, scale in pool]) for pool in pools
            )
            slack = 3 / len(ours) ** 0.5
            rms, base = (e.square().mean().sqrt().item() for e in (ours, eager))
            assert rms <= (1.1 + slack) * base + 1e-6, f"{name}: rms {rms:.2e} of full scale, eager has {base:.2e}"
            worst, base = ours.max().item(), eager.max().item()
            assert worst <= (2 + slack) * base + 1e-6, f"{name}: max {worst:.2e} of full scale, eager has {base:.2e}"


def adapter(i):
    return i.x, i.a, i.b0, i.u, i.v, i.fusion


def options(i, **more):
    return {"task": i.task, "gate": i.gate, "gate_row": i.gate_row, "scaling": SCALING, **more}


def base(i, dtype=None, bias=True):
    g = torch.Generator().manual_seed(1)
    n, k = i.b0.shape[0], i.x.shape[1]
    weight = torch.randn(n, k, generator=g, dtype=torch.float64) / k**0.5
    b = torch.randn(n, generator=g, dtype=torch.float64) if bias else None
    dtype = dtype or i.x.dtype
    return weight.to(dtype), None if b is None else b.to(dtype)


def gradients(y, i, names, dy, retain_graph=False):
    names = [n for n in names if getattr(i, n) is not None]
    if not names:
        return {}
    found = torch.autograd.grad(y, [getattr(i, n) for n in names], dy, retain_graph=retain_graph)
    return dict(zip(names, found, strict=True))


def pairwise(axes: dict, seed: int = 0) -> list[dict]:
    """A small set of combinations in which every pair of values of two axes occurs."""
    rng = random.Random(seed)
    names = list(axes)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]}
    rows = []
    while missing:
        best = max(
            ({n: rng.choice(axes[n]) for n in names} for _ in range(60)),
            key=lambda row: sum(pair in missing for pair in itertools.combinations(row.items(), 2)),
        )
        covered = set(itertools.combinations(best.items(), 2)) & missing
        if covered:
            rows.append(best)
            missing -= covered
        else:
            (a, x), (b, y) = min(missing, key=repr)  # the order of a set differs between processes
            row = {n: rng.choice(axes[n]) for n in names} | {a: x, b: y}
            rows.append(row)
            missing -= set(itertools.combinations(row.items(), 2))
    return rows


def case_id(c):
    return "-".join(str(v).removeprefix("torch.") for v in c.values())


def add_errors(errors, i, op, names=NAMES, p=0.0, seed=None):
    """One forward and backward of ours, of the eager formula in the same dtype, and of the oracle in fp64.

    With dropout the mask is that of the Philox stream.
    """
    wide, plain, ours = i.to(torch.float64).leaves(), i.leaves(names), i.leaves(names)
    weight, bias = base(i)
    mask = (keep_mask(seed, *i.x.shape, p), keep_scale(p)) if p else ()
    truth = oracle(wide, SCALING, *mask)
    formula = reference.delta(*adapter(plain), plain.task, plain.gate, plain.gate_row, *mask, scaling=SCALING)
    more = options(ours, p=p, seed=seed)
    if op == "linear":
        truth = truth + F.linear(wide.x, weight.double(), bias.double())
        formula = formula + F.linear(plain.x, weight, bias)
        got = functional.linear(ours.x, weight, bias, *adapter(ours)[1:], **more)
    else:
        got = functional.delta(*adapter(ours), **more)
    errors.add("y", got, formula, truth)
    dy = torch.randn(truth.shape).to(i.x.dtype)
    names = [name for name in i.differentiable() if name in names]
    want, eager_grads = gradients(truth, wide, names, dy.double()), gradients(formula, plain, names, dy)
    for name, grad in gradients(got, ours, names, dy).items():
        assert grad.dtype == getattr(ours, name).dtype
        errors.add(f"d{name}", grad, eager_grads[name], want[name])
