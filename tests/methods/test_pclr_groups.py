"""PCLR: the switch between newest and past tasks, shared ranks, and groups of tasks (PCLR-LwF)."""

import pytest
import torch
from support.clip_llava import batch
from support.pclr import learn, learned, pclr

from lilora.methods.pclr.settings import PCLRSettings


def test_the_switch_acts_from_as_many_tasks_on_as_are_said():
    method, inputs = pclr(newest_switch=3), batch([1, 0, 1])
    switched = []
    for i in range(4):
        learn(method, f"task{i}", steps=1)
        switched.append(method.pool_tasks.task_queries is not None)
        again = pclr(newest_switch=3)
        again.restore({task: method.tensors(task) for task in method.tasks})
        with torch.no_grad():
            assert torch.equal(again.model(**inputs).logits, method.model(**inputs).logits)
    assert switched == [False, False, True, True]
    assert PCLRSettings(target_modules="x", newest_switch=True).newest_switch == 2, "as banks of earlier versions say"
    assert PCLRSettings(target_modules="x", newest_switch=False).newest_switch == 0


def test_new_experts_serve_every_task_of_the_newest_group():
    method = learned(4, newest_switch=1, groups=[1, 1, 2])
    queries = method.queries
    with torch.no_grad():
        for i in range(4):
            queries.text[i], queries.vision[i] = torch.eye(16)[i], torch.eye(16)[i]
    assert method.pool_tasks.newest(queries).tolist() == [False, False, True, True]


@pytest.mark.parametrize("pools", ["layer", "global"])
def test_shared_ranks_after_the_first_integration(pools):
    method = pclr(shared_learns="after_integration", pools=pools)
    shared = []
    for i in range(5):
        before = {path: [t.clone() for t in layer.part("shared")] for path, layer in method.layers.items()}
        for stage in method.stages(f"task{i}"):
            method.begin(stage, lambda samples: iter([batch()]))
            trained = {layer.part("shared")[0].requires_grad for layer in method.layers.values()}
            shared.append((stage.name, method.ranks() - method.experts(), trained))
            method.end(stage, lambda samples: iter([batch()]))
        assert len(before) == len(method.layers)
    first = [("learn", 0, {False})] * 3
    assert shared == [*first, *[("integrate", 2, {True}), ("learn", 2, {True})] * 2]


def test_tasks_of_a_group_train_its_ranks_further():
    method, kept = pclr(groups=[1, 2, 1], cap=8), []
    for i in range(5):
        stages = [stage.name for stage in method.stages(f"task{i}")]
        parts = {n: layer.part("new")[1].detach().clone() for n, layer in method.layers.items()}
        old = {n: layer.part("old")[1].detach().clone() for n, layer in method.layers.items()}
        learn(method, f"task{i}")
        kept.append((stages, method.experts()))
        if i == 2:  # the second of its group
            for n, layer in method.layers.items():
                assert torch.equal(layer.part("old")[1], old[n])
                assert layer.part("new")[1].shape == parts[n].shape
                assert (layer.part("new")[1] - parts[n]).abs().max() > 0
    cycle = ["integrate", "learn"]
    assert kept == [(["learn"], 4), (["learn"], 8), (["learn"], 8), (cycle, 8), (cycle, 8)]
    assert len(method.queries.text) == 5


def test_within_a_group_the_model_before_the_task_is_distilled_at_the_answers():
    """The loss by hand: KL at temperature 2 from another model that has the tensors of before the task."""
    method, inputs = learned(1, groups=2, lwf=0.7, key_weight=0.3, dropout=0.3), batch([1, 0, 1])
    before = pclr(groups=2, lwf=0.7)
    before.restore({task: method.tensors(task) for task in method.tasks})
    (stage,) = method.stages("next")
    method.begin(stage, lambda samples: iter([]))
    method.model.train()
    with torch.no_grad():
        for layer in method.layers.values():
            for tensor in layer.part("new"):
                tensor.add_(0.1 * torch.randn_like(tensor))
        for pool in method.pools.values():
            for key in pool.keys("new"):
                key.add_(0.1 * torch.randn_like(key))
    torch.manual_seed(3)
    outputs = method.model(**inputs)
    query = method.pool_tasks.last.query()
    teacher = before.model(**inputs).logits
    answered = inputs["labels"][:, 1:] != -100
    log_p, log_q = ((z[:, :-1][answered].double() / 2).log_softmax(-1) for z in (outputs.logits, teacher))
    lwf = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    wanted = outputs.loss + 0.25 * (0.3 * method._key_loss(query, "new") + 0.7 * lwf)
    torch.manual_seed(3)

    def cross_entropy():
        out = method.model(**inputs)
        return out.loss, out

    assert lwf > 1e-3
    got = method.loss(inputs, cross_entropy, 0.25)
    torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-5, atol=1e-6)
    assert method.model.training
    method.end(stage, lambda samples: iter([]))
    assert not any(pool.teacher for pool in method.pools.values())
