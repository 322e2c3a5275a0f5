"""Launches the Triton kernel of `rank_gate`."""

import torch
from torch import Tensor

from ..triton_launcher import Launch, current, launch
from . import triton_kernels as kernels

CONSTANTS = {"BLOCK": 64, "num_warps": 8}
MADE = Launch(kernels.rank_gate, CONSTANTS)


def forward(scores: Tensor, r: int) -> tuple[Tensor, Tensor]:
    rows, n = scores.shape
    gate, chosen = scores.new_empty(rows, n), scores.new_empty(rows, r, dtype=torch.int64)
    if rows > 0:
        with current(scores.device):
            grid = rows, -(-n // CONSTANTS["BLOCK"]), 1
            launch(MADE, grid, (scores, gate, chosen), (n, r, *scores.stride()))
    return gate, chosen
