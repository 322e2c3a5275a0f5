"""Launches that a bound call makes again, beside those of a call that works everything out: equal in every bit."""

import ctypes
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.cases import SCALING, base, case_id, make, pairwise
from support.kernel_cases import SUBSETS

import lilora_kernels
from lilora_kernels import LiLoRALinear, backends, functional
from lilora_kernels.ops.delta import triton_bound, triton_jobs
from lilora_kernels.ops.triton_launcher import Ready

ROWS = 9


@pytest.fixture
def made(monkeypatch):
    """made(): how many launches were made by what an earlier call left, beginning anew with each question.

    The interpreter wants tensors: it gets some at the addresses that a launcher would be given.
    """
    found, launch = [], triton_jobs.launch

    def at(address, like):
        if not address:
            return None
        element = (ctypes.c_char * like.itemsize).from_address(address)
        return torch.frombuffer(element, dtype=like.dtype)

    def noted(made, grid, tensors, numbers, groups=()):
        launch(made, grid, tensors, numbers, groups)
        flat = [*(t for group in groups for t in group), *tensors]

        def again(*args):
            found.append(made.kernel)
            given = iter(args[9:])
            like = iter(flat)
            again = [type(group)(*map(at, next(given), like)) for group in groups]
            again += [at(next(given), next(like)) for _ in tensors]
            made.kernel[grid](*again, *given, **made, **made.options)

        return Ready(made.kernel, (again, None, None), grid, tuple(map(len, groups)), numbers), flat

    monkeypatch.setattr(triton_jobs, "launch", noted)
    monkeypatch.setattr(triton_bound, "runtime", SimpleNamespace(INTERPRETED=False))
    monkeypatch.setattr(triton_bound, "observed", lambda kernel: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    triton_bound.launches_of.cache_clear()

    def since():
        count = len(found)
        found.clear()
        return count

    with lilora_kernels.backend("triton"):
        yield since
    triton_bound.launches_of.cache_clear()


def unbound(monkeypatch):
    for op in ("linear", "delta"):
        usual = replace(backends._table[op]["triton"], bind=lambda *_: None, bind_gradients=lambda *_: None)
        monkeypatch.setitem(backends._table[op], "triton", usual)


def results(i, op, names, p, dy, seed=5):
    """y, and the gradients of these."""
    leaves = i.leaves(names)
    given = [leaves.x, *(base(leaves) if op == "linear" else ())]
    y = getattr(functional, op)(
        *given, leaves.a, leaves.b0, leaves.u, leaves.v, leaves.fusion, task=leaves.task, scaling=SCALING, p=p,
        seed=torch.tensor([seed]) if p else None,
    )  # fmt: skip
    wanted = [getattr(leaves, name) for name in names if getattr(leaves, name) is not None]
    return [y, *torch.autograd.grad(y, wanted, dy)]


CASES = {
    "op": ["linear", "delta"],
    "plan": ["one_launch", "by_phase"],
    "coefficients": ["fusion", "plain", "lora"],
    "mix": ["one", "random"],
    "p": [0.0, 0.3],
    "wanted": ["all", "x", "task", "u", "shared", "b0"],
    "dtype": [torch.float32, torch.float16],
}


@pytest.mark.parametrize("case", pairwise(CASES), ids=case_id)
def test_they_compute_the_same_in_every_bit(case, made, monkeypatch):
    shape = {"coefficients": case["coefficients"], "mix": case["mix"], "dtype": case["dtype"]}
    first, i = (make(ROWS, 20, 18, **shape, seed=seed) for seed in range(2))
    names = [name for name in SUBSETS[case["wanted"]] if getattr(i, name) is not None] or ["b0"]
    run = partial(results, op=case["op"], names=names, p=case["p"])
    dy = torch.randn(ROWS, 18).to(case["dtype"])
    with lilora_kernels.plan(case["plan"]):
        run(first, dy=torch.randn_like(dy), seed=1)
        assert not made()
        got = run(i, dy=dy)
        assert made() >= 2
        unbound(monkeypatch)
        wanted = run(i, dy=dy)
        assert not made()
    assert all(map(torch.equal, got, wanted))


def layer():
    made = LiLoRALinear(torch.nn.Linear(24, 20), r=8, sub_rank=4, dropout=0.0)
    made.add_task("one")
    torch.nn.init.normal_(made.lilora_U["one"])
    return made


def step(made, x, dy):
    x = x.detach().requires_grad_()
    y = made(x).mul_(1)  # nor is it a view, which nobody could write to
    return [y, *torch.autograd.grad(y, [x, *(p for p in made.parameters() if p.requires_grad)], dy)]


CHANGES = {
    "nothing": (lambda given: given, 2),
    "strided rows": (lambda given: given.repeat(1, 1, 2)[..., ::2], 0),
    "rows at another place": (lambda given: given.repeat(2, 1, 1)[1:2], 2),
    "rows that are not aligned": (lambda given: torch.cat((given.new_zeros(1), given.flatten()))[1:].view_as(given), 0),
    "negated rows": (torch._neg_view, 0),
    "fewer rows": (lambda given: given[:, :3].contiguous(), 0),
    "a dimension less": (lambda given: given[0], 2),
}  # fmt: skip


@pytest.mark.parametrize("change, launches", CHANGES.values(), ids=CHANGES)
def test_a_layer_sees_what_changes(change, launches, made):
    one, x, dy = layer(), torch.randn(1, 7, 24), torch.randn(1, 7, 20)
    for _ in range(3):
        step(one, x, dy)
    assert made() > 0
    got = step(one, change(x), change(dy).resolve_neg())
    assert made() == launches
    with lilora_kernels.backend("eager"):
        wanted = step(one, change(x), change(dy).resolve_neg())
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_saved_tensors_that_hooks_bring_anew(made):
    one, x, dy = layer(), torch.randn(1, 7, 24), torch.randn(1, 7, 20)
    for _ in range(3):
        step(one, x, dy)
    made()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, torch.clone):
        got = step(one, x, dy)
    assert made() == 2
    with lilora_kernels.backend("eager"):
        for ours, theirs in zip(got, step(one, x, dy), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_tensor_as_two_factors(made):
    """Which of them a launch reads cannot be told from that call."""
    x, dy, both, other = (torch.randn(16, 16) for _ in range(4))
    for a, b0 in ((both, both), (both, both), (both, other), (both, other)):
        y = [functional.delta(x.requires_grad_(), a, b0)]
        y += torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(y, [x @ a.T @ b0.T, dy @ b0 @ a], rtol=1e-4, atol=1e-4)
    assert made() == 2


def test_forwards_without_gradients(made):
    one, x = layer().eval(), torch.randn(2, 3, 24)
    with torch.no_grad():
        for _ in range(4):
            y = one(x)
        assert made() > 0
        with lilora_kernels.backend("eager"):
            torch.testing.assert_close(y, one(x), rtol=1e-4, atol=1e-4)
