"""`lilora::delta`: the adapter alone."""

from ... import backends
from .. import cuda_runtime, triton_runtime
from ..checks import check_delta
from ..schema import AdapterArgs, AdapterOperation, kinds_of
from . import eager

backends.register(
    "delta",
    eager=backends.Implementation(eager.forward, eager.backward, lambda *_: None, "torch operations"),
    cuda=backends.lazy("lilora_kernels.ops.delta.cuda_backend", cuda_runtime.refusal, "one launch each way"),
    triton=backends.lazy("lilora_kernels.ops.delta.triton_backend", triton_runtime.refusal, "one launch each way"),
)

delta = AdapterOperation("delta", {"x": "Tensor", **kinds_of(AdapterArgs._fields)}, check_delta).op
