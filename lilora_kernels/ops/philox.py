"""The dropout stream shared by every backend, in plain torch operations. ops/README.md is its written form."""

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW32 = 0xFFFFFFFF
ROUNDS = 7


def threshold(p: float) -> int:
    """Draws below this 16-bit value are dropped: p < 1 rounded to a multiple of 2^-16, itself below 1."""
    return min(round(p * 65536), 65535)


def keep_scale(p: float) -> float:
    """1 / (share of kept elements), with p as the stream rounds it."""
    return 65536 / (65536 - threshold(p))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-7 on int64 tensors that hold unsigned 32-bit words; all broadcast against each other.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The int64 product wraps, yet its 64 bits are those of the unsigned product.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> 32 & _LOW32) ^ c1 ^ k0, p1 & _LOW32, (p0 >> 32 & _LOW32) ^ c3 ^ k1, p0 & _LOW32
        k0, k1 = k0 + _W0 & _LOW32, k1 + _W1 & _LOW32
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Which elements of a [rows, columns] input the adapter keeps; bool, on the device of `seed` (int64, one element)."""
    device = seed.device
    row = torch.arange(rows, device=device).unsqueeze(1)
    block = torch.arange((columns + 7) // 8, device=device).unsqueeze(0)
    seed = seed.reshape(())
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox((row & _LOW32, row >> 32, block, zero), (seed & _LOW32, seed >> 32 & _LOW32))
    # Low half first; compared at once, so that no 64-bit tensor of the input's size is ever made.
    keep = [half >= threshold(p) for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(torch.broadcast_tensors(*keep), dim=-1).flatten(1)[:, :columns]
