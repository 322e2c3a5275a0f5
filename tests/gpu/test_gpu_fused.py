"""Base and adapter in one product: collected on a GPU of compute capability 9.0 with a build for 9.0a."""

import pytest
import torch
from support.cases import adapter, options
from support.gpu_cases import base_on_gpu, check_shape, make_on_gpu

from lilora_kernels import backends, functional


@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
@pytest.mark.parametrize("mix", ["one", "sorted", "random"])
@pytest.mark.parametrize("rows", [200, 1000, 3001])
def test_outputs_and_gradients(rows, mix, kernels):
    with backends.plan("fused"):  # raises where the fused product cannot run
        check_shape("linear", rows, 256, 384, 128, 64, 8, mix=mix, dtype=torch.bfloat16)


@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
def test_fp32_masters_are_rounded_before_the_product(kernels):
    i = make_on_gpu(300, 256, 384, 128, 64, 8, dtype=torch.float32)
    i.x = i.x.bfloat16()
    weight, bias = base_on_gpu(i)
    with backends.plan("fused"):
        masters, rounded = (
            functional.linear(i.x, weight.bfloat16(), bias.bfloat16(), *adapter(j)[1:], **options(j))
            for j in (i, i.to(torch.bfloat16))
        )
    assert torch.equal(masters, rounded)
