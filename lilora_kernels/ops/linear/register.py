"""`lilora::linear`: the frozen base linear and its adapter in one operation."""

from ... import backends
from .. import cpu_backend, cpu_training, cuda_runtime, triton_runtime
from ..adapter_operation import AdapterOperation
from ..checks import check_linear
from ..schema import AdapterArgs, kinds_of
from . import eager

backends.register(
    "linear",
    eager=backends.Implementation(eager.forward, eager.backward, lambda *_: None, backends.COMPOSED),
    cpu=cpu_backend.implementation("linear", eager, bind_gradients=cpu_training.bind),
    cuda=backends.lazy(
        "lilora_kernels.ops.linear.cuda_backend", cuda_runtime.unsupported_reason, cuda_runtime.LINEAR_PLANS
    ),
    triton=backends.lazy(
        "lilora_kernels.ops.linear.triton_backend", triton_runtime.unsupported_reason, triton_runtime.PLANS
    ),
)

BASE = {"weight": "Tensor", "bias": "Tensor?"}
linear = AdapterOperation("linear", {"x": "Tensor", **BASE, **kinds_of(AdapterArgs._fields)}, check_linear).op
