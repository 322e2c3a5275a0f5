"""`lilora::rank_gate`: schema, fake and the choice of a backend."""

import torch
from torch import Tensor

from ... import backends
from .. import triton_runtime
from . import eager

NAME = "lilora::rank_gate"

backends.register(
    "rank_gate",
    # No CUDA C++ kernel: the operation is tiny and runs once per pool and step.
    eager=backends.Implementation(eager.forward, None, lambda *_: None, {}),
    triton=backends.lazy(
        "lilora_kernels.ops.rank_gate.triton_backend",
        lambda scores, *_: triton_runtime.unsupported_reason(scores, 0, 0),  # pools of any size
        {},
    ),
)


def check(scores: Tensor, r: int) -> None:
    if scores.dim() != 2 or scores.shape[1] < 1:
        raise ValueError(f"{NAME}: scores is {list(scores.shape)}; it must be [G, n] with n, the ranks, at least 1")
    if not scores.is_floating_point():
        raise TypeError(f"{NAME}: scores is {scores.dtype}; it must be a floating-point tensor")
    if not 1 <= r <= scores.shape[1]:
        raise ValueError(f"{NAME}: r is {r}; it must be between 1 and n = {scores.shape[1]}, the columns of scores")


@torch.library.custom_op(NAME, mutates_args=())
def rank_gate(scores: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(gate [G, n] in scores' dtype, chosen [G, r] int64); chosen is not differentiable."""
    check(scores, r)
    return backends.choose("rank_gate", scores, r, 0).forward(scores, r)


@rank_gate.register_fake
def _(scores, r):
    check(scores, r)
    return scores.new_empty(scores.shape), scores.new_empty(scores.shape[0], r, dtype=torch.int64)
