"""Linear layers where they run without an adapter, on a CPU by the kernels that adapted ones take."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import backends, cpu_library
from ..functional import autocasts
from ..ops import cpu_runtime, cpu_training
from ..ops.operation import TENSORS, TENSORS_OR_NONE, conditions, is_any_watching, is_transformed, needs_graph
from ..ops.schema import AdapterArgs

# Elements of a weight whose products with prompts are ours: time over torch's 0.7 to 1.0, of smaller ones 1.0 to 1.2
# (bench.small_training, bench/results/small-training); of any where the kernels outrun torch's products, 0.5 to 0.7.
PROMPTS_FROM = 2**22
INVARIANT = (
    "a batch-invariant layer takes the CPU kernels alone, which run without gradients, dropout, autocast, torch.compile and "
    "dispatch modes; use torch.no_grad(), or unfreeze(model)"
)


def accelerate_linears(model: nn.Module) -> dict[str, str | None]:
    """Compute every nn.Linear of `model` that runs without an adapter by the CPU kernels, without gradients.

    Up to 64 rows (bf16 8 where the processor multiplies it itself): torch's own product of few rows runs at a fraction of the
    memory's speed; these kernels read each weight once. In fp32 up to 256 rows of weights of 4 million elements and more, with
    AVX-512 on AMD up to 1024 rows of any. Results are torch's up to rounding, a row's bits the same in any batch of up to 64
    rows that they take, and in any of more. Other calls take torch's product as before: more rows, gradients, autocast,
    torch.compile, another device. So do the bases of adapted layers while no task is active or one is merged. Returns None for
    each layer by its path, or why it was left as it is. Neither parameters nor the state dict are touched: the layers become
    AcceleratedLinear. Quantise a model first. Undone by `restore_linears`.
    """
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            found[path] = None if type(layer) is AcceleratedLinear else unsupported_reason(layer)
            if found[path] is None:
                layer.__class__ = AcceleratedLinear
    return found


def restore_linears(model: nn.Module) -> None:
    """Undo `accelerate_linears`; RuntimeError for a model that is frozen batch-invariant."""
    if any(getattr(module, "batch_invariant", False) for module in model.modules()):
        raise RuntimeError(
            "the model is frozen with batch_invariant=True, which needs these layers; unfreeze(model) first"
        )
    for module in model.modules():
        if type(module) is AcceleratedLinear:
            module.pin(False)
            module.__class__ = nn.Linear


def unsupported_reason(layer: nn.Linear) -> str | None:
    """Why `accelerate_linears` leaves a layer as it is, or None."""
    if not is_plain(layer):
        return f"it is a {type(layer).__name__} of a {type(layer.weight).__name__}"
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    return cpu_runtime.unsupported_reason(layer.weight, 0, 0)


class AcceleratedLinear(nn.Linear):
    """An nn.Linear that takes the CPU kernels; see `accelerate_linears`."""

    # The conditions of the call that is bound, and that call. Always set together: layers serve several threads.
    settled: tuple[list | None, Callable | None] = None, None
    batch_invariant = False  # see `serving.freeze`

    def __getstate__(self) -> dict:
        # A copy's parameters lie elsewhere, and it is not frozen.
        return {name: value for name, value in self.__dict__.items() if name not in ("settled", "batch_invariant")}

    def pin(self, batch_invariant: bool) -> None:
        self.batch_invariant = batch_invariant
        self.__dict__.pop("settled", None)

    def train(self, mode: bool = True) -> "AcceleratedLinear":
        if mode:
            self.pin(False)
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        y, weight, bias = None, self.weight, self.bias
        if not (
            is_transformed()
            or not TENSORS_OR_NONE.issuperset((type(input), type(weight), type(bias)))
            or is_any_watching()
            or input.is_nested
            or not (input.is_cpu and input.layout is weight.layout is torch.strided)
            or not (input.dtype == weight.dtype and input.shape[-1:] == weight.shape[1:])
            or needs_graph(input, weight, bias)
            or autocasts(input)
        ):
            kind, (settled, run) = conditions(weight, bias), self.settled
            if settled != kind:
                run = bound(input, weight, bias, self.batch_invariant)
                self.settled = kind, run
            y = run and run(input)
        if y is None and self.batch_invariant and input.shape[-1:] == weight.shape[1:]:
            raise backends.Unsupported(INVARIANT)
        return super().forward(input) if y is None else y


def bound(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: bool = False) -> Callable | None:
    """A call of the CPU kernels with an adapter of rank 0; None where torch's product, or its error, is wanted."""
    if backends.forced["backend"] not in (None, "cpu") or backends.forced["plan"] not in (None, "decode"):
        return None
    like = weight.dtype, weight.device
    if not weight.is_cpu or (
        bias is not None and ((bias.dtype, bias.device) != like or bias.shape != weight.shape[:1])
    ):
        return None
    if cpu_runtime.unsupported_reason(x, 0, 0) is not None:
        return None
    a, b0 = weight.new_empty(0, weight.shape[1]), weight.new_empty(len(weight), 0)
    adapter = AdapterArgs(a, b0, None, None, None, None, None, None, None, 1.0, 0.0, None)
    row = x.new_empty(1, x.shape[-1])
    if blocks or (weight.numel() < PROMPTS_FROM and not getattr(cpu_library.load(), "outruns", False)):
        return cpu_runtime.bind(row, weight, bias, adapter, blocks=blocks)
    return cpu_training.bind_forward(row, weight, bias, adapter)


def is_plain(base: nn.Module) -> bool:
    """Whether it is torch's own linear layer on a weight of torch's own tensor type: torchao keeps the layer's type."""
    return type(base) in (nn.Linear, AcceleratedLinear) and type(parameters_of(base)[0]) in TENSORS


def parameters_of(base: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias; past Module.__getattr__, which costs as much as a step of a small kernel, where they are parameters."""
    own = base._parameters
    return (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (base.weight, base.bias)
