"""The CPU kernels for few rows; the composed plan for others and for all gradients."""

from torch import Tensor

from .. import cpu_runtime
from ..schema import AdapterArgs
from . import eager


def forward(x: Tensor, adapter: AdapterArgs) -> tuple[Tensor, Tensor]:
    found = cpu_runtime.forward("delta", x, (adapter,))
    return eager.forward(x, adapter) if found is None else found[0]
