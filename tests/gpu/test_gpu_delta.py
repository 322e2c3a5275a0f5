"""`delta` on a GPU, one launch each way: outputs, gradients and dropout masks."""

import pytest
import torch
from cases import NAMES, Errors, case_id, pairwise
from gpu_cases import IDS, ROWS, add_errors, make_on_gpu, seed_tensor

from lilora_kernels import functional
from lilora_kernels.ops.delta import reference
from lilora_kernels.ops.philox import keep_mask

# What makes a kernel of its own; numbers of rows and tasks, and how the tasks lie, do not, and vary inside a test.
AXES = {
    "kind": [
        (torch.bfloat16, 128, 64),
        (torch.float16, 100, 17),
        (torch.bfloat16, 16, 8),
        (torch.float32, 16, 8),
        (torch.float16, 4, 1),
    ],
    "size": [(256, 384), (136, 72), (33, 47)],
    "rows": list(ROWS),
    "coefficients": ["fusion", "plain", "lora"],
    "task_ids": [True, False],
    "gate": [False, True],
    "p": [0.05, 0.0],
}


def kind_id(case):
    dtype, *ranks = case["kind"]
    return case_id({**case, "kind": dtype, "ranks": ranks})


def check_variant(op, kind, size, rows, coefficients, task_ids, gate, p):
    dtype, rank, sub_rank = kind
    errors = Errors()
    for count in ROWS[rows]:
        for mix in IDS if task_ids else ("one",):
            tasks = 8 if mix == "sorted" else 3
            shape = {"rows": count, "columns": size[0], "outputs": size[1], "rank": rank, "sub_rank": sub_rank}
            i = make_on_gpu(**shape, tasks=tasks, coefficients=coefficients, mix=mix, gate=gate, dtype=dtype)
            add_errors(errors, op, [i], p, seed_tensor(count * 2**33 + 7), label=f", {count} rows")
    errors.check()


@pytest.mark.parametrize("mix", ["sorted", "random"])
def test_a_layer_of_a_large_model(mix):
    errors = Errors()
    i = make_on_gpu(8192, 4096, 4096, 128, 64, 8, mix=mix, dtype=torch.bfloat16)
    add_errors(errors, "delta", [i], 0.05, seed_tensor(-3))
    errors.check()


@pytest.mark.parametrize("case", pairwise(AXES), ids=kind_id)
def test_outputs_and_gradients_are_as_good_as_the_formula(case):
    check_variant("delta", **case)


@pytest.mark.parametrize("names", [("x",), ("u",), ("x", "u", "v", "fusion"), ("a", "b0")], ids="+".join)
def test_gradients_of_some(names):
    errors = Errors()
    i = make_on_gpu(300, 128, 96, 16, 8, 3, dtype=torch.bfloat16)
    add_errors(errors, "delta", [i], 0.05, seed_tensor(5), names)
    errors.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_largest_ranks(dtype):
    errors = Errors()
    add_errors(errors, "delta", [make_on_gpu(100, 256, 256, 256, 128, 3, dtype=dtype)], 0.05, seed_tensor(5))
    errors.check()


def test_fp32_masters_under_bf16_activations():
    errors = Errors()
    i = make_on_gpu(300, 256, 192, 64, 32, 3, dtype=torch.float32)
    i.x = i.x.bfloat16()
    wide, low = i.to(torch.float64), i.to(torch.bfloat16)
    dy = torch.randn(300, 192, device="cuda").bfloat16()
    results = []
    for given in (i, low, wide):
        copy = given.leaves()
        if given is i:
            y = functional.delta(copy.x, copy.a, copy.b0, copy.u, copy.v, copy.fusion, task=copy.task)
        else:
            y = reference.delta(copy.x, copy.a, copy.b0, copy.u, copy.v, copy.fusion, copy.task)
        parameters = [getattr(copy, name) for name in NAMES[:6]]
        results.append([y.detach(), *torch.autograd.grad(y, parameters, dy.to(y.dtype))])
    assert [t.dtype for t in results[0]] == [torch.bfloat16] * 2 + [torch.float32] * 5
    for name, *tensors in zip(("y", *NAMES[:6]), *results, strict=True):
        errors.add(name, *tensors)
    errors.check()


@pytest.mark.parametrize("rows", [70, 300, 3000])
@pytest.mark.parametrize("op", ["delta", "linear"])
def test_forward_and_backward_draw_the_mask_of_the_reference(op, rows, plan):
    """Bit for bit: with ones or identities as factors, what is not zero is the mask."""
    plan(one_launch=op == "delta")
    rank, columns = 64, 200
    ones = lambda *shape: torch.ones(*shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    eye = lambda *shape: torch.eye(*shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731

    def run(x, a, p, seed):
        if op == "delta":
            return functional.delta(x, a, eye(rank), p=p, seed=seed)
        return functional.linear(x, torch.zeros_like(a), None, a, eye(rank), p=p, seed=seed)

    for p in (0.05, 0.5, 0.999):
        for value in (0, -1, 2**40 + 7, -(2**63)):
            seed = seed_tensor(value)
            y = run(ones(rows, rank), eye(rank), p, seed)
            assert torch.equal(y != 0, keep_mask(seed, rows, rank, p))
            x, a = ones(rows, columns).requires_grad_(), ones(rank, columns).requires_grad_()
            keep = keep_mask(seed, rows, columns, p)
            (dx,) = torch.autograd.grad(run(x, a, p, seed), x, ones(rows, rank))
            assert torch.equal(dx != 0, keep)
            (da,) = torch.autograd.grad(run(x, a, p, seed), a, eye(rows, rank))
            assert torch.equal(da != 0, keep[:rank])
