"""`lilora::delta_pair`: two adapters (and, if given, their frozen bases) of one x, as gate_proj and up_proj of an MLP."""

from ... import backends
from .. import cpu_backend, triton_runtime
from ..adapter_operation import AdapterOperation
from ..checks import check_pair
from ..schema import FACTORS, kinds_of
from . import eager

backends.register(
    "delta_pair",
    eager=backends.Implementation(eager.forward, eager.backward, lambda *_: None, backends.COMPOSED),
    cpu=cpu_backend.implementation("delta_pair", eager),
    triton=backends.lazy(
        "lilora_kernels.ops.delta_pair.triton_backend", triton_runtime.unsupported_reason, triton_runtime.PAIR_PLANS
    ),
)

OWN = [{f"weight{side}": "Tensor?", f"bias{side}": "Tensor?", **kinds_of(FACTORS, side)} for side in ("_1", "_2")]
SHARED = kinds_of(("task", "seed", "scaling", "p", "ranks"))
delta_pair = AdapterOperation("delta_pair", {"x": "Tensor", **OWN[0], **OWN[1], **SHARED}, check_pair).op
