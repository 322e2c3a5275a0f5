"""A layer by the plans of a CPU."""

import pytest
from plan_cases import CHECKS, mixed_batch, one_task, training_step_of_one_task

import lilora_kernels

PLANS = [("composed", check) for check in CHECKS]
PLANS += [("recorded", check) for check in (one_task, training_step_of_one_task)]


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
