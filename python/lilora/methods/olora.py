"""O-LoRA: a LoRA per task beside the frozen ones of the earlier tasks, in directions orthogonal to theirs.

In the formula of the gated pool: no gate, ranks "old" and "new" of one pool, all of them used by every sample.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lilora.bank.bank import Bank
from lilora.bank.export import PlainLoRA
from lilora_kernels.layers.rank_pool import Choice, Chooser, RankPoolLinear

from .base import Inputs, Tensors, lora_parameters, register_method
from .pooled import PooledMethod, fresh, load_rank_pools, pool_tensors, require_grad_only
from .settings import RankSettings

ALL_RANKS = Choice(((("old",), None), (("new",), None)))


class OLoRASettings(RankSettings):
    """r: ranks of each task; the scale is alpha / r. orthogonality: weight of the penalty on all inner products of an old
    and a new row of A: "absolute" values, as in the published code, whose weight is the default, or "squared" as in the
    paper. l2: weight of the summed norms of each new A and B, which only the code has.
    """

    orthogonality: float = Field(0.5, ge=0)
    products: Literal["absolute", "squared"] = "absolute"
    l2: float = Field(0.0, ge=0)


@register_method
class OLoRA(PooledMethod):
    """Orthogonal subspace learning (O-LoRA, arXiv 2310.14152; code cmnfriend/O-LoRA): all tasks' LoRAs are summed.

    loss + orthogonality * sum over linears and earlier tasks i of sum |A_i A_t^T|. Inference needs no task.
    """

    name = "olora"
    settings_type = OLoRASettings
    one_state = True

    def chooser(self, path: str, linear: nn.Linear) -> Chooser:
        return all_ranks

    def add(self, task: str) -> None:
        for layer in self.layers.values():
            (old_a, old_b), (new_a, new_b) = layer.part("old"), layer.part("new")
            layer.put("old", torch.cat([old_a, new_a]), torch.cat([old_b, new_b], 1), train=False)
            layer.put("new", *fresh(layer, self.options.r), train=False)
        self.tasks.append(task)

    def activate(self, task: str, train: bool) -> None:
        require_grad_only(self.model, *(self.new().values() if train else ()))

    def new(self) -> Tensors:
        """A and B of the newest task."""
        return {
            name: tensor for name, tensor in pool_tensors(self.layers).items() if name.endswith((".new.A", ".new.B0"))
        }

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        loss = cross_entropy()[0]
        if self.options.orthogonality and len(self.tasks) > 1:
            pairs = ((layer.part("old")[0], layer.part("new")[0]) for layer in self.layers.values())
            terms = [overlap(old, new, self.options.products) for old, new in pairs]
            loss = loss + grad_accum_weight * self.options.orthogonality * torch.stack(terms).sum()
        if self.options.l2:
            norms = torch.stack([torch.linalg.vector_norm(t, dtype=loss.dtype) for t in self.new().values()])
            loss = loss + grad_accum_weight * self.options.l2 * norms.sum()
        return loss

    def restore(self, tasks: dict[str, tuple[Tensors, Tensors]]) -> None:
        self.tasks = list(tasks)
        if tasks:
            load_rank_pools(self.layers, tasks[self.tasks[-1]][1])

    @classmethod
    def as_lora(cls, bank: Bank, task: str) -> PlainLoRA:
        _, stored = bank.load_task(bank.tasks[-1])
        factors = {}
        for path in [name.removesuffix(".new.A") for name in stored if name.endswith(".new.A")]:
            parts = [part for part in ("old", "new") if f"{path}.{part}.A" in stored]  # one task has no old ranks
            a, b = (torch.cat([stored[f"{path}.{p}.{k}"] for p in parts], d) for k, d in (("A", 0), ("B0", 1)))
            factors[path] = a, b
        options = cls.read_settings(bank.config["settings"])
        return PlainLoRA(factors, options.alpha / options.r, options.dropout)

    @classmethod
    def inference_parameters(cls, settings: OLoRASettings, linears: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return 0, lora_parameters(settings.r, linears)

    def ranks(self) -> int:
        return self.options.r * len(self.tasks)


def all_ranks(layer: RankPoolLinear, x: Tensor) -> tuple[Choice, None]:
    return ALL_RANKS, None


def overlap(old: Tensor, new: Tensor, products: str) -> Tensor:
    """Sum of |old new^T|, or of its squares: old [R, K], new [r, K] -> a scalar in fp32 at least."""
    inner = old @ new.mT
    inner = inner.to(torch.promote_types(inner.dtype, torch.float32))
    return inner.square().sum() if products == "squared" else inner.abs().sum()
