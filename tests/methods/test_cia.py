"""The moving average of CIA against its formula, element by element in fp64."""

import pytest
import torch
from support.toy import begin, close, end, make, restored, same_function, sample, train

from lilora.methods import Stage


def norm(tensor):
    return sum(abs(x) for x in tensor.flatten().tolist())


@pytest.mark.parametrize("start", ["task", "step"])
def test_the_average_follows_the_formula_and_is_what_a_task_leaves(start):
    method = make("cia", share=0.125, start=start)
    begin(method, "first")
    train(method, 2)
    ended = {name: p.detach().clone() for name, p in method.lora().items()}
    assert not method.progress()
    end(method, "first")
    assert all(torch.equal(p, ended[name]) for name, p in method.lora().items())  # no average in the first task
    method.begin(Stage("learn", "second"), None)
    average, last, shares = ended, {}, set()
    optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=40.0)
    for step in range(1, 7):
        inputs = sample()
        method.loss(inputs, lambda inputs=inputs: (method.model(**inputs).loss, None), 1.0).backward()
        optimizer.step()
        for name, p in method.lora().items():
            if name.startswith("idle"):
                assert p.grad is None
                continue
            share = 0.125
            if step > 1:
                bottom = norm(p.data - average[name]) * norm(p.grad - last[name])
                found = 2 * (1 + norm(p.grad)) / bottom if bottom else 0
                share = found if 0 < found < 1 else share
            shares.add(share == 0.125)
            if step == 1 and start == "step":
                average[name] = p.data.clone()
            average[name] = (1 - share) * average[name] + share * p.data
            last[name] = p.grad.clone()
        with torch.no_grad():
            method.after_step(step, 6, optimizer)
        optimizer.zero_grad()
    assert shares == {True, False}
    for name, want in average.items():
        close(method.progress()[f"average.{name}"], want)
    end(method, "second")
    for name, p in method.lora().items():
        close(p, average[name])


def test_a_bank_gives_the_same_function():
    method = make("cia")
    for task in ("first", "second"):
        begin(method, task)
        train(method, 3)
        end(method, task)
    same_function(method, restored(method))
