"""Linear layers where they run without an adapter, for few rows on a CPU by the kernels that adapted ones take."""

from collections.abc import Callable

from torch import Tensor, nn

from . import backends
from .adapted import PLAIN, conditions, is_plain
from .functional import autocasts
from .ops import cpu_runtime
from .ops.doors import is_any_watching, is_transformed, needs_graph
from .ops.schema import AdapterArgs


def accelerate_linears(model: nn.Module) -> dict[str, str | None]:
    """Compute every nn.Linear of `model` that runs without an adapter by the CPU kernels, up to 64 rows, without gradients.

    torch's own product of few rows runs at a fraction of the memory's speed; these kernels read each weight once. Results
    are torch's up to rounding, a row's bits independent of the other rows. Other calls take torch's product as before: more
    rows, gradients, autocast, torch.compile, another device. So do the bases of adapted layers while no task is active or
    one is merged. Returns None for each layer by its path, or why it was left as it is. Neither parameters nor the state
    dict are touched. Quantise a model first. Undone by `restore_linears`.
    """
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            found[path] = None if is_accelerated(layer) else left_alone(layer)
            if found[path] is None:
                layer.forward = Forward(layer)
    return found


def restore_linears(model: nn.Module) -> None:
    """Undo `accelerate_linears`."""
    for module in model.modules():
        if is_accelerated(module):
            del module.forward


def is_accelerated(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), Forward)


def left_alone(layer: nn.Linear) -> str | None:
    """Why `accelerate_linears` leaves a layer as it is, or None."""
    if not is_plain(layer):
        return f"it is a {type(layer).__name__} of a {type(layer.weight).__name__}"
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    return cpu_runtime.refusal(layer.weight, 0, 0)


class Forward:
    """The forward of one accelerated layer."""

    does_the_same = True  # for `has_hooks`
    # The conditions of the call that is bound, and that call. Always set together: layers serve several threads.
    settled: tuple[list | None, Callable | None] = None, None

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __getstate__(self) -> dict:
        return {"layer": self.layer}  # a copy's parameters lie elsewhere

    def __call__(self, input: Tensor) -> Tensor:
        y, weight, bias = None, self.layer.weight, self.layer.bias
        if not (
            is_transformed()
            or not PLAIN.issuperset((type(input), type(weight), type(bias)))
            or is_any_watching()
            or needs_graph(input, weight, bias)
            or not (input.is_cpu and input.dtype == weight.dtype and input.shape[-1:] == weight.shape[1:])
            or autocasts(input)
        ):
            kind, (settled, run) = conditions(weight, bias), self.settled
            if settled != kind:
                run = bound(input, weight, bias)
                self.settled = kind, run
            y = run and run(input, None)
        return nn.Linear.forward(self.layer, input) if y is None else y


def bound(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable | None:
    """`cpu_runtime.bind` of an adapter of rank 0, None where another backend is forced."""
    if backends.forced["backend"] not in (None, "cpu") or cpu_runtime.refusal(x, 0, 0) is not None:
        return None
    a, b0 = weight.new_empty(0, weight.shape[1]), weight.new_empty(len(weight), 0)
    adapter = AdapterArgs(a, b0, None, None, None, None, None, None, None, 1.0, 0.0, None)
    return cpu_runtime.bind(x.reshape(-1, x.shape[-1]), adapter, weight, bias)
