"""What has to hold for a LiLoRALinear by every plan; each machine's tests run what it has."""

import torch
from torch.utils.checkpoint import checkpoint

from lilora_kernels import LiLoRALinear
from lilora_kernels.ops.delta import reference

TASKS = ("one", "two")
IDS = (0, 1, -1)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}  # of the largest value


def made(device, dtype, dropout=0.0):
    """The same layer and samples [3, 5, 40] at every call."""
    torch.manual_seed(0)
    base = torch.nn.Linear(40, 24).requires_grad_(False)
    layer = LiLoRALinear(base, r=16, sub_rank=8, alpha=32.0, dropout=dropout, train_a="always", train_b0="always")
    for task in TASKS:
        layer.add_task(task)
    layer.set_task(*TASKS)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return layer.to(device, dtype), torch.randn(3, 5, 40).to(device, dtype)


def expected(layer, x, ids):
    """The formula in fp64: y, and the gradients of the mean of its squares to the parameters that learn."""
    wide = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    parts = {
        kind: [wide[f"lilora_{kind}.{task}"] for task in TASKS if f"lilora_{kind}.{task}" in wide]
        for kind in ("A", "B", "U", "V", "fusion")
    }
    u, v, fusion = (torch.stack(parts[kind]) for kind in ("U", "V", "fusion"))
    rows = x.double().flatten(0, 1)
    task = torch.tensor(ids, dtype=torch.int32, device=x.device).repeat_interleave(x.shape[1])
    scaling = layer.lilora_scaling
    d = reference.delta(rows, parts["A"][0], parts["B"][0], u, v, fusion.flatten(), task, scaling=scaling)
    y = (rows @ wide["base_layer.weight"].T + wide["base_layer.bias"] + d).unflatten(0, x.shape[:2])
    learning = {name: p for name, p in wide.items() if p.requires_grad}
    return y, dict(zip(learning, torch.autograd.grad(y.square().mean(), learning.values()), strict=True))


def close(got, want):
    assert (got - want).abs().max() <= TOLERANCE[got.dtype] * want.abs().max()


def one_task(device, dtype=torch.float32):
    layer, x = made(device, dtype)
    want, _ = expected(layer, x, (1, 1, 1))
    layer.set_task("two")
    close(layer.eval()(x), want)


def mixed_batch(device, dtype=torch.float32):
    layer, x = made(device, dtype)
    close(layer.eval()(x, task=torch.tensor(IDS, dtype=torch.int32, device=device)), expected(layer, x, IDS)[0])


def training_step(device, dtype=torch.float32):
    layer, x = made(device, dtype)
    _, gradients = expected(layer, x, IDS)
    layer(x, task=torch.tensor(IDS, dtype=torch.int32, device=device)).square().mean().backward()
    learned_as(layer, gradients)


def learned_as(layer, gradients):
    learned = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert learned.keys() == gradients.keys()
    for name, gradient in gradients.items():
        close(learned[name], gradient)


def training_step_of_one_task(device, dtype=torch.float32):
    layer, x = made(device, dtype)
    _, gradients = expected(layer, x, (0, 0, 0))
    layer.set_task("one")
    for _ in range(2):  # the second call of a layer may take another way
        layer.zero_grad()
        layer(x).square().mean().backward()
    learned_as(layer, {name: g for name, g in gradients.items() if not name.endswith(".two")})


def checkpointing(device, dtype=torch.float32):
    """The recomputation draws the mask of the forward again."""
    found = []
    for recomputed in (False, True):
        layer, x = made(device, dtype, dropout=0.3)
        task, x = torch.tensor(IDS, dtype=torch.int32, device=device), x.requires_grad_()
        y = checkpoint(layer, x, task=task, use_reentrant=False) if recomputed else layer(x, task=task)
        y.square().mean().backward()
        found.append([y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    for got, want in zip(*found, strict=True):
        close(got, want)


CHECKS = (one_task, mixed_batch, training_step, training_step_of_one_task, checkpointing)
