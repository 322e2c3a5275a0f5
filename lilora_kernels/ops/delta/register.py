"""`lilora::delta`: the adapter alone."""

from ... import backends
from .. import cpu_backend, cpu_training, cuda_runtime, triton_runtime
from ..adapter_operation import AdapterOperation
from ..checks import check_delta
from ..schema import AdapterArgs, kinds_of
from . import eager

backends.register(
    "delta",
    eager=backends.Implementation(eager.forward, eager.backward, lambda *_: None, backends.COMPOSED),
    cpu=cpu_backend.implementation("delta", eager, bind_gradients=cpu_training.bind),
    cuda=backends.lazy("lilora_kernels.ops.delta.cuda_backend", cuda_runtime.unsupported_reason, cuda_runtime.PLANS),
    triton=backends.lazy(
        "lilora_kernels.ops.delta.triton_backend", triton_runtime.unsupported_reason, triton_runtime.PLANS
    ),
)

delta = AdapterOperation("delta", {"x": "Tensor", **kinds_of(AdapterArgs._fields)}, check_delta).op
