"""LoDA against its objectives and formulas, by dense matrices and other decompositions, in fp64."""

from types import SimpleNamespace

import pytest
import torch
from support.toy import HIDDEN, SCALING, WIDTH, Toy, close, make, randomise, restored, same_function, sample

from lilora.errors import UserError
from lilora.methods import METHODS, Stage
from lilora.methods.loda import general_directions, isolated_directions

R, GENERAL = 2, 0.25


def made(**settings):
    return make("loda", r=R, alpha=SCALING * R, **{"general": GENERAL} | settings)


def data_of(seed):
    torch.manual_seed(seed)
    inputs = [sample(rows=3) for _ in range(3)]
    return lambda samples, size=None: iter(inputs)


def learn(method, task, seed):
    method.begin(Stage("learn", task), data_of(seed))
    randomise(method)
    method.end(Stage("learn", task), data_of(seed))


def moment(size, rank=None):
    x = torch.randn(rank or 3 * size, size, dtype=torch.float64)
    return x.T @ x / len(x)


def inputs_of(method, path, batches):
    """Every row that the linear gets."""
    rows = []
    hook = method.layers[path].base_layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    for inputs in batches(0):
        method.model(**inputs)
    hook.remove()
    return torch.cat(rows) if rows else torch.zeros(0, method.layers[path].in_features).double()


def energy(rows, a):
    """The mean over rows of the squared products with each row of a."""
    return torch.stack([(rows @ direction).square().mean() for direction in a])


# --- the directions -----------------------------------------------------------------------------------------------------


def test_the_general_directions_have_the_most_energy_in_both():
    new, old = moment(7), moment(7)
    a = general_directions(new, old, 3)
    close(a @ a.T, torch.eye(3).double())
    u, size, _ = torch.linalg.svd(new + old)
    close(torch.diagonal(a @ (new + old) @ a.T), size[:3])
    close(a.T @ a, u[:, :3] @ u[:, :3].T)


def test_the_isolated_directions_have_the_greatest_ratios_of_new_to_old_energy():
    new, old = moment(7), moment(7)
    a = isolated_directions(new, old, 3)
    close(a @ a.T, torch.eye(3).double())
    ratios, vectors = torch.linalg.eig(torch.linalg.solve(old, new))  # of S_old^-1 S_new, which is not symmetric
    best = vectors.real[:, ratios.real.argsort(descending=True)[:3]]
    q = torch.linalg.qr(best)[0]
    close(a.T @ a, q @ q.T, 1e-8)
    u = best[:, 0]
    assert (u @ new @ u) / (u @ old @ u) >= max((x @ new @ x) / (x @ old @ x) for x in torch.randn(500, 7).double())


@pytest.mark.parametrize("rank", [0, 3])
def test_an_old_moment_without_full_rank_leaves_the_isolated_directions_to_the_new_task(rank):
    new, old = moment(7), moment(7, rank) if rank else torch.zeros(7, 7).double()
    a = isolated_directions(new, old, 2)
    close(a @ a.T, torch.eye(2).double())
    assert torch.trace(a @ old @ a.T) < 1e-6 * torch.trace(a @ new @ a.T)


def test_features_are_those_of_the_task_without_padding():
    class Masked(Toy):
        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=super().forward(input_ids).logits)

    torch.manual_seed(0)
    method = METHODS["loda"](Masked(), {"r": R, "dropout": 0.9, "target_modules": "up|down"})
    lengths, batches = [8, 3, 5], []
    for _ in range(2):
        mask = torch.arange(8)[None] < torch.tensor(lengths)[:, None]
        batches.append({"input_ids": sample(rows=3)["input_ids"], "attention_mask": mask.long()})
    got = method.model.train() and method.measured(lambda samples: iter(batches))
    wanted, count = torch.zeros(WIDTH, WIDTH).double(), 0
    for inputs in batches:
        for row, length in zip(method.model.embedding(inputs["input_ids"]), lengths, strict=True):
            for x in row[:length]:
                wanted, count = wanted + torch.outer(x, x), count + 1
    close(got["up"], wanted / count)
    assert got["down"].shape == (HIDDEN, HIDDEN)
    assert method.model.training


# --- training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remembered", ["merged", "both"])
def test_every_task_adds_its_branches_and_only_what_leads_up_trains(remembered):
    method = made(remembered=remembered, gamma=2.0)
    layer, x = method.layers["down"], torch.randn(5, HIDDEN, dtype=torch.float64)
    weight, memory = layer.base_layer.weight.clone(), torch.zeros(HIDDEN, HIDDEN).double()
    for number, task in enumerate(("first", "second", "third")):
        rows = inputs_of(method, "down", data_of(number))
        method.begin(Stage("learn", task), data_of(number))
        a, b = layer.part("new")
        assert a.shape[0] == (2 * R if number else R)
        assert not b.any()
        close(a[:R] / GENERAL, general_directions(rows.T @ rows / len(rows), memory, R), 1e-8)
        if number:
            close(a[R:], isolated_directions(rows.T @ rows / len(rows), memory, R), 1e-6)
        assert [name for name, p in method.model.named_parameters() if p.requires_grad] == [
            f"{path}.lora_B.new" for path in ("up", "down", "idle")
        ]
        randomise(method)
        want = (b.detach() @ a).requires_grad_()
        dy = torch.randn(5, WIDTH, dtype=torch.float64)
        y, dense = layer(x), x @ (weight + SCALING * want).T + layer.base_layer.bias
        close(y, dense)
        close(torch.autograd.grad(y, b, dy)[0], torch.autograd.grad(dense, want, dy)[0] @ a.T)
        fixed, trained = a.detach().clone(), b.detach().clone()
        before = inputs_of(method, "down", data_of(number))
        method.end(Stage("learn", task), data_of(number))
        if number:
            new = energy(before, fixed[:R])
            old = torch.diagonal(fixed[:R] @ memory @ fixed[:R].T)
            trained[:, :R] *= 2 * new / (old + 2 * new)
        close(layer.part("new")[1], trained)
        weight = weight + SCALING * trained @ fixed
        close(layer(x), x @ weight.T + layer.base_layer.bias)
        after = inputs_of(method, "down", data_of(number))
        for seen in (before, after) if remembered == "both" else (after,):
            memory = memory + seen.T @ seen / len(seen)
        close(method.moments["down"], memory)
    assert not method.moments["idle"].any()
    assert method.ranks() == 5 * R


@pytest.mark.parametrize("tasks, train_a", [(2, "first"), (1, "never"), (1, "first")])
def test_each_half_of_a_batch_has_its_gradient_where_the_other_one_leads(tasks, train_a):
    method = made(lookahead=0.4, train_a=train_a)
    for number, task in enumerate(("first", "second")[:tasks]):
        method.begin(Stage("learn", task), data_of(number))
        randomise(method)
    inputs = sample(rows=5)
    torch.manual_seed(9)
    half, step = torch.randperm(5) % 2, 0.4 * torch.rand(()).item()
    torch.manual_seed(9)
    loss = method.loss(inputs, lambda: ((out := method.model(**inputs)).loss, out), 1.0)
    trained = {name: p for name, p in method.model.named_parameters() if p.requires_grad}
    assert len(trained) == (6 if tasks == 1 and train_a == "first" else 3)
    starts = {path: b.detach().clone() for path, b in trained.items()}
    got = torch.autograd.grad(3 * loss, list(trained.values()))
    first = next(iter(trained))

    plain = torch.autograd.grad(method.model(**inputs).loss, trained[first])[0]

    def gradients(own, moved):
        with torch.no_grad():
            for path, b in trained.items():
                b.copy_(starts[path] + moved.get(path, 0))
        logits = method.model(inputs["input_ids"][half == own]).logits[:, :-1].log_softmax(-1)
        answers = inputs["labels"][half == own, 1:, None]
        part = -logits.gather(-1, answers).sum() / (5 * answers.shape[1])
        return dict(
            zip(trained, torch.autograd.grad(part, list(trained.values()), materialize_grads=True), strict=True)
        )

    wanted = dict.fromkeys(trained, 0)
    for one, other in ((0, 1), (1, 0)):
        moved = {}
        for path, g in gradients(one, {}).items():
            branches = [g[:, :R], g[:, R:]] if tasks == 2 else [g]
            moved[path] = torch.cat([-step * part / max(part.norm().item(), 1e-12) for part in branches], 1)
        for path, g in gradients(other, moved).items():
            wanted[path] = wanted[path] + g
    for g, want in zip(got, wanted.values(), strict=True):
        close(g, 3 * want)
    assert (wanted[first] - plain).abs().max() > 1e-3 * plain.abs().max()


def test_a_loss_leaves_the_parameters_and_a_batch_of_one_sample_has_its_own_gradient():
    method = made()
    method.begin(Stage("learn", "first"), data_of(0))
    randomise(method)
    before = {name: p.clone() for name, p in method.model.named_parameters()}
    for rows in (4, 1):
        inputs = sample(rows=rows)
        loss = method.loss(inputs, lambda inputs=inputs: ((out := method.model(**inputs)).loss, out), 1.0)
        assert all(torch.equal(p, before[name]) for name, p in method.model.named_parameters())
        close(loss, method.model(**inputs).loss)
    up = method.layers["up"].part("new")[1]
    close(torch.autograd.grad(loss, up)[0], torch.autograd.grad(method.model(**inputs).loss, up)[0])
    plain = made(lookahead=0)
    mark = torch.tensor(1.0)
    assert plain.loss({}, lambda: (mark, None), 1.0) is mark


# --- the bank -----------------------------------------------------------------------------------------------------------


def test_a_bank_gives_the_same_function_and_goes_on_alike():
    method = made()
    for number, task in enumerate(("first", "second")):
        learn(method, task, number)
    again = restored(method, r=R, alpha=SCALING * R, general=GENERAL)
    same_function(method, again)
    for one in (method, again):
        learn(one, "third", 2)
    assert method.fingerprints(["third"]) == again.fingerprints(["third"])
    linears = [(9, 7), (7, 9), (3, 7)]
    assert method.parameters() == 5 * R * sum(n + k for n, k in linears)
    assert method.inference_parameters(method.options, linears) is None


def test_more_directions_than_inputs_are_refused():
    method = make("loda")
    method.begin(Stage("learn", "first"), data_of(0))
    with pytest.raises(UserError, match=r"loda: r is 4 and up has 7 inputs, of which 8 directions cannot be made"):
        method.begin(Stage("learn", "second"), data_of(1))
    assert method.tasks == ["first"]
