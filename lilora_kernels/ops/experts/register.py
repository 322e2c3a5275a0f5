"""`lilora::expert_linear`: the frozen linears of routed experts and their adapters in one operation."""

from ... import backends
from ..adapter_operation import AdapterOperation
from ..checks import check_expert_linear
from ..schema import FACTORS, kinds_of
from . import eager

backends.register(
    "expert_linear", eager=backends.Implementation(eager.forward, eager.backward, lambda *_: None, backends.COMPOSED)
)

KINDS = {"x": "Tensor", "weight": "Tensor", "ends": "Tensor", **kinds_of((*FACTORS, "seed", "scaling", "p"))}
KINDS |= {"u": "Tensor", "v": "Tensor"}
expert_linear = AdapterOperation("expert_linear", KINDS, check_expert_linear).op
