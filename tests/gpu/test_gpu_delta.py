"""`delta` on a GPU, one launch each way: outputs and gradients."""

import pytest
import torch
from support.cases import NAMES, Errors, adapter, pairwise
from support.gpu_cases import AXES, check_shape, check_variant, kind_id, make_on_gpu

from lilora_kernels import functional
from lilora_kernels.ops.delta import reference


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
