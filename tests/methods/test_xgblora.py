"""XGBLoRA against boosters that are merged one after another into dense weights, in fp64."""

import copy
from types import SimpleNamespace

import torch
from support.toy import SCALING, R, Toy, begin, close, end, make, same_function, sample

from lilora.methods import METHODS, Stage

STEPS = 10  # of R = 4 boosters: 2, 3, 2 and 3 steps


def test_each_booster_is_trained_by_an_optimizer_of_its_own_on_a_model_with_those_before_it():
    method = make("xgblora")
    plain = copy.deepcopy(method.model)
    for task in ("first", "second"):
        method.begin(Stage("learn", task), None)
        starts = {path: layer.part("old")[0].detach().clone() for path, layer in method.layers.items()}
        dense = {path: plain.get_submodule(path).base_layer.weight.clone() for path in method.layers}
        optimizer = torch.optim.AdamW([p for p in method.model.parameters() if p.requires_grad], lr=0.05)
        assert len(optimizer.param_groups[0]["params"]) == 6
        own, booster = {}, -1
        for step in range(1, STEPS + 1):
            if (step - 1) * R // STEPS > booster:  # merge, and start the next
                booster += 1
                for path, pair in own.items():
                    dense[path] += SCALING * (pair[1] @ pair[0]).detach()
                own = {
                    p: (starts[p][booster : booster + 1].clone(), torch.zeros(len(w), 1).double())
                    for p, w in dense.items()
                }
                pairs = [t.requires_grad_() for p in ("up", "down", "idle") for t in own[p]]
                wanted = torch.optim.AdamW(pairs, lr=0.05)
            inputs = sample()
            loss = method.loss(inputs, lambda inputs=inputs: (method.model(**inputs).loss, None), 1.0)
            toy = Toy()
            toy.load_state_dict({n.replace("base_layer.", ""): t for n, t in plain.state_dict().items()})
            weights = {f"{path}.weight": dense[path] + SCALING * b @ a for path, (a, b) in own.items()}
            want = torch.func.functional_call(toy, weights, (), inputs).loss
            close(loss, want)
            for value, made in ((loss, optimizer), (want, wanted)):
                value.backward()
                made.step()
            with torch.no_grad():
                method.after_step(step, STEPS, optimizer)
            optimizer.zero_grad()
            wanted.zero_grad()
        end(method, task)
        for path, layer in method.layers.items():
            final = dense[path] + SCALING * (own[path][1] @ own[path][0]).detach()
            close(layer.base_layer.weight, final)
            assert not layer.lora_A
            plain.get_submodule(path).base_layer.weight.data.copy_(final)


def test_fewer_steps_than_boosters_leave_boosters_out():
    method = make("xgblora")
    begin(method, "first")
    optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=0.1)
    with torch.no_grad():
        for step in (1, 2):
            method.layers["up"].part("new")[1].fill_(step)
            method.after_step(step, 2, optimizer)
    assert method.layers["up"].part("old")[1][0].tolist() == [1, 0, 2, 0]
    assert not method.layers["up"].part("new")[1].any()


def test_a_bank_gives_the_same_function_and_merges_into_a_plain_model():
    method = make("xgblora")
    for task in ("first", "second"):
        begin(method, task)
        for layer in method.layers.values():
            layer.part("old")[1].data.normal_()
        end(method, task)
    assert (method.parameters(), method.ranks()) == (0, 0)
    tasks = {task: method.tensors(task) for task in method.tasks}

    bank = SimpleNamespace(config={"settings": method.settings}, load_tasks=lambda: tasks)
    torch.manual_seed(1)
    merged = Toy()
    METHODS["xgblora"].merge(merged, bank, "second")
    again = make("xgblora")
    again.restore(tasks)
    same_function(method, again)
    assert (
        again.fingerprints(["first"])
        == method.fingerprints(["first"])
        == {"first": method.fingerprints(["second"])["second"]}
    )
    inputs = sample()["input_ids"]
    assert {type(module) for module in merged.modules()} == {type(module) for module in Toy().modules()}
    assert torch.equal(merged(inputs).logits, method.model.eval()(inputs).logits)
