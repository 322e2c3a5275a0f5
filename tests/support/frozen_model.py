"""A small model of two adapted layers with three tasks, to be frozen, and what its tests ask of it."""

import torch
from torch import nn

from lilora_kernels import LiLoRALinear, attach
from support.tiny_llava import randomise

K, N = 12, 12


class Model(nn.Sequential):
    """x [B, L, K] -> [B, L, N]."""

    def forward(self, x):
        return super().forward(x)


def made(tasks=("a", "b", "c"), **options):
    torch.manual_seed(0)
    options = {"r": 4, "sub_rank": 2, "dropout": 0.0} | options
    model = Model(*(LiLoRALinear(nn.Linear(K, N).requires_grad_(False), **options) for _ in range(2)))
    for layer in model:
        for task in tasks:
            layer.add_task(task)
    randomise(model)
    attach(model)
    return model.eval()


def run(model, names, x):
    with torch.no_grad():
        return model(x, task_ids=names)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


NAMES = ["c", None, "a", "c"]
X = torch.randn(4, 3, K, generator=torch.Generator().manual_seed(1))
