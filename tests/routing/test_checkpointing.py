"""Gradient checkpointing: a recomputation sees the route of its forward, or raises."""

import copy
import functools
import gc
import io
import weakref

import pytest
import torch
from support.tiny_llava import TASKS, batch, randomise, tiny_llava
from torch import nn
from torch.utils.checkpoint import checkpoint

from lilora_kernels import LiLoRALinear, attach, route
from lilora_kernels.layers.lilora import set_task
from lilora_kernels.routing.context import tasks_of

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
DROPOUT = pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no-dropout", "dropout"])
FIRST, SECOND = ["count", "where"], ["where", None]


def trained(dropout: float = 0.0, reentrant: bool | None = None):
    """The same model at every call, in training mode; reentrant None: without checkpointing."""
    torch.manual_seed(1)
    model = tiny_llava(dropout=dropout, train_a="always", train_b0="always").train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def loss(model, inputs, names):
    return model(**inputs, task_ids=names).logits.square().mean()


def same(got, wanted):
    assert got.keys() == wanted.keys()
    assert any(gradient.abs().sum() > 0 for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6 * max(gradient.abs().max().item(), 1e-3))


# --- through the model's own checkpointing ----------------------------------------------------------------------------


@REENTRANT
@DROPOUT
@pytest.mark.parametrize("names", [FIRST, None], ids=["mixed", "one"])
def test_gradients_are_those_without_checkpointing(reentrant, dropout, names):
    inputs, found = batch([2, 0]), []
    for kind in (None, reentrant):
        model = trained(dropout, kind)
        set_task(model, *(TASKS if names else ["where"]))
        torch.manual_seed(2)
        loss(model, inputs, names).backward()
        found.append(gradients(model))
    same(found[1], found[0])


@REENTRANT
@DROPOUT
def test_two_forwards_before_two_backwards(reentrant, dropout):
    one, two, found = batch([2, 0]), batch([0, 1]), []
    for kind in (None, reentrant):
        model = trained(dropout, kind)
        set_task(model, *TASKS)
        torch.manual_seed(2)
        losses = loss(model, one, FIRST), loss(model, two, SECOND)
        for value in losses:
            value.backward()
        found.append(gradients(model))
    same(found[1], found[0])


@REENTRANT
def test_a_forward_without_ids_between_routed_ones(reentrant):
    inputs, found = batch([1, 1]), []
    for kind in (None, reentrant):
        model = trained(reentrant=kind)
        set_task(model, "where")
        losses = [loss(model, inputs, names) for names in ([None, "where"], None, SECOND)]
        for value in losses:
            value.backward()
        found.append(gradients(model))
    same(found[1], found[0])


@REENTRANT
@pytest.mark.parametrize("names", [["count", None], None], ids=["routed", "active"])
def test_a_task_set_between_forward_and_backward_raises(reentrant, names):
    model = trained(reentrant=reentrant)
    set_task(model, "count")
    value = loss(model, batch([1, 1]), names)
    set_task(model, "where")
    with pytest.raises(RuntimeError, match="active task was set between a forward and its backward"):
        value.backward()
    assert tasks_of(model).current is None
    loss(model, batch([1, 1]), names and SECOND).backward()


def test_without_checkpointing_it_raises_too():
    """torch would drop the gradients of the task that stopped training."""
    model, inputs = trained(), batch([1, 1])
    set_task(model, "count")
    value = loss(model, inputs, None)
    set_task(model, "where")
    with pytest.raises(RuntimeError, match=r"set between a forward and its backward.*set_task"):
        (value + loss(model, inputs, None)).backward()


def reloaded(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def of_another_dtype(model):
    return model.double().float()


@pytest.mark.parametrize("made", [copy.deepcopy, reloaded, of_another_dtype])
def test_whatever_became_of_the_layer_it_raises(made):
    x = torch.randn(2, 3, 12)
    for names in (("count",), ("count", "where")):
        model = stack()
        set_task(model, "count", "where")
        model = made(model)
        set_task(model, *names)
        options = {} if len(names) == 1 else {"task_ids": ["count", "where"]}
        model(x, **options).sum().backward()
        y = model(x, **options).sum()
        set_task(model, "where")
        with pytest.raises(RuntimeError, match="set between a forward and its backward"):
            y.backward()


def test_a_deleted_task_is_freed_at_once():
    layer = stack().layers[0]
    layer.set_task("count")
    own = weakref.ref(layer.lilora_U["count"])
    layer(torch.randn(2, 12)).sum().backward()
    gc.disable()
    try:
        layer.delete_task("count")
        assert own() is None
    finally:
        gc.enable()


def test_what_learns_without_being_set_to():
    layer = stack().layers[0]
    layer.set_task("count", train=False)
    for own in layer._own("count"):
        own.requires_grad_()
    layer(torch.randn(2, 12)).sum().backward()
    assert layer.lilora_U["count"].grad.abs().sum() > 0
    layer.set_task("where")
    layer.lilora_U["count"].grad = None
    layer.lilora_U["count"].requires_grad_()
    (layer(torch.randn(2, 12)).sum() + layer.lilora_U["count"].square().sum()).backward()
    assert layer.lilora_U["count"].grad.abs().sum() > 0
    assert copy.deepcopy(layer.lilora_U).keys() == layer.lilora_U.keys()


def test_gradients_of_the_input_alone_do_not_mind():
    model, x = stack().eval(), torch.randn(2, 3, 12, requires_grad=True)
    set_task(model, "count", train=False)
    y = model(x).sum()
    (wanted,) = torch.autograd.grad(y, x, retain_graph=True)
    set_task(model, "where", train=False)
    assert torch.equal(torch.autograd.grad(y, x)[0], wanted)


@REENTRANT
def test_a_copy_of_a_checkpointed_model_recomputes_on_its_own_route(reentrant):
    model, inputs = trained(reentrant=reentrant), batch([1, 1])
    set_task(model, *TASKS)
    twin = copy.deepcopy(model)
    loss(model, inputs, FIRST).backward()
    value = loss(twin, inputs, FIRST)
    set_task(model, "read")
    with route(model, SECOND):
        value.backward()
    same(gradients(twin), gradients(model))


def test_enabling_again_with_other_options_keeps_the_routes():
    model, inputs = trained(reentrant=True), batch([1, 1])
    model.gradient_checkpointing_enable()
    attach(model)
    set_task(model, *TASKS)
    plain = trained()
    set_task(plain, *TASKS)
    for each in (model, plain):
        losses = loss(each, inputs, FIRST), loss(each, inputs, SECOND)
        for value in losses:
            value.backward()
    same(gradients(model), gradients(plain))


# --- torch's checkpoint called by hand --------------------------------------------------------------------------------


class Stack(nn.Module):
    """Two adapted linears, run through `wrapper`."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList(
            LiLoRALinear(nn.Linear(12, 12).requires_grad_(False), r=4, sub_rank=2, dropout=dropout) for _ in range(2)
        )
        self.wrapper = None

    def forward(self, x):
        for layer in self.layers:
            x = (layer(x) if self.wrapper is None else self.wrapper(layer, x)).tanh()
        return x


def stack(dropout=0.0):
    torch.manual_seed(1)
    model = Stack(dropout)
    for layer in model.layers:
        for task in TASKS:
            layer.add_task(task)
    randomise(model)
    attach(model)
    set_task(model, *TASKS)
    return model


def by_hand(model, **options):
    model.wrapper = functools.partial(checkpoint, use_reentrant=False, **options)
    return model


@DROPOUT
def test_by_hand_with_the_context_of_the_routes(dropout):
    x, found = torch.randn(2, 3, 12, requires_grad=True), []
    for kind in (stack, lambda p: (m := stack(p)) and by_hand(m, context_fn=tasks_of(m).checkpoint_context)):
        model = kind(dropout)
        torch.manual_seed(2)
        losses = [model(x, task_ids=names).square().mean() for names in (FIRST, SECOND)]
        for value in losses:
            value.backward(retain_graph=True)
            value.backward()
        found.append(gradients(model))
    same(found[1], found[0])


@REENTRANT
def test_by_hand_without_it_raises(reentrant):
    model, x = stack(), torch.randn(2, 3, 12, requires_grad=True)
    model.wrapper = functools.partial(checkpoint, use_reentrant=reentrant)
    value = model(x, task_ids=FIRST).square().mean()
    with pytest.raises(RuntimeError, match=r"recomputed without the route of its forward.*context_fn=tasks_of"):
        value.backward()


@REENTRANT
def test_by_hand_without_it_raises_even_after_a_forward_without_route(reentrant):
    model, x = stack(), torch.randn(2, 3, 12, requires_grad=True)
    set_task(model, "count")
    model.wrapper = functools.partial(checkpoint, use_reentrant=reentrant)
    value = model(x, task_ids=["count", None]).square().mean()
    model(x)
    with pytest.raises(RuntimeError, match="recomputed without the route of its forward"):
        value.backward()


@REENTRANT
def test_by_hand_without_routes_needs_nothing(reentrant):
    x, found = torch.randn(2, 3, 12, requires_grad=True), []
    for wrapper in (None, functools.partial(checkpoint, use_reentrant=reentrant)):
        model = stack()
        set_task(model, "count")
        with torch.no_grad():
            model(x, task_ids=FIRST)  # evaluation with routes is not in the way
        model.wrapper = wrapper
        model(x).square().mean().backward()
        found.append(gradients(model))
    same(found[1], found[0])


@pytest.mark.parametrize("reentrant, more", [(True, False), (False, False), (False, True)], ids=str)
def test_by_hand_a_task_set_in_between_raises(reentrant, more):
    model, x = stack(), torch.randn(2, 3, 12, requires_grad=True)
    set_task(model, "count")
    model.wrapper = functools.partial(checkpoint, use_reentrant=reentrant)
    value = model(x).square().mean()
    set_task(model, "where")
    if more:
        model(x)
    with pytest.raises(RuntimeError, match=r"recomputed without the route|set between a forward and its backward"):
        value.backward()
