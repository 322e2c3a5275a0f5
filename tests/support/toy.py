"""A next-token model of two linears in fp64, and what tests do with a method on it."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from lilora.methods import Stage, make_method

VOCABULARY, WIDTH, HIDDEN, R, SCALING = 11, 7, 9, 4, 2.0
TARGETS = r"(up|down|idle)"


class Toy(nn.Module):
    """With the loss of a HuggingFace model; `idle` is used by no sample."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.down, self.idle = (nn.Linear(*size) for size in ((WIDTH, HIDDEN), (HIDDEN, WIDTH), (WIDTH, 3)))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.double().requires_grad_(False)

    @property
    def device(self):
        return self.head.weight.device

    def forward(self, input_ids, labels=None):
        logits = self.head(self.down(self.up(self.embedding(input_ids)).tanh()))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def make(name, seed=1, **settings):
    """A method on a toy, with the scale SCALING and no dropout."""
    torch.manual_seed(seed)
    prefix = "lora_" if name in ("cia", "ortholora") else ""
    sizes = {"r": R, f"{prefix}alpha": SCALING * R, f"{prefix}dropout": 0.0, "target_modules": TARGETS}
    return make_method(name, Toy(), sizes | settings)


def no_batches(samples, size=None):
    raise AssertionError("no batches are wanted")


@torch.no_grad()
def randomise(method):
    """New values for all that trains, where the optimizer would write them."""
    for p in method.model.parameters():
        if p.requires_grad:
            p.copy_(0.4 * torch.randn_like(p))


def begin(method, task):
    method.begin(Stage("learn", task), no_batches)
    randomise(method)


def end(method, task):
    method.end(Stage("learn", task), no_batches)


def sample(rows=2, length=8):
    input_ids = torch.randint(VOCABULARY, (rows, length))
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def train(method, steps, lr=0.05, until=None):
    """As the Trainer does: the first `until` of `steps` steps on random samples; returns the optimizer."""
    made = torch.optim.AdamW([p for p in method.model.parameters() if p.requires_grad], lr=lr)
    method.model.train()
    for step in range(1, (until or steps) + 1):
        inputs = sample()
        method.loss(inputs, lambda inputs=inputs: ((out := method.model(**inputs)).loss, out), 1.0).backward()
        made.step()
        with torch.no_grad():
            method.after_step(step, steps, made)
        made.zero_grad()
    return made


def restored(method, **settings):
    """A new method from what a bank would hold of this one."""
    again = make(method.name, **settings)
    stored = method.tensors(method.tasks[-1])
    again.restore(
        {task: tuple({n: t.detach().clone() for n, t in part.items()} for part in stored) for task in method.tasks}
    )
    return again


def same_function(one, other):
    inputs = sample()
    with torch.no_grad():
        logits = [m.model.eval()(inputs["input_ids"]).logits for m in (one, other)]
    assert torch.equal(*logits)


def close(got, want, tolerance=1e-9):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max().clamp_min(1e-3)
