"""LiLoRAExperts: the routed experts of a transformers model with an adapter for each expert and task."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..offloading import onloaded
from ..ops.experts.groups import group_rows
from .base import Factors
from .lilora import LiLoRALinear


class ExpertWeight:
    """One Parameter of an experts module, a matrix for each of E experts, as the base of an `ExpertLinear`."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.is_transposed: bool = module.is_transposed
        self.experts, self.out_features, self.in_features = self.matrices.shape
        self.leading = (self.experts,)

    @property
    def weight(self) -> nn.Parameter:
        """As it lies: [E, N, K], or [E, K, N] where `is_transposed`."""
        return getattr(self.module, self.name)

    @property
    def matrices(self) -> Tensor:
        """[E, N, K]."""
        return self.weight.mT if self.is_transposed else self.weight

    def requires_grad_(self, requires_grad: bool) -> "ExpertWeight":
        self.module.requires_grad_(requires_grad)
        return self


class ExpertLinear(LiLoRALinear):
    """`LiLoRALinear` for one linear of all E experts.

    A [E, r, K] and B0 [E, N, r] are shared by all tasks, U [E, N, sub_rank], V [E, sub_rank, r] and fusion [E] belong to one.
    base_layer: an ExpertWeight. It runs inside of LiLoRAExperts, on rows in the order of their experts and tasks.
    """

    operation = "expert_linear"

    @property
    def is_transposed(self) -> bool:
        return self.base_layer.is_transposed

    def has_plain_weight(self) -> bool:
        return True

    def weight_key(self, prefix: str) -> str:
        name = self.base_layer.name
        return f"{prefix.removesuffix(f'{name}.')}base_layer.{name}"

    def unfused_reason(self) -> str | None:
        return None

    def delta_weight(self, name: str) -> Tensor:
        """As in LiLoRALinear; RuntimeError while the experts are offloaded, for nothing brings them for a merge."""
        if self.base_layer.weight.is_meta:
            raise RuntimeError(
                f"{self.path} is offloaded, so no task can be merged into it or taken out; load the model in full"
            )
        return super().delta_weight(name)

    def forward(self, x: Tensor, ends: Tensor, factors: Factors) -> Tensor:  # type: ignore[override]
        """x [M, K] -> [M, N], with rows and ends as `group_rows` orders them and the factors of `_adapter`."""
        seed = functional.draw_seed(x.device) if self._p else None
        y = functional.expert_linear(
            x, self.base_layer.matrices, ends, *factors, seed=seed, scaling=self.lilora_scaling, p=self._p
        )
        self._expect_same_tasks(y)
        return y


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the two linears of a module of routed experts: gate_up_proj or up_proj, and down_proj; () for others.

    It is a module that transformers runs through its experts interface, with floating Parameters [E, ., .].
    """
    if not all(hasattr(module, flag) for flag in ("_apply_gate", "has_gate", "has_bias", "is_transposed")):
        return ()
    names = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
    kinds = torch.float64, torch.float32, torch.bfloat16, torch.float16
    own = [module._parameters.get(name) for name in names]
    return names if all(p is not None and p.dim() == 3 and p.dtype in kinds for p in own) else ()


class LiLoRAExperts(nn.Module):
    """Replaces a module of routed experts in one line; every linear of every expert gets a LiLoRA adapter.

    base_layer: a module for which `expert_parameters` has names; others raise TypeError. Its two linears become ExpertLinears of
    the same names. settings: those of LiLoRALinear. r and sub_rank are best small: there are E times the parameters of a
    dense MLP's adapter. The rows of a batch are sorted by expert and task once for both linears.
    """

    def __init__(
        self, base_layer: nn.Module, make: Callable[..., ExpertLinear] = ExpertLinear, **settings: Any
    ) -> None:
        super().__init__()
        names = expert_parameters(base_layer)
        if not names:
            raise TypeError(
                f"base_layer is a {type(base_layer).__name__}; it must be a module of routed experts of transformers' experts "
                "interface, with Parameters [E, ., .]"
            )
        self.base_layer, self.names = base_layer, names
        for name in names:
            self.add_module(name, make(ExpertWeight(base_layer, name), **settings))

    @property
    def layers(self) -> tuple[ExpertLinear, ExpertLinear]:
        up, down = (self._modules[name] for name in self.names)
        return up, down

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, task: Tensor | None = None
    ) -> Tensor:
        """hidden_states [tokens, K], top_k_index and top_k_weights [tokens, k] -> [tokens, K].

        task: as in LiLoRALinear. RuntimeError for experts that are split over devices or have hooks.
        """
        if torch.compiler.is_compiling():
            return self._forward(hidden_states, top_k_index, top_k_weights, task)
        up, down = self.layers
        with onloaded(self.base_layer, *up._kinds, *down._kinds):
            return self._forward(hidden_states, top_k_index, top_k_weights, task)

    def _forward(self, x: Tensor, chosen: Tensor, weights: Tensor, task: Tensor | None) -> Tensor:
        base, (up, down) = self.base_layer, self.layers
        adapters = up._adapter(x, task), down._adapter(x, task)
        if adapters == (None, None):
            return base(x, chosen, weights)
        of_both = [adapter for adapter in adapters if adapter is not None]
        if len(of_both) < 2:
            raise RuntimeError(f"{up.path} and {down.path} differ in what is merged or active; set both alike")
        if getattr(base, "_is_expert_parallel", False) or base._forward_hooks or base._forward_pre_hooks:
            raise RuntimeError(
                f"the experts of {up.path} are split over devices, or have hooks; adapt them in a model that is not"
            )
        (of_up, rows), (of_down, _) = of_both
        tokens, k = chosen.shape
        tasks = 1 if rows is None else len(of_up[2])
        if rows is not None:  # in a graph an error would have to wait for the device
            weights = weights.masked_fill((rows >= tasks).unsqueeze(1), torch.nan)
        order, ends = group_rows(chosen, rows, base.num_experts, tasks)
        expert = chosen.flatten()[order] if base.has_bias else None

        def biased(y: Tensor, name: str) -> Tensor:
            return y if expert is None else y + getattr(base, f"{name}_bias")[expert].to(y.dtype)

        y = biased(up(x[order // k], ends, of_up), self.names[0])
        y = base._apply_gate(y) if base.has_gate else base.act_fn(y)
        y = biased(down(y, ends, of_down), self.names[1])
        if getattr(base, "has_post_expert_norm", False):
            y = base.post_expert_norm(y)
        y = y * weights.flatten()[order].unsqueeze(1)
        y = torch.zeros_like(y).index_copy(0, order, y)
        return y.view(tokens, k, -1).sum(1).to(x.dtype)
