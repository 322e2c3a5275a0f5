"""One adapted layer, what it has to compute by the reference, and a base that is packed."""

import torch
import torch.nn.functional as F
from torch import nn

from lilora_kernels import LiLoRALinear
from lilora_kernels.ops.delta import reference
from support.tiny_llava import randomise

TASKS = ("cats", "dogs", "birds")
K, N, R, S = 24, 20, 8, 4


class Quantised(nn.Module):
    """A base that gives nothing but its forward, as quantised layers do."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = K, N
        self.register_buffer("weight", torch.randint(-8, 8, (N, K), dtype=torch.int8))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) / 8)


def layer(tasks=TASKS, base=None, dtype=torch.float32, dropout=0.0, bias=True, **options):
    base = nn.Linear(K, N, bias=bias, dtype=dtype).requires_grad_(False) if base is None else base
    made = LiLoRALinear(base, r=R, sub_rank=S, alpha=12, dropout=dropout, **options)
    for task in tasks:
        made.add_task(task)
    randomise(made)
    return made


def expected(made, x, name):
    """base_layer(x) plus the reference formula in fp64."""
    y = made.base_layer(x).double()
    if name is None:
        return y
    parameters = [None if p is None else p.detach().double() for p in made._parameters_of(name)]
    a, b0, u, v, fusion = parameters
    delta = reference.delta(x.reshape(-1, K).double(), a, b0, u[None], v[None], fusion, scaling=made.lilora_scaling)
    return y + delta.view(y.shape)


def close(got, wanted, tolerance=1e-5):
    wanted = wanted.detach().to(torch.float64)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.detach().double(), wanted, rtol=0, atol=tolerance * wanted.abs().max().item())
