"""AdaLoRA and SoRA against their formulas in fp64, AdaLoRA against PEFT's own."""

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from support.toy import (
    HIDDEN,
    SCALING,
    WIDTH,
    R,
    Toy,
    begin,
    close,
    end,
    make,
    no_batches,
    restored,
    same_function,
    sample,
    train,
)

from lilora.errors import UserError
from lilora.methods import Stage


@pytest.mark.parametrize("name", ["adalora", "sora"])
def test_the_gate_is_a_diagonal_between_the_factors_and_trains(name):
    method = make(name)
    begin(method, "first")
    layer = method.layers["up"]
    own = [*layer.part("ranks"), layer.choose.lora_gate]
    assert sum(p.requires_grad for p in method.model.parameters()) == 9
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    a, b, g = leaves = [t.detach().clone().requires_grad_() for t in own]
    want = x @ (layer.base_layer.weight + SCALING * b @ torch.diag(g) @ a).T + layer.base_layer.bias
    y = layer(x)
    close(y, want)
    gradients = torch.autograd.grad(y, [x, *own], dy), torch.autograd.grad(want, [x, *leaves], dy)
    for got, expected in zip(*gradients, strict=True):
        close(got, expected)


@pytest.mark.parametrize("name", ["adalora", "sora"])
def test_one_lora_goes_on_and_a_bank_gives_the_same_function(name):
    method = make(name)
    begin(method, "first")
    end(method, "first")
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    before, count = method.layers["up"](x), method.parameters()
    method.begin(Stage("learn", "second"), no_batches)
    assert torch.equal(method.layers["up"](x), before)
    assert method.parameters() == count == method.inference_parameters(method.options, [(9, 7), (7, 9), (3, 7)])[0]
    assert method.ranks() == R
    again = restored(method)
    same_function(method, again)
    assert method.fingerprints(["second"]) == again.fingerprints(["second"])


# --- SoRA ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, threshold", [({"sparsity": 3.0}, 0.03), ({"threshold": 0.25}, 0.25)])
def test_sora_pulls_its_gates_to_zero_after_every_step(settings, threshold):
    """What the proximal operator is: the minimiser of (v - g)^2 / 2 + threshold |v|, on a fine grid; in the published code, with
    a fixed threshold, what it leaves below the threshold is 0, too.
    """
    method = make("sora", **settings)
    method.begin(Stage("learn", "first"), no_batches)
    gates = [gate.detach().clone() for gate in method.gates()]
    assert all(len(gate.unique()) == R for gate in gates)
    for p in method.model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=0.01)
    factors = [t.clone() for t in method.layers["up"].part("ranks")]
    with torch.no_grad():
        method.after_step(1, 9, optimizer)
    grid = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    for gate, got in zip(gates, method.gates(), strict=True):
        best = ((grid[:, None] - gate) ** 2 / 2 + threshold * grid.abs()[:, None]).argmin(0)
        best = grid[best]
        if "threshold" in settings:
            best = torch.where(best.abs() < threshold, 0, best)
        assert (got - best).abs().max() <= 1e-4
    assert all(map(torch.equal, factors, method.layers["up"].part("ranks")))


def test_sora_as_released_adds_the_mean_of_its_gates():
    method = make("sora", l1=10.0)
    method.begin(Stage("learn", "first"), no_batches)
    gates, ce = [g.detach().clone().requires_grad_() for g in method.gates()], torch.tensor(0.5, dtype=torch.float64)
    loss = method.loss({}, lambda: (ce, None), 0.25)
    want = ce + 0.25 * 10 * sum(abs(x) for gate in gates for x in gate) / (3 * R)
    close(loss, want)
    for got, expected in zip(torch.autograd.grad(loss, method.gates()), torch.autograd.grad(want, gates), strict=True):
        close(got, expected)
    assert make("sora").loss({}, lambda: (ce, None), 0.25) is ce


def test_sora_loses_the_ranks_that_the_loss_does_not_hold():
    method = make("sora", threshold=0.5)
    method.begin(Stage("learn", "first"), no_batches)
    train(method, 8)
    assert not method.layers["idle"].choose.lora_gate.any()  # no gradient
    assert torch.cat(method.gates()).count_nonzero() < 3 * R


# --- AdaLoRA ------------------------------------------------------------------------------------------------------------

STEPS = 20


def test_adalora_trains_and_prunes_as_peft_does():
    torch.manual_seed(5)
    warmup, final, interval = 0.1, 0.25, 3
    config = AdaLoraConfig(
        init_r=R, target_r=2, lora_alpha=8, lora_dropout=0.0, target_modules="up|down", total_step=STEPS,
        tinit=2, tfinal=5, deltaT=interval, beta1=0.8, beta2=0.9, orth_reg_weight=0.3,
    )  # fmt: skip
    method = make(
        "adalora", alpha=8 * R / (R + 1e-5), target=2, target_modules="up|down", warmup=warmup, final=final,
        interval=interval, smoothing=0.8, uncertainty=0.9, orthogonality=0.3,
    )  # fmt: skip
    toy = Toy()
    toy.load_state_dict(
        {n.replace("base_layer.", ""): t for n, t in method.model.state_dict().items() if "lora_" not in n}
    )
    theirs = get_peft_model(toy, config)
    method.begin(Stage("learn", "first"), no_batches)
    assert not torch.cat(method.gates()).any()
    layers = [(method.layers[path], theirs.base_model.model.get_submodule(path)) for path in ("up", "down")]
    with torch.no_grad():
        for own, other in layers:
            for ours, name in zip(own.part("ranks"), ("lora_A", "lora_B"), strict=True):
                getattr(other, name)["default"].copy_(ours)
            other.ranknum["default"].requires_grad_(False)  # a number, which PEFT 0.21 lets train
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for model in (method.model, theirs)
    ]
    zeros = []
    for step in range(1, STEPS + 1):
        inputs = sample()
        ours = method.loss(inputs, lambda inputs=inputs: ((out := method.model(**inputs)).loss, out), 1.0)
        other = theirs.base_model.forward(**inputs).loss
        close(ours, other)
        for loss, optimizer in zip((ours, other), optimizers, strict=True):
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            method.after_step(step, STEPS, optimizers[0])
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        zeros.append(0)
        for own, peft in layers:
            gate = own.choose.lora_gate
            close(gate, peft.lora_E["default"][:, 0])
            for got, name in zip(own.part("ranks"), ("lora_A", "lora_B"), strict=True):
                close(got, getattr(peft, name)["default"])
            zeros[-1] += int((gate == 0).sum())
    assert zeros[1] == 0
    assert 0 < zeros[5] < zeros[-1] == 2 * R - 2 * 2


def test_adalora_starts_its_budget_and_averages_anew_with_a_task():
    method = make("adalora", target=1, warmup=0.2)
    for task in ("first", "second"):
        method.begin(Stage("learn", task), no_batches)
        assert not any(t.any() for t in method.progress().values())
        train(method, 5, until=1)  # all ranks may come back
        assert torch.cat(method.gates()).count_nonzero() == 2 * R
        train(method, 5)
        assert torch.cat(method.gates()).count_nonzero() <= 3


def test_adalora_allocates_from_the_averages_of_a_checkpoint():
    ends = []
    for resumed in (False, True):
        method = make("adalora", target=1)
        method.begin(Stage("learn", "first"), no_batches)
        train(method, 9, until=4)
        progress = {name: t.clone() for name, t in method.progress().items()}
        assert len(progress) == 2 * 9
        if resumed:
            again = restored(method, target=1)
            again.begin(Stage("learn", "first"), no_batches)
            for name, t in again.progress().items():
                t.copy_(progress[name])
            method = again
        with torch.no_grad():
            method.after_step(8, 9, None)
        ends.append(method.fingerprints(["first"]))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("adalora", {"target": 9}, "target is 9 and r is 4"),
        ("adalora", {"warmup": 0.6, "final": 0.4}, "their sum must be below 1"),
        ("adalora", {"smoothing": 1.0}, "smoothing is 1.0"),
        ("sora", {"sparsity": -1.0}, "sparsity is -1.0"),
    ],
)
def test_a_wrong_setting_is_one_sentence(name, settings, words):
    with pytest.raises(UserError, match=words):
        make(name, **settings)
