"""Ortho-LoRA against gradients of each task alone, projected in every order, in fp64."""

import itertools

import pytest
import torch
from support.toy import VOCABULARY, begin, close, make

from lilora.methods.ortholora import combined_gradient


def mixed(tasks, length=6):
    """A batch with a sample of each of these tasks, which want other answers, of different lengths, to alike prompts."""
    input_ids = torch.randint(VOCABULARY, (1, length)).expand(len(tasks), -1).contiguous()
    labels = torch.full_like(input_ids, -100)
    for i, task in enumerate(tasks):
        labels[i, 1 + i % 3 :] = 3 * task
    return {"input_ids": input_ids, "labels": labels, "task_ids": torch.tensor(tasks)}


def cross_entropies(method, inputs):
    """The summed loss of the answers of every sample, one token after the other."""
    logits = method.model(inputs["input_ids"]).logits.log_softmax(-1)
    return [
        sum(-logits[i, at - 1, y] for at, y in enumerate(row.tolist()) if at and y != -100)
        for i, row in enumerate(inputs["labels"])
    ]


def projected(gradients, orders):
    total = 0
    for i, order in enumerate(orders):
        own = gradients[i].flatten()
        for j in order:
            other = gradients[j].flatten()
            if j != i and own @ other < 0:
                own = own - (own @ other) / (other @ other) * other
        total = total + own.view_as(gradients[i])
    return total


@pytest.mark.parametrize("tasks", [[0, 2, 0, 2, 2], [2, 0, 1, 0]], ids=["two", "three"])
def test_every_factor_takes_the_step_of_tasks_that_do_not_undo_each_other(tasks):
    method = make("ortholora")
    begin(method, "all")
    inputs = mixed(tasks)
    labels = (inputs["labels"][:, 1:] != -100).sum()
    each, parameters = cross_entropies(method, inputs), list(method.lora().values())
    names, gradients = list(method.lora()), []
    for t in sorted(set(tasks)):
        part = sum(e for e, task in zip(each, tasks, strict=True) if task == t) / labels
        gradients.append(
            torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        )
    loss = method.loss(inputs, lambda: ((out := method.model(inputs["input_ids"], inputs["labels"])).loss, out), 1.0)
    assert "task_ids" not in inputs
    close(loss.detach(), (sum(each) / labels).detach(), 1e-9)
    (3 * loss).backward()
    got = {name: p.grad / 3 for name, p in zip(names, parameters, strict=True)}
    plain = {name: sum(own) for name, own in zip(names, zip(*gradients, strict=True), strict=True)}
    assert any(
        (got[name] - plain[name]).abs().max() > 1e-3 * plain[name].abs().max() for name in names
    )  # tasks conflict
    orders = list(itertools.permutations(range(len(gradients))))
    worst = [
        max(
            (got[name] - projected(own, chosen)).abs().max() / plain[name].abs().max().clamp_min(1e-9)
            for name, own in zip(names, zip(*gradients, strict=True), strict=True)
        )
        for chosen in itertools.product(orders, repeat=len(gradients))
    ]
    assert min(worst) < 1e-9


def test_a_batch_of_one_task_has_its_own_gradient():
    method = make("ortholora")
    begin(method, "all")
    inputs = mixed([1, 1, 1])
    loss = method.loss(inputs, lambda: ((out := method.model(inputs["input_ids"], inputs["labels"])).loss, out), 1.0)
    close(loss, method.model(inputs["input_ids"], inputs["labels"]).loss)


def test_a_projected_gradient_does_not_point_against_the_other():
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    total = combined_gradient([one, other], [[0, 1], [0, 1]])
    assert total.tolist() == [0.5, 1.5]  # (0.5, 0.5) and (0, 1)
    assert combined_gradient([one, -other], [[0, 1], [0, 1]]).tolist() == [2, -1]  # no conflict
