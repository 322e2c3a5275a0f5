"""`delta` on a GPU, one launch each way: outputs and gradients."""

import pytest
import torch
from cases import NAMES, Errors, adapter, case_id, pairwise
from gpu_cases import IDS, ROWS, add_errors, make_on_gpu, seed_tensor

from lilora_kernels import functional
from lilora_kernels.ops.delta import reference

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
        for seed, mix in enumerate(IDS if task_ids else ("one",) * 8):
            shape = {"rows": count, "columns": size[0], "outputs": size[1], "rank": rank, "sub_rank": sub_rank}
            tasks = 8 if mix == "sorted" else 3
            shape |= {"tasks": tasks, "coefficients": coefficients, "mix": mix, "gate": gate, "dtype": dtype}
            i = make_on_gpu(**shape, seed=seed)
            add_errors(errors, op, [i], p, seed_tensor(count * 2**33 + seed), label=f", {count} rows")
    errors.check()


def check_shape(op, *sizes, names=NAMES, seeds=4, **shape):
    errors = Errors()
    for seed in range(seeds):
        add_errors(errors, op, [make_on_gpu(*sizes, **shape, seed=seed)], 0.05, seed_tensor(-seed), names)
    errors.check()


@pytest.mark.parametrize("mix", ["sorted", "random"])
def test_a_layer_of_a_large_model(mix):
    check_shape("delta", 8192, 4096, 4096, 128, 64, 8, mix=mix, dtype=torch.bfloat16, seeds=2)


@pytest.mark.parametrize("case", pairwise(AXES), ids=kind_id)
def test_outputs_and_gradients_are_as_good_as_the_formula(case):
    check_variant("delta", **case)


@pytest.mark.parametrize("names", [("x",), ("u",), ("x", "u", "v", "fusion"), ("a", "b0")], ids="+".join)
def test_gradients_of_some(names):
    check_shape("delta", 300, 128, 96, 16, 8, 8, dtype=torch.bfloat16, names=names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_largest_ranks(dtype):
    check_shape("delta", 100, 256, 256, 256, 128, 8, dtype=dtype)


def test_fp32_masters_under_bf16_activations():
    errors = Errors()
    for seed in range(4):
        i = make_on_gpu(300, 256, 192, 64, 32, 8, dtype=torch.float32, seed=seed)
        i.x = i.x.bfloat16()
        dy = torch.randn(300, 192, device="cuda").bfloat16()
        results = []
        for function, given in (
            (functional.delta, i),
            (reference.delta, i.to(torch.bfloat16)),
            (reference.delta, i.to(torch.float64)),
        ):
            copy = given.leaves()
            y = function(*adapter(copy), task=copy.task)
            results.append([y.detach(), *torch.autograd.grad(y, adapter(copy), dy.to(y.dtype))])
        assert [t.dtype for t in results[0]] == [torch.bfloat16] * 2 + [torch.float32] * 5
        for name, *tensors in zip(("y", *NAMES[:6]), *results, strict=True):
            errors.add(name, *tensors)
    errors.check()
