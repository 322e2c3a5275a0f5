"""What the methods with rank pools share: putting RankPoolLinear layers into a model, and their tensors' names."""

import math
import re
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lilora.errors import UserError
from lilora_kernels.layers.rank_pool import Chooser, RankPoolLinear

from .base import Method, Tensors


def inject_rank_pools(
    model: nn.Module, pattern: str, chooser: Callable[[str, nn.Linear], Chooser], scaling: float, dropout: float
) -> dict[str, RankPoolLinear]:
    """Replace the linears whose names the pattern fully matches; `chooser(path, linear)` makes each one's chooser.

    UserError when none matches; the model is as before then.
    """
    matched = {
        path: module
        for path, module in model.named_modules()
        if re.fullmatch(pattern, path) and isinstance(module, nn.Linear)
    }
    if not matched:
        raise UserError(f"target_modules {pattern!r} matches no linear layer of this model; give another pattern")
    layers = {}
    for path, linear in matched.items():
        parent, _, leaf = path.rpartition(".")
        layers[path] = RankPoolLinear(linear, chooser(path, linear), scaling, dropout)
        setattr(model.get_submodule(parent), leaf, layers[path])
    return layers


def remove_rank_pools(model: nn.Module, layers: dict[str, RankPoolLinear]) -> None:
    """Put the linears back that `inject_rank_pools` replaced."""
    for path, layer in layers.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base_layer)


def fresh(layer: RankPoolLinear, ranks: int) -> tuple[Tensor, Tensor]:
    """A [ranks, K] Kaiming-uniform and B [N, ranks] = 0, as LoRA starts."""
    a, b = layer.empty(ranks, layer.in_features), layer.empty(layer.out_features, ranks)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, nn.init.zeros_(b)


def pool_tensors(layers: dict[str, RankPoolLinear]) -> Tensors:
    """Every part's A and B0 as a bank names them: `<path>.<part>.A`, `<path>.<part>.B0`."""
    tensors = {}
    for path, layer in layers.items():
        for part in layer.lora_A:
            tensors[f"{path}.{part}.A"], tensors[f"{path}.{part}.B0"] = layer.part(part)
    return tensors


def load_rank_pools(layers: dict[str, RankPoolLinear], tensors: Tensors) -> None:
    """Give the layers exactly the parts that a bank holds, frozen; UserError for a tensor that has no layer."""
    placed = set()
    for path, layer in layers.items():
        for part in list(layer.lora_A):
            layer.put(part, layer.empty(0, layer.in_features), layer.empty(layer.out_features, 0), False)
        prefix = f"{path}."
        for name in tensors:
            if name.startswith(prefix) and name.endswith(".A") and name.count(".") == prefix.count(".") + 1:
                part = name[len(prefix) : -2]
                layer.put(part, tensors[name], tensors[f"{path}.{part}.B0"], train=False)
                placed |= {name, f"{path}.{part}.B0"}
    for name in tensors:
        if name not in placed and not name.startswith("state."):
            raise UserError(f"tensor {name} of the bank has no place in the model; give the base model of its training")


def require_grad_only(model: nn.Module, *tensors: Tensor) -> None:
    """Let exactly these parameters of the model require gradients."""
    wanted = {id(tensor) for tensor in tensors}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)


class PooledMethod(Method):
    """A rank pool in every adapted linear; inference needs no task."""

    mixed_batches = True
    needs_task = False

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        s = self.options = self.read_settings(settings)
        self.model = base
        self.layers = inject_rank_pools(base, s.target_modules, self.chooser, s.alpha / s.r, s.dropout)
        require_grad_only(base)

    @abstractmethod
    def chooser(self, path: str, linear: nn.Linear) -> Chooser:
        """What chooses the ranks of a linear."""

    def activate(self, task: str, train: bool) -> None:
        require_grad_only(self.model, *(self.tensors(task)[1].values() if train else ()))

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        return {}, pool_tensors(self.layers)
