"""The CPU kernels for few rows, base product included; the composed plan for others."""

from torch import Tensor

from ... import backends
from .. import cpu_runtime, cpu_training
from ..schema import AdapterArgs
from . import eager


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: AdapterArgs) -> tuple[Tensor, Tensor]:
    found = cpu_runtime.forward("linear", x, (adapter, weight, bias))
    if found is not None:
        return found[0]
    found = cpu_training.forward(x, weight, bias, adapter) if backends.forced["plan"] == "one_launch" else None
    return eager.forward(x, weight, bias, adapter) if found is None else found


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str]
) -> dict[str, Tensor]:
    found = cpu_training.backward(dy, x, weight, h, adapter, needs)
    return eager.backward(dy, x, weight, h, adapter, needs) if found is None else found
