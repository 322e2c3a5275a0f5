"""A layer on a GPU by each plan of each backend that is here.

test_gpu_fused.py has the fused product.
"""

import pytest
import torch
from support.plan_cases import CHECKS

import lilora_kernels
from lilora_kernels import backends, cuda_library

HERE = ["triton", "eager"] if cuda_library.load_error() is not None else ["cuda", "triton", "eager"]
PLANS = [
    (name, plan, check)
    for name in HERE
    for plan in backends.plans("linear")[name]
    if plan != "fused"
    for check in CHECKS
]


@pytest.fixture(autouse=True)
def kernels():
    """Tests run with the backend that they force."""


@pytest.mark.parametrize("name, plan, check", PLANS)
def test_a_layer(name, plan, check):
    with lilora_kernels.backend(name), lilora_kernels.plan(plan):
        for dtype in (torch.float16,) if name == "cuda" else (torch.float32, torch.float16):
            check("cuda", dtype)
