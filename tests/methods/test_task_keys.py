"""ProgLoRA and EProj against their formulas, written out sample by sample."""

import pytest
import torch
from support.clip_llava import TARGETS, batch, llava
from support.toy import close

from lilora.errors import UserError
from lilora.methods import Stage, make_method

R, SCALING = 3, 2.0
IMAGES = (1, 0, 2)  # of the samples of a batch


def make(name, **settings):
    torch.manual_seed(0)
    sizes = {"r": R, "alpha": SCALING * R, "dropout": 0.0, "target_modules": TARGETS}
    return make_method(name, llava(), sizes | settings)


@torch.no_grad()
def learn(method, task, data, end=True):
    """The task's stage on these batches, with factors that are random throughout."""
    method.begin(Stage("learn", task), lambda samples, size=None: iter(data))
    for p in method.model.parameters():
        if p.requires_grad:
            p.normal_(std=0.3)
    if end:
        method.end(Stage("learn", task), None)


def queries(model, inputs):
    """[B, d] of norm 1: mean embedding of the prompt's text and mean class token of the images, each of norm 1 or 0."""
    tower = model.model.vision_tower
    states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 0]
    images, rows, at = [s / s.norm() for s in states], [], 0
    for ids, labels, count in zip(inputs["input_ids"], inputs["labels"], IMAGES, strict=True):
        words = [model.get_input_embeddings().weight[i] for i, y in zip(ids, labels, strict=True) if i != 39 and y < 0]
        text = torch.stack(words).mean(0)
        own = sum(images[at : at + count], torch.zeros(16))
        at += count
        row = torch.cat([text / text.norm(), own / own.norm() if count else own])
        rows.append(row / row.norm())
    return torch.stack(rows)


def dense_logits(method, inputs, weights):
    """Each sample alone in a model whose weights have the blocks added, weighted by weights [B, blocks]."""
    logits, at = [], 0
    for row, count in enumerate(IMAGES):
        plain = llava()
        for path, layer in method.layers.items():
            for block, weight in enumerate(weights[row]):
                a, b = layer.part(f"block{block}")
                plain.get_submodule(path).weight.data += SCALING * weight * b.detach() @ a.detach()
        own = {k: inputs[k][row : row + 1] for k in ("input_ids", "attention_mask")}
        if count:
            own["pixel_values"] = inputs["pixel_values"][at : at + count]
        at += count
        logits.append(plain(**own).logits[0])
    return torch.stack(logits)


def prompt(inputs):
    return {name: value for name, value in inputs.items() if name != "labels"}


@torch.no_grad()
@pytest.mark.parametrize("trains", [False, True])
def test_proglora_weighs_the_nearest_tasks_of_each_sample(trains):
    method, plain, keys = make("proglora", top=2, temperature=0.1), llava(), []
    for i, task in enumerate(("first", "second", "third")):
        data = [batch(IMAGES), batch(IMAGES)]
        mean = torch.cat([queries(plain, inputs) for inputs in data]).mean(0)
        keys.append(mean / mean.norm())
        learn(method, task, data, end=not trains or i < 2)
        assert method.ranks() == R * (i + 1)
    inputs = batch(IMAGES)
    inputs["labels"] = inputs["labels"].fill_(-100)  # as at inference
    near = queries(plain, inputs) @ torch.stack(keys).T
    weights = torch.zeros(3, 3)
    for row, sims in zip(weights, near.tolist(), strict=True):
        ranked = sorted(range(3), key=lambda j: (trains and j < 2, -sims[j]))[:2]  # the newest first while it trains
        powers = {j: torch.tensor(sims[j] / 0.1).exp() for j in ranked}
        for j, power in powers.items():
            row[j] = power / sum(powers.values())
    method.model.train(trains)
    assert ((weights > 0.6) & (weights < 1)).any()
    close(method.model(**prompt(inputs)).logits, dense_logits(method, inputs, weights), 2e-5)


def test_only_the_newest_block_of_proglora_trains():
    method = make("proglora")
    for task in ("first", "second"):
        learn(method, task, [batch(IMAGES)], end=task == "first")
    trained = {name for name, p in method.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(method.layers)
    assert all(name.endswith("block1") for name in trained)
    method.model(**batch(IMAGES)).loss.backward()
    assert all(p.grad.any() for p in method.model.parameters() if p.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [-1.0, 1.0])
def test_eproj_makes_a_block_for_tasks_below_the_threshold_alone(threshold):
    method, plain = make("eproj", threshold=threshold), llava()
    for task in ("first", "second"):
        learn(method, task, [batch(IMAGES)])
    again = threshold < 0
    assert method.ranks() == R * (1 if again else 2)
    inputs = batch(IMAGES)
    inputs["labels"] = inputs["labels"].fill_(-100)
    near = queries(plain, inputs) @ method.keys.keys.T
    assert (near[:, 0] - near[:, 1]).abs().min() > 1e-3
    owner = [0, 0 if again else 1]
    weights = torch.zeros(3, method.keys.blocks)
    for row, sims in zip(weights, near.tolist(), strict=True):
        row[owner[0 if sims[0] >= sims[1] else 1]] = 1
    close(method.model(**prompt(inputs)).logits, dense_logits(method, inputs, weights), 2e-5)


def test_eproj_trains_the_block_of_the_nearest_task_and_holds_it():
    method = make("eproj", threshold=0.999, penalty=0.7)
    data = {task: [batch(IMAGES)] for task in ("first", "second")}
    for task in data:
        learn(method, task, data[task])
    assert method.keys.owner.tolist() == [0, 1]
    method.begin(Stage("learn", "third"), lambda samples, size=None: iter(data["first"]))
    assert method.keys.owner.tolist() == [0, 1, 0]
    ce = torch.randn(())
    assert method.loss({}, lambda: (ce, None), 0.25) == ce  # where it was
    anchor = {name: p.detach().clone() for name, p in method.block(0).items()}
    with torch.no_grad():
        for p in method.block(0).values():
            p.add_(0.1 * torch.randn_like(p))
    loss = method.loss({}, lambda: (ce, None), 0.25)
    moved = sum(((p - anchor[name]) ** 2).sum() for name, p in method.block(0).items())
    close(loss.detach(), (ce + 0.25 * 0.35 * moved).detach(), 1e-6)
    loss.backward()
    assert {p for p in method.model.parameters() if p.requires_grad} == set(method.block(0).values())
    inputs = batch(IMAGES)
    method.model.train()
    weights = torch.tensor([[1.0, 0.0]] * 3)  # every sample of the task uses it
    with torch.no_grad():
        close(method.model(**prompt(inputs)).logits, dense_logits(method, inputs, weights), 2e-5)
    choice = method.keys.choose(method.pool_tasks.last.query())
    assert choice.groups == ((("block0",), None),)  # the others cost nothing


@torch.no_grad()
@pytest.mark.parametrize("name", ["proglora", "eproj"])
def test_a_bank_gives_the_same_function(name):
    method = make(name)
    for task in ("first", "second"):
        learn(method, task, [batch(IMAGES)])
    again = make(name)
    again.restore({task: method.tensors(task) for task in method.tasks})
    inputs = prompt(batch(IMAGES))
    assert torch.equal(again.model(**inputs).logits, method.model(**inputs).logits)
    assert again.fingerprints(["first"]) == method.fingerprints(["first"])
    assert again.ranks() == method.ranks()


@pytest.mark.parametrize(
    "name, key, value", [("proglora", "top", 0), ("proglora", "temperature", 0), ("eproj", "threshold", 2)]
)
def test_a_wrong_setting_is_one_sentence(name, key, value):
    with pytest.raises(UserError, match=f"^{name}: {key} is {value}; "):
        make(name, **{key: value})
