"""`lilora::delta_pair`: two adapters (and, if given, their frozen bases) of one x, as gate_proj and up_proj of an MLP."""

from ... import backends
from .. import cpu_runtime, cpu_training, triton_runtime
from ..adapter_operation import AdapterOperation
from ..checks import check_pair
from ..schema import FACTORS, kinds_of
from . import cpu_backend, eager

backends.register(
    "delta_pair",
    eager=backends.Implementation(eager.forward, eager.backward, lambda *_: None, backends.COMPOSED),
    cpu=backends.Implementation(
        cpu_backend.forward,
        cpu_backend.backward,
        cpu_runtime.unsupported_reason,
        cpu_runtime.PLANS | cpu_training.PLAN,
        bind=cpu_training.bind_forward,
    ),
    triton=backends.lazy(
        "lilora_kernels.ops.delta_pair.triton_backend", triton_runtime.unsupported_reason, triton_runtime.PAIR_PLANS
    ),
)

OWN = [{f"weight{side}": "Tensor?", f"bias{side}": "Tensor?", **kinds_of(FACTORS, side)} for side in ("_1", "_2")]
SHARED = kinds_of(("task", "seed", "scaling", "p", "ranks"))
delta_pair = AdapterOperation("delta_pair", {"x": "Tensor", **OWN[0], **OWN[1], **SHARED}, check_pair).op
