"""What every implementation of `delta` and `linear` receives."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Inputs that may want a gradient, in the order in which the backward operations return them.
DIFFERENTIABLE = ("x", "a", "b0", "u", "v", "fusion", "gate")


@dataclass(frozen=True)
class Call:
    """The adapter's side of one call; shapes in ops/README.md."""

    a: Tensor
    b0: Tensor
    u: Tensor | None
    v: Tensor | None
    fusion: Tensor | None
    task: Tensor | None
    gate: Tensor | None
    gate_row: Tensor | None
    seed: Tensor | None
    scaling: float
    p: float
    ranks: Sequence[int] | None

    @property
    def rank_sizes(self) -> tuple[int, int]:
        """R, and S or 0 without task factors."""
        return self.a.shape[0], 0 if self.u is None else self.u.shape[2]
