"""The model of an H200: what it counts, and that the ceilings alone give the paper's ratios."""

from functools import partial

import pytest
import torch

from bench import model
from bench.problems import ATTENTION, DOWN, GATE_UP, Problem


def test_the_counter_counts_what_computes_its_bytes_and_its_operations():
    x, w = torch.empty(8, 4, device="meta"), torch.empty(6, 4, device="meta", dtype=torch.float32)
    with model.Counter() as seen:
        y = torch.mm(x, w.T)
        y.addmm_(x, w.T)
        torch.mm(x, w.T, out=y)
        torch.empty_like(y).zero_()
        torch.empty(8, 1, device="meta").expand(8, 6) + 1
    assert [launch.name for launch in seen.launches] == ["mm", "addmm_", "mm", "zero_", "add"]
    operands, result = 32 + 24, 48
    assert [launch.memory for launch in seen.launches] == [
        4 * elements for elements in (operands + result, operands + 2 * result, operands + result, result, 8 + result)
    ]
    assert [launch.wide_flops for launch in seen.launches] == [2 * 8 * 4 * 6] * 3 + [0, 0]
    assert seen.launches[1].accumulated == 4 * result
    with model.Counter() as seen, seen.one_launch("both"):
        x.bfloat16() @ w.bfloat16().T
        y.copy_(y)
    assert len(seen.launches) == 1
    assert seen.launches[0].flops == 2 * 8 * 4 * 6
    assert seen.launches[0].memory == 4 * (operands + result) + 2 * (operands + result)


PEFT = model.peft
HIDDEN = model.expand_first, False
EXPOSED = partial(model.expand_first, apart=True), True


@pytest.mark.parametrize(
    "implementation, exposed, shape, p, forward, backward, both",
    [
        (model.floor, False, GATE_UP, 0, 1.043, 1.086, 1.064),
        (model.floor, False, DOWN, 0, 1.043, 1.086, 1.064),
        (model.floor, False, ATTENTION, 0, 1.0625, 1.125, 1.094),
        (PEFT, False, GATE_UP, 0, 1.288, 1.268, 1.278),
        (PEFT, False, DOWN, 0, 1.147, 1.296, 1.221),
        (PEFT, False, ATTENTION, 0, 1.318, 1.413, 1.366),
        (PEFT, False, GATE_UP, 0.05, 1.330, None, None),
        (PEFT, False, DOWN, 0.05, 1.259, None, None),
        (model.addmm_after, False, GATE_UP, 0, 1.108, 1.208, 1.158),
        (model.addmm_after, False, DOWN, 0, 1.080, 1.236, 1.158),
        (*HIDDEN, GATE_UP, 0, 1.064, 1.098, 1.081),
        (*HIDDEN, DOWN, 0, 1.064, 1.116, 1.090),
        (*EXPOSED, GATE_UP, 0, 1.108, 1.145, 1.127),
        (*EXPOSED, DOWN, 0, 1.080, 1.173, 1.127),
    ],
)
def test_the_ceilings_alone_give_the_ratios_of_the_roofline_on_paper(
    implementation, exposed, shape, p, forward, backward, both
):
    """Paper has three digits, and the gradients of parameters in fp32: a thousandth more in backward."""
    found = model.ratios(implementation, Problem(8192, *shape, p=p), exposed)
    for counted, wanted in zip(found, (forward, backward, both), strict=True):
        assert wanted is None or counted == pytest.approx(wanted, abs=1.5e-3)
