"""A layer by the plan of a CPU."""

import pytest
from plan_cases import CHECKS

import lilora_kernels


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("plan", ["composed"])
def test_a_layer(plan, check):
    with lilora_kernels.plan(plan):
        check("cpu")
