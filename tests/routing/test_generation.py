"""Generation with a task for each sample."""

from functools import partial

import pytest
import torch
from support.routed import close, layers_of, logits
from support.tiny_llava import batch, sample, tiny_llava
from torch import nn

from lilora_kernels import route
from lilora_kernels.layers import lilora
from lilora_kernels.layers.lilora import set_task
from lilora_kernels.routing.context import TEXT, tasks_of

NAMES = ["where", "read", None, "count"]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams", "returned"]
)
@pytest.mark.parametrize("images", [[1, 1, 1], [2, 0, 1]], ids=str)
def test_generation_follows_the_tasks(model, images, options):
    names = ["where", None, "count"]
    inputs, options = batch(images), {"max_new_tokens": 5, "do_sample": False, **options}
    got = model.generate(**inputs, task_ids=names, **options)
    wanted = []
    for i, name in enumerate(names):
        set_task(model, *([] if name is None else [name]))
        wanted.append(model.generate(**sample(inputs, images, i), **options))
    assert torch.equal(got, torch.cat(wanted))
    set_task(model, "read")
    assert not torch.equal(got, model.generate(**inputs, **options))
    with route(model, names):
        assert torch.equal(model.generate(**inputs, **options), got)


def test_generation_stacks_factors_once_and_sees_weights_that_changed_before_it(monkeypatch):
    model, inputs = tiny_llava(), batch([1, 1])
    calls, stack = [], lilora.stacked
    monkeypatch.setattr(lilora, "stacked", lambda *arguments: calls.append(arguments) or stack(*arguments))
    options = {"task_ids": ["where", "read"], "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    first = model.generate(**inputs, **options)
    assert len(calls) == 3 * len(layers_of(model))  # of U, V and fusion, not once for each of five tokens
    with torch.no_grad():
        for layer in layers_of(model):
            layer.lilora_U["where"].mul_(-3)
    changed = model.generate(**inputs, **options)
    assert not torch.equal(changed[0], first[0])
    assert torch.equal(changed[1], first[1])
    logits_now = logits(model, inputs, task_ids=["where", "read"])[0, -1]
    assert changed[0, inputs["input_ids"].shape[1]] == logits_now.argmax()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.lilora_U["where"].mul_(-3)
    assert not torch.equal(logits(model, inputs, task_ids=["where", "read"])[0, -1], logits_now)


def test_generations_inside_a_route_see_what_was_written_between_them():
    model, inputs, names = tiny_llava(), batch([1, 1]), ["where", "read"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with route(model, names):
        first = model.generate(**inputs, **options)
        with torch.no_grad():
            for layer in layers_of(model):
                layer.lilora_U["where"].mul_(-3)
        second = model.generate(**inputs, **options)
        assert tasks_of(model).current.stacks == {}
    assert not torch.equal(first, second)
    assert torch.equal(second, model.generate(**inputs, task_ids=names, **options))


def test_ids_given_inside_a_route_count(model):
    more = batch([0, 1, 1])
    wanted = logits(model, more, task_ids=NAMES[:3])
    with route(model, ["where", "read"]):
        close(logits(model, more, task_ids=NAMES[:3]), wanted)


def test_a_route_serves_inference_mode_and_then_a_backward():
    model = tiny_llava()
    set_task(model, "read", train=False)
    layer = layers_of(model)[-1]
    x = torch.randn(2, 3, layer.in_features)
    with route(model, ["where", "read"]):
        with torch.inference_mode():
            layer(x)
        x.requires_grad_()
        layer(x).sum().backward()
    assert x.grad is not None


def test_generation_sees_shared_factors_that_a_loader_replaced():
    model, inputs = tiny_llava(), batch([1, 1])
    options = {"task_ids": ["where", "read"], "max_new_tokens": 3, "do_sample": False}
    before = logits(model, inputs, task_ids=["where", "read"])
    for layer in layers_of(model):
        newest = layer.tasks[-1]
        layer.lilora_A[newest] = nn.Parameter(torch.randn_like(layer.lilora_A[newest]), requires_grad=False)
    got = model.generate(**inputs, **options)
    now = logits(model, inputs, task_ids=["where", "read"])
    assert not torch.equal(now, before)
    assert torch.equal(got[:, inputs["input_ids"].shape[1]], now[:, -1].argmax(-1))


def test_generation_with_offloaded_factors_gathers_them_in_every_forward(monkeypatch):
    model, inputs = tiny_llava(), batch([0, 0])
    layers = [layer for layer in layers_of(model) if layer.place == TEXT]
    kept = [{name: p.data for name, p in layer.lilora_U.items()} for layer in layers]
    options = {"task_ids": ["where", "read"], "max_new_tokens": 3, "do_sample": False}
    wanted = model.generate(**inputs, **options)

    def move(layer, values):
        for name in layer.lilora_U:
            layer.lilora_U[name] = nn.Parameter(values[name], requires_grad=False)

    for layer, values in zip(layers, kept, strict=True):
        away = {name: value.to("meta") for name, value in values.items()}
        layer.register_forward_pre_hook(lambda layer, _, values=values: move(layer, values))
        layer.register_forward_hook(lambda layer, *_, away=away: move(layer, away))
        move(layer, away)
    assert torch.equal(model.generate(**inputs, **options), wanted)


def test_generation_reads_shared_factors_that_are_brought_anew_for_every_step():
    model, inputs = tiny_llava(), batch([0, 0])
    options = {"task_ids": ["where", "read"], "max_new_tokens": 4, "do_sample": False}
    wanted = model.generate(**inputs, **options)

    def bring(layer, _, values):
        layer.lilora_A[layer.tasks[0]] = nn.Parameter(values.clone(), requires_grad=False)

    def take(layer, *_):
        layer.lilora_A[layer.tasks[0]].data.fill_(torch.nan)

    for layer in layers_of(model):
        values = layer.lilora_A[layer.tasks[0]].detach().clone()
        layer.register_forward_pre_hook(partial(bring, values=values))
        layer.register_forward_hook(take)
    assert torch.equal(model.generate(**inputs, **options), wanted)


def test_sampled_sequences_repeat_the_task_of_their_sample(model):
    inputs = batch([1, 1])
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3, "top_k": 1}
    got = model.generate(**inputs, task_ids=["where", "count"], **options)
    greedy = model.generate(**inputs, task_ids=["where", "count"], max_new_tokens=4, do_sample=False)
    assert torch.equal(got, greedy.repeat_interleave(3, 0))
