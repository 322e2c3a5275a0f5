"""`lilora::linear`: the frozen base linear and its adapter in one operation."""

from ... import backends
from .. import cuda_runtime, triton_runtime
from ..checks import check_linear
from ..schema import AdapterArgs, AdapterOperation, kinds_of
from . import eager

backends.register(
    "linear",
    eager=backends.Implementation(eager.forward, eager.backward, lambda *_: None, "torch operations"),
    cuda=backends.lazy(
        "lilora_kernels.ops.linear.cuda_backend",
        cuda_runtime.refusal,
        "base included up to 64 rows, then cuBLAS and one launch each way, one per phase beyond 255 rows",
        ("decode", "one launch", "by phase", "fused"),
    ),
    triton=backends.lazy(
        "lilora_kernels.ops.linear.triton_backend",
        triton_runtime.refusal,
        "cuBLAS and one launch each way up to 255 rows, one per phase beyond",
        ("one launch", "by phase"),
    ),
)

BASE = {"weight": "Tensor", "bias": "Tensor?"}
linear = AdapterOperation("linear", {"x": "Tensor", **BASE, **kinds_of(AdapterArgs._fields)}, check_linear).op
