"""`lilora::linear`: the frozen base linear and its adapter in one operation."""

from ... import backends
from .. import cpu_runtime, cuda_runtime, recorded, triton_runtime
from ..checks import check_linear
from ..schema import AdapterArgs, AdapterOperation, kinds_of
from . import cpu_backend, eager

backends.register(
    "linear",
    eager=backends.Implementation(
        eager.forward, eager.backward, lambda *_: None, backends.COMPOSED | recorded.PLAN, bind_recorded=recorded.bind
    ),
    cpu=backends.Implementation(
        cpu_backend.forward,
        eager.backward,
        cpu_runtime.unsupported_reason,
        cpu_runtime.PLANS | recorded.PLAN,
        bind=cpu_runtime.bind,
        bind_recorded=recorded.bind,
    ),
    cuda=backends.lazy(
        "lilora_kernels.ops.linear.cuda_backend", cuda_runtime.unsupported_reason, cuda_runtime.LINEAR_PLANS
    ),
    triton=backends.lazy(
        "lilora_kernels.ops.linear.triton_backend", triton_runtime.unsupported_reason, triton_runtime.PLANS
    ),
)

BASE = {"weight": "Tensor", "bias": "Tensor?"}
linear = AdapterOperation("linear", {"x": "Tensor", **BASE, **kinds_of(AdapterArgs._fields)}, check_linear).op
