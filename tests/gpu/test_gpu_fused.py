"""Base and adapter in one product: collected on a GPU of compute capability 9.0 with a build for 9.0a."""

import pytest
import torch
from test_gpu_delta import check_shape

from lilora_kernels import backends


@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
@pytest.mark.parametrize("mix", ["one", "sorted", "random"])
@pytest.mark.parametrize("rows", [200, 1000, 3001])
def test_outputs_and_gradients(rows, mix, kernels):
    with backends.plan("fused"):  # raises where the fused product cannot run
        check_shape("linear", rows, 256, 384, 128, 64, 8, mix=mix, dtype=torch.bfloat16)
