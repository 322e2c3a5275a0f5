"""A layer by the plans of a CPU."""

import pytest
from support.plan_cases import CHECKS

import lilora_kernels
from lilora_kernels import cpu_library

NATIVE = pytest.mark.skipif(isinstance(cpu_library.load(), str), reason=f"{cpu_library.load()}")


@pytest.mark.parametrize("plan", ["composed", pytest.param("one_launch", marks=NATIVE)])
@pytest.mark.parametrize("check", CHECKS)
def test_a_layer(plan, check):
    with lilora_kernels.plan(plan):
        check("cpu")
