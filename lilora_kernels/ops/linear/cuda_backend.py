"""For few rows the kernels stream the base weight too; for more they write the adapter's part and cuBLAS adds the base's."""

from torch import Tensor

from ..call import Call
from ..delta import cuda_backend as delta

DECODE_ROWS = 64  # up to here a launch for each phase, base included, each starting while the one before it ends
ONE_LAUNCH_ROWS = 255  # up to here, and in backward, all phases of the adapter in one launch


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    weight = weight.to(x.dtype)
    if x.shape[0] <= DECODE_ROWS:
        return delta.run_forward(x, bias, call, False, weight)
    y, h = delta.run_forward(x, bias, call, one_launch(x))
    return y.addmm_(x, weight.T), h


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, h: Tensor | None, call: Call, needs: frozenset[str]
) -> dict[str, Tensor]:
    grads = delta.run_backward(dy, x, h, call, needs, one_launch(dy))
    if "x" in needs:
        grads["x"].addmm_(dy, weight.to(dy.dtype))
    return grads


def one_launch(rows: Tensor) -> bool:
    """Few rows leave a processor nothing to do but to wait for launches."""
    return rows.shape[0] <= ONE_LAUNCH_ROWS
