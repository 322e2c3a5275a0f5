"""`lilora::linear`: the frozen base linear and its adapter in one operation."""

from ... import backends
from .. import cpu_runtime, cuda_runtime, recorded, triton_runtime
from ..checks import check_linear
from ..schema import AdapterArgs, AdapterOperation, kinds_of
from . import cpu_backend, eager

PLANS = {"one_launch": f"up to {backends.ONE_LAUNCH_ROWS} rows", "by_phase": "beyond"}

backends.register(
    "linear",
    eager=backends.Implementation(
        eager.forward, eager.backward, lambda *_: None, backends.COMPOSED | recorded.PLAN, bind_recorded=recorded.bind
    ),
    cpu=backends.Implementation(
        cpu_backend.forward,
        eager.backward,
        cpu_runtime.refusal,
        cpu_runtime.PLANS | recorded.PLAN,
        bind=cpu_runtime.bind,
        bind_recorded=recorded.bind,
    ),
    cuda=backends.lazy(
        "lilora_kernels.ops.linear.cuda_backend",
        cuda_runtime.refusal,
        {
            "decode": f"up to {cuda_runtime.DECODE_ROWS} rows",
            **PLANS,
            "fused": f"from {cuda_runtime.FUSED_ROWS} rows on sm_90a where it fits, as modelled and not yet measured",
        },
    ),
    triton=backends.lazy("lilora_kernels.ops.linear.triton_backend", triton_runtime.refusal, triton_runtime.PLANS),
)

BASE = {"weight": "Tensor", "bias": "Tensor?"}
linear = AdapterOperation("linear", {"x": "Tensor", **BASE, **kinds_of(AdapterArgs._fields)}, check_linear).op
