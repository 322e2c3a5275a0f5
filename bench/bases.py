"""The frozen layer alone by others than F.linear: inference on a CPU, from a weight that each lays out as it likes."""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from lilora_kernels.layers import accelerated as unadapted

from .peers import Built, Peer, Unavailable, base_alone
from .problems import Operands

Run = tuple[Callable[[], object], Tensor]
"""What writes y into this tensor."""


def streamed(sets: list[Operands], training: bool) -> Built:
    """As `accelerate_linears` computes it."""
    calls = [unadapted.bound(s.x, s.weight, None) for s in sets]
    if calls[0] is None or calls[0](sets[0].x) is None:
        raise Unavailable("our CPU kernels do not take it")
    return base_alone(sets, lambda at: calls[at](sets[at].x))


def onednn(sets: list[Operands], training: bool) -> Built:
    """As the compiler of torch packs a frozen linear for oneDNN."""
    operations = torch.ops.mkldnn
    packed = [prepacked(operations, "_reorder_linear_weight", s) for s in sets]
    return base_alone(sets, lambda at: operations._linear_pointwise(sets[at].x, packed[at], None, "none", [], ""))


def mkl(sets: list[Operands], training: bool) -> Built:
    """As the compiler of torch packs a frozen linear for MKL."""
    rows, operations = sets[0].problem.rows, torch.ops.mkl
    packed = [prepacked(operations, "_mkl_reorder_linear_weight", s) for s in sets]
    return base_alone(sets, lambda at: operations._mkl_linear(sets[at].x, packed[at], sets[at].weight, None, rows))


def prepacked(operations: object, name: str, s: Operands) -> Tensor:
    try:
        return getattr(operations, name)(s.weight, s.problem.rows)
    except (AttributeError, RuntimeError) as error:
        raise Unavailable(f"torch does not prepack it here: {str(error).splitlines()[0]}") from error


def openvino(sets: list[Operands], training: bool) -> Built:
    library, opset = package("openvino", sets), package("openvino.opset13", sets)
    core = library.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}

    def compiled(s: Operands) -> Run:
        x = opset.parameter(list(s.x.shape), library.Type.f32)
        product = opset.matmul(x, opset.constant(s.weight.numpy()), False, True)
        request = core.compile_model(library.Model([product], [x]), "CPU", settings).create_infer_request()
        y = unwritten(s)
        request.set_input_tensor(library.Tensor(s.x.detach().numpy(), shared_memory=True))
        request.set_output_tensor(library.Tensor(y.numpy(), shared_memory=True))
        return request.infer, y

    return of_runs(sets, compiled)


def onnxruntime(sets: list[Operands], training: bool) -> Built:
    library, onnx = package("onnxruntime", sets), package("onnx", sets)
    options = library.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else it slows whoever comes next

    def session(s: Operands) -> Run:
        y = unwritten(s)
        given, wanted = (
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(tensor.shape))
            for name, tensor in (("x", s.x), ("y", y))
        )
        weight = onnx.numpy_helper.from_array(s.weight.numpy(), "weight")
        product = onnx.helper.make_node("Gemm", ["x", "weight"], ["y"], transB=1)
        graph = onnx.helper.make_graph([product], "linear", [given], [wanted], [weight])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
        opened = library.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        binding, kind = opened.io_binding(), s.x.detach().numpy().dtype
        binding.bind_input("x", "cpu", 0, kind, list(s.x.shape), s.x.data_ptr())
        binding.bind_output("y", "cpu", 0, kind, list(y.shape), y.data_ptr())
        return lambda: opened.run_with_iobinding(binding), y

    return of_runs(sets, session)


def package(name: str, sets: list[Operands]) -> ModuleType:
    if sets[0].x.dtype != torch.float32:
        raise Unavailable("it is compared in fp32 only")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error


def unwritten(s: Operands) -> Tensor:
    return torch.full((s.problem.rows, s.problem.outputs), torch.nan)


def of_runs(sets: list[Operands], prepare: Callable[[Operands], Run]) -> Built:
    runs = [prepare(s) for s in sets]

    def forward(at: int) -> Tensor:
        run, y = runs[at]
        run()
        return y

    return base_alone(sets, forward)


BASES = {
    "base_streamed": Peer("frozen base, our CPU kernels", streamed),
    "base_onednn": Peer("frozen base, prepacked for oneDNN", onednn),
    "base_mkl": Peer("frozen base, prepacked for MKL", mkl),
    "base_openvino": Peer("frozen base, OpenVINO", openvino),
    "base_onnxruntime": Peer("frozen base, ONNX Runtime", onnxruntime),
}
