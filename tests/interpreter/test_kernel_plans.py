"""A layer by each plan of the Triton kernels, in the interpreter."""

import pytest
from support.plan_cases import CHECKS

import lilora_kernels


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("plan", ["one_launch", "by_phase", "composed"])
def test_a_layer(plan, check):
    with lilora_kernels.plan(plan):
        check("cpu")
