"""Launches the Triton kernel of `rank_gate`."""

import torch
from torch import Tensor

from . import triton_kernels as kernels

CONSTANTS = {"BLOCK": 64, "num_warps": 8}


def forward(scores: Tensor, r: int) -> tuple[Tensor, Tensor]:
    rows, n = scores.shape
    gate, chosen = scores.new_empty(rows, n), scores.new_empty(rows, r, dtype=torch.int64)
    if rows > 0:
        grid = rows, -(-n // CONSTANTS["BLOCK"])
        with torch.cuda.device_of(scores):
            kernels.rank_gate[grid](scores, gate, chosen, n, r, *scores.stride(), **CONSTANTS)
    return gate, chosen
