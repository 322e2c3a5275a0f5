"""`expert_linear` on a GPU, where torch._grouped_mm makes the products."""

import pytest
import torch
from support.expert_cases import gradients, make

from lilora_kernels import functional

SIZES = {"k": 256, "n": 384, "r": 16, "s": 8, "dtype": torch.bfloat16}
CASES = {
    "mixed": {"tokens": 300, "experts": 16, "tasks": 3},
    "one task": {"tokens": 300, "experts": 16, "tasks": None},
    "groups without rows": {"tokens": 5, "experts": 64, "tasks": 12},
    "more groups than the product takes": {"tokens": 300, "experts": 128, "tasks": 8},
}


def run(made, device, dtype):
    """y and all gradients, in fp64 on the host."""
    x, *factors = (None if t is None else t.to(device, dtype).requires_grad_() for t in (made.x, *made.factors))
    weight, ends = made.weight.to(device, dtype), made.ends.to(device)
    y = functional.expert_linear(x, weight, ends, *factors, scaling=0.7)
    dy = (torch.arange(y.numel(), device=device) % 3).view(y.shape).to(dtype)
    return [t.detach().double().cpu() for t in (y, *gradients(y, [x, *factors], dy))]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case):
    made = make(**SIZES, **case)
    wanted = run(made, "cpu", torch.float64)
    got, again = (run(made, "cuda", torch.bfloat16) for _ in range(2))
    for name, g, a, w in zip(("y", "x", "a", "b0", "u", "v", "fusion"), got, again, wanted, strict=True):
        assert torch.equal(g, a), name
        assert (g - w).abs().max() <= 0.03 * w.abs().max(), name
    assert all(g.isfinite().all() for g in got)


def test_the_host_does_not_wait():
    made = make(**SIZES, **CASES["mixed"])
    x, weight, ends = (t.cuda() for t in (made.x, made.weight, made.ends))
    factors = [t.cuda().requires_grad_() for t in made.factors]

    def step():
        functional.expert_linear(x, weight, ends, *factors, scaling=0.7).sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
