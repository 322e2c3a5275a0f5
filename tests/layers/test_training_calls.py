"""Calls of a layer with gradients, the first and later ones, by the CPU kernels and by the composed plan."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lilora_kernels import LiLoRALinear, backends
from lilora_kernels.ops.linear.register import linear


@pytest.fixture(params=[None, "composed"], autouse=True)
def plan(request, monkeypatch):
    monkeypatch.setitem(backends.forced, "plan", request.param)


def made(*tasks, dropout=0.0):
    layer = LiLoRALinear(nn.Linear(24, 20), r=8, sub_rank=4, dropout=dropout)
    for task in tasks:
        layer.add_task(task)
        nn.init.normal_(layer.lilora_U[task])
    layer.set_task(*tasks)
    return layer


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(2, 3, 24), (6, 24), (24,), (2, 0, 24)])
def test_a_checkpoint_repeats_the_first_call(shape, dropout):
    layer, x = made("one", dropout=dropout), torch.randn(shape, requires_grad=True)
    for _ in range(3):
        torch.manual_seed(0)
        want = torch.autograd.grad(layer(x).square().sum(), x)[0]
        layer.bind()  # as new
        torch.manual_seed(0)
        got = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)[0]
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(2, 3, 24), (6, 24), (24,)])
def test_every_output_may_be_written_to(shape):
    layer, x = made("one"), torch.randn(shape, requires_grad=True)
    want = torch.autograd.grad(layer(x).relu().sum(), x)[0]
    for _ in range(3):
        assert torch.equal(torch.autograd.grad(layer(x).relu_().sum(), x)[0], want)


def test_ids_of_another_number_of_rows_raise_in_every_call():
    layer, x = made("one"), torch.randn(4, 24, requires_grad=True)
    factors = type(layer._slot)((*layer._slot[:2], None, None, None))
    base = layer.base_layer.weight, layer.base_layer.bias
    for rows in (4, 4, 3, 4):
        rest = torch.zeros(rows, dtype=torch.int32), None, None, None, 2.0, 0.0, None
        if rows == 4:
            factors.run(linear, x, base, *rest).sum().backward()
            continue
        with pytest.raises(ValueError, match=r"task is \[3\]; it must be \[M\] with M = 4"):
            factors.run(linear, x, base, *rest)


def test_graphs_let_go_of_what_they_saved(monkeypatch):
    layer, stacks = made("one", "two"), []
    stack = LiLoRALinear._stack

    def watched(self, names):
        found = stack(self, names)
        stacks[:] = map(weakref.ref, found)
        return found

    monkeypatch.setattr(LiLoRALinear, "_stack", watched)
    x, task = torch.randn(3, 24, requires_grad=True), torch.tensor([0, 1, -1], dtype=torch.int32)
    y = checkpoint(lambda x: layer(x, task=task), x, use_reentrant=False)
    assert [alive() for alive in stacks] == [None] * 3
    y.sum().backward()
    y = layer(x, task=task).sum()
    assert None not in [alive() for alive in stacks]
    y.backward()
    assert [alive() for alive in stacks] == [None] * 3


def test_a_layer_lets_go_of_a_base_weight_that_was_replaced():
    layer = made("one")
    for _ in range(3):
        layer(torch.randn(3, 24)).sum().backward()
    before = weakref.ref(layer.base_layer.weight)
    layer.base_layer.weight = nn.Parameter(torch.randn(20, 24), requires_grad=False)
    gc.collect()
    assert before() is None
