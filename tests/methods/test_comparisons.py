"""Joint, replay, zero-shot, N-LoRA, SEFE, SLAO and C-LoRA against their formulas, written out with dense matrices in fp64."""

import math

import pytest
import torch
from torch import nn

from lilora.bank.bank import Bank
from lilora.bank.index import BaseModelId
from lilora.errors import UserError
from lilora.methods import METHODS, Stage, make_method, update_norm

WIDTH, HIDDEN, R, SCALING = 9, 12, 4, 2.0
TARGETS = r"up|down|idle"
ONE_LORA = ("joint", "replay", "slao", "clora")
NAMES = (*ONE_LORA, "nlora", "sefe", "zero-shot")


class Toy(nn.Module):
    """y = down(tanh(up(x))); `idle` is used by no sample."""

    def __init__(self, dtype=torch.float64, hidden=HIDDEN):
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down, self.idle = (nn.Linear(*s) for s in ((WIDTH, hidden), (hidden, WIDTH), (WIDTH, 5)))
        self.config, self.device = {"model_type": "none"}, torch.device("cpu")
        self.to(dtype).requires_grad_(False)

    def forward(self, x):
        return self.down(self.up(x).tanh())


def dense(toy, updates, x):
    """The same with weights W + updates[path]."""
    for path in ("up", "down"):
        linear = getattr(toy, path)
        x = x @ (linear.weight + updates[path]).T + linear.bias
        x = x.tanh() if path == "up" else x
    return x


def make(name, toy=None, **settings):
    prefix = "lora_" if name in ONE_LORA else ""
    sizes = {"r": R, f"{prefix}alpha": SCALING * R, f"{prefix}dropout": 0.0}
    return make_method(
        name, toy or Toy(), ({} if name == "zero-shot" else sizes) | {"target_modules": TARGETS} | settings
    )


def no_batches(samples, size=None):
    raise AssertionError("no batches are wanted")


@torch.no_grad()
def learn(method, task, end=True):
    """Train a task: new values for all that learns, where the optimiser would write them."""
    for stage in method.stages(task) or [None]:
        if stage is None:
            method.add(task)
            continue
        method.begin(stage, no_batches)
        for p in method.model.parameters():
            if p.requires_grad:
                p.copy_(0.4 * torch.randn_like(p))
        if end:
            method.end(stage, no_batches)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def close(got, want, tolerance=1e-10):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max().clamp_min(1e-3)


def loss_of(method, share=0.25):
    """(the loss beside a cross entropy, that cross entropy)."""
    ce = torch.randn((), dtype=torch.float64)
    return method.loss({}, lambda: (ce, None), share), ce


def same_gradients(got, wanted, parameters, own_leaves):
    pairs = zip(
        torch.autograd.grad(got, parameters, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(wanted, own_leaves, allow_unused=True, materialize_grads=True),
        strict=True,
    )
    for one, other in pairs:
        close(one, other)


# --- N-LoRA and SEFE ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [False, True])
def test_the_l1_norm_of_an_update_is_that_of_the_dense_matrix(counted, monkeypatch):
    monkeypatch.setattr(update_norm, "ROWS", 5)
    b, a = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((13, R), (R, 7)))
    counts = torch.randint(4, (13, 7), dtype=torch.int16) if counted else None
    with torch.autocast("cpu", torch.bfloat16):
        norm = update_norm.update_l1(b, a, counts)
    wanted = sum(
        (1 if counts is None else counts[n, k].item()) * sum(b[n, r] * a[r, k] for r in range(R)).abs()
        for n in range(13)
        for k in range(7)
    )
    close(norm, wanted)
    same_gradients(3 * norm, 3 * wanted, [b, a], [b, a])
    low = update_norm.update_l1(b.to(torch.bfloat16), a.to(torch.bfloat16), counts)
    assert low.dtype == torch.float32
    close(low.double(), wanted, 0.02)


@pytest.mark.parametrize("product", ["update", "inner"])
def test_nlora_adds_the_l1_norm_of_the_newest_lora_alone(product):
    method = make("nlora", Toy(hidden=WIDTH), l1=0.3, product=product, target_modules="up|down")
    for task in ("first", "second"):
        learn(method, task)
        parameters = [t for layer in method.layers.values() for t in layer.part("new")]
        own = leaves(*parameters)
        loss, ce = loss_of(method)
        wanted = ce
        for a, b in zip(own[::2], own[1::2], strict=True):
            matrix = b @ a if product == "update" else a @ b
            wanted = wanted + 0.25 * 0.3 * sum(entry.abs() for entry in matrix.flatten())
        close(loss, wanted)
        same_gradients(loss, wanted, parameters, own)
    method = make("nlora", l1=0.0)
    learn(method, "first")
    loss, ce = loss_of(method)
    assert loss is ce


def test_nlora_as_released_is_refused_where_a_b_does_not_exist():
    toy = Toy()
    modules = dict(toy.named_modules())
    with pytest.raises(
        UserError, match="up has 9 inputs and 12 outputs, where A B does not exist; give product=update"
    ):
        make("nlora", toy, **METHODS["nlora"].presets["released"])
    assert dict(toy.named_modules()) == modules


@pytest.mark.parametrize("scaled", [True, False])
def test_sefe_penalises_the_key_elements_of_every_earlier_update(scaled):
    share = 0.15
    method = make("sefe", penalty=3.0, share=share, scaled=scaled)
    updates = {path: [] for path in method.layers}  # of the earlier tasks
    for task in ("first", "second", "third"):
        learn(method, task)
        parameters = [t for layer in method.layers.values() for t in layer.part("new")]
        own = leaves(*parameters)
        loss, ce = loss_of(method)
        wanted = ce
        for path, a, b in zip(method.layers, own[::2], own[1::2], strict=True):
            keys = []
            for earlier in updates[path]:  # places of the largest elements, one by one
                order = sorted(range(earlier.numel()), key=lambda i, e=earlier: -abs(e.flatten()[i].item()))
                keys += order[: int(share * earlier.numel())]
            update = (SCALING if scaled else 1) * b @ a
            if keys:
                mean = sum(update.flatten()[i].abs() for i in keys) / len(keys)
                wanted = wanted + 0.25 * 3.0 * mean / len(method.layers)
            updates[path].append(update.detach())
        close(loss, wanted)
        assert (loss > ce) == (task != "first")
        if task != "first":
            same_gradients(loss, wanted, parameters, own)


# --- SLAO ---------------------------------------------------------------------------------------------------------------


def gram_schmidt(rows):
    """Orthonormal rows by the textbook: each row without what lies in the ones before."""
    basis = []
    for row in rows:
        for other in basis:
            row = row - (row @ other) * other
        basis.append(row / row.norm())
    return torch.stack(basis)


def test_slao_begins_in_an_orthonormal_basis_and_moves_b_by_a_root_of_the_task():
    method = make("slao")
    merged, last = {}, {}
    for t, task in enumerate(("first", "second", "third"), 1):
        method.begin(Stage("learn", task), no_batches)
        for name, tensor in method.lora().items():
            if t > 1:
                close(tensor, gram_schmidt(last[name]) if name.endswith(".A") else last[name])
        with torch.no_grad():
            for tensor in method.lora().values():
                tensor += 0.4 * torch.randn_like(tensor)
        last = {name: tensor.detach().clone() for name, tensor in method.lora().items()}
        method.end(Stage("learn", task), no_batches)
        for name, tensor in last.items():
            if name.endswith(".A") or t == 1:
                merged[name] = tensor
            else:
                merged[name] = merged[name] + (tensor - merged[name]) / math.sqrt(t)
            close(method.lora()[name], merged[name])


def test_slao_goes_on_from_a_bank_with_b_as_it_was_trained():
    method = make("slao")
    for task in ("first", "second"):
        learn(method, task)
    again = make("slao")
    again.restore({task: method.tensors(task) for task in ("first", "second")})
    for m in (method, again):
        torch.manual_seed(5)
        learn(m, "third")
    assert again.fingerprints(["third"]) == method.fingerprints(["third"])


def test_slao_wants_as_many_inputs_as_ranks():
    with pytest.raises(UserError, match=r"slao: r is 10 and up has 9 inputs"):
        learn(make("slao", r=10), "first")


# --- C-LoRA -------------------------------------------------------------------------------------------------------------


def test_clora_routes_between_a_and_u_and_keeps_the_sum_of_all_routes():
    method = make("clora", orthogonality=0.7)
    old = dict.fromkeys(("up", "down", "idle"), torch.eye(R, dtype=torch.float64))
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    for t, task in enumerate(("first", "second", "third"), 1):
        before = method.model(x) if t > 1 else None
        method.begin(Stage("learn", task), no_batches)
        if t > 1:
            assert torch.equal(method.model(x), before)
        with torch.no_grad():
            for p in method.model.parameters():
                if p.requires_grad:
                    p += 0.3 * torch.randn_like(p)
        lora, downs = method.lora(), method.downs()
        parameters = [p for path in old for p in (lora[f"{path}.A"], lora[f"{path}.B0"], downs[path].route)]
        own = leaves(*parameters)
        parts = dict(zip(old, zip(own[::3], own[1::3], own[2::3], strict=True), strict=True))
        updates = {path: SCALING * u @ (old[path] + route) @ a for path, (a, u, route) in parts.items()}
        dy = torch.randn(5, WIDTH, dtype=torch.float64)
        got, wanted = method.model(x), dense(Toy(), updates, x)
        close(got, wanted)
        same_gradients((got * dy).sum(), (wanted * dy).sum(), parameters, own)
        loss, ce = loss_of(method)
        penalty = sum(((a.T @ route) ** 2).sum() for a, _, route in parts.values())
        wanted = ce + (0.25 * 0.7 * penalty if t > 1 else 0)
        close(loss, wanted)
        if t > 1:
            same_gradients(loss, wanted, parameters, own)
        method.end(Stage("learn", task), no_batches)
        close(method.model(x), got)
        for path, (_, _, route) in parts.items():
            old[path] = old[path] + route.detach()
            close(method.tensors(task)[1][f"state.{path}.R"], old[path])


# --- joint, replay, zero-shot -------------------------------------------------------------------------------------------


def test_what_is_trained_when():
    for name, wanted in (("joint", [1, 0, 0]), ("replay", [1, 1, 1]), ("zero-shot", [0, 0, 0])):
        method, counts = make(name), []
        for task in ("first", "second", "third"):
            counts.append(len(method.stages(task)))
            learn(method, task)
        assert counts == wanted
    replay = make("replay", memory=7, share=0.25)
    assert replay.stages("first") == [Stage("learn", "first")]
    learn(replay, "first")
    assert replay.stages("second") == [Stage("learn", "second", replayed=0.25, memory=7)]


def test_zero_shot_is_the_base_model():
    method, x = make("zero-shot"), torch.randn(3, WIDTH, dtype=torch.float64)
    learn(method, "first")
    method.activate("first", train=True)
    assert method.model is method.base
    assert not any(p.requires_grad for p in method.model.parameters())
    assert torch.equal(method.model(x), Toy()(x))
    assert method.parameters() == 0


# --- all ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_bank_restores_and_exports_what_was_trained(name, tmp_path):
    toy = Toy(torch.float32)
    identity = BaseModelId.of(toy, "toy")
    method, x = make(name, toy), torch.randn(6, WIDTH)
    bank = Bank.create(tmp_path, config={"method": name, "settings": method.settings, "train": {}}, base_model=identity)
    for task in ("first", "second", "third"):
        learn(method, task)
        bank.add_task(task, *method.tensors(task), replaces=method.one_state)
    assert BaseModelId.of(method.model, "toy") == identity
    wanted = method.model.eval()(x)
    again = make_method(name, Toy(torch.float32), bank.config["settings"])
    again.restore(bank.load_tasks())
    again.activate("third", train=False)
    assert torch.equal(again.model.eval()(x), wanted)
    assert again.fingerprints(bank.tasks) == method.fingerprints(bank.tasks)
    if name == "zero-shot":
        with pytest.raises(UserError, match="a task of zero-shot is no plain LoRA: nothing is trained"):
            METHODS[name].as_lora(bank, "third")
        return
    assert (wanted - Toy(torch.float32)(x)).abs().max() > 0.1
    lora = METHODS[name].as_lora(bank, "third")
    updates = {path: lora.scaling * b @ a for path, (a, b) in lora.factors.items()}
    torch.testing.assert_close(dense(Toy(torch.float32), updates, x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_random_number_is_drawn_at_the_beginning_of_a_task(name):
    ends = []
    for drawn in (0, 5):
        toy = Toy()
        torch.rand(drawn)
        method = make(name, toy)
        torch.manual_seed(2)
        learn(method, "first", end=False)
        ends.append(method.fingerprints(["first"]))
    assert ends[0] == ends[1]


BAD = {
    "replay": [("memory", 0), ("share", 0), ("share", 1), ("share", "half")],
    "nlora": [("l1", -1), ("product", "outer"), ("dropout", 1), ("orthogonality", 0.5)],
    "sefe": [("penalty", float("nan")), ("share", 0), ("share", 1.5)],
    "clora": [("orthogonality", -0.5), ("r", 0)],
    "slao": [("lora_dropout", 1)],
    "joint": [("memory", 4)],
    "zero-shot": [("alpha", 2)],
}


@pytest.mark.parametrize(("name", "key", "value"), [(name, *pair) for name, pairs in BAD.items() for pair in pairs])
def test_a_wrong_setting_is_one_sentence(name, key, value):
    with pytest.raises(UserError, match=rf"{name}.*{key}") as caught:
        make(name, **{key: value})
    assert "\n" not in str(caught.value)
