"""A layer by the plans of a CPU."""

import pytest
from support.plan_cases import checks, mixed_batch

import lilora_kernels

PLANS = [(plan, check) for plan in ("composed", "recorded") for check in checks(plan)]


@pytest.mark.parametrize("plan, check", PLANS)
def test_a_layer(plan, check):
    with lilora_kernels.plan(plan):
        check("cpu")


def test_a_mixed_batch_is_not_recorded():
    with (
        lilora_kernels.plan("recorded"),
        pytest.raises(
            lilora_kernels.backends.Unsupported, match="'recorded' cannot run here: it takes the factors of one"
        ),
    ):
        mixed_batch("cpu")
