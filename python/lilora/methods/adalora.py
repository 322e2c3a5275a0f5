"""AdaLoRA: one budget of ranks for all linears, which goes to those whose removal the loss would feel most."""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lilora_kernels.functional import rank_gate
from lilora_kernels.layers.rank_pool import RankPoolLinear

from .base import Batches, Inputs, Stage, Tensors, register_method
from .gated import RANKS, GatedLoRA
from .settings import RankSettings


class AdaLoRASettings(RankSettings):
    """target: ranks that a linear keeps on average, None for two thirds of r. warmup, final: shares of a task's steps, before
    ranks go and after the last went; interval: steps from one allocation to the next. smoothing, uncertainty: decay of the
    averages of an importance and of its deviations. orthogonality: weight of the mean of |A A^T - I| and |B^T B - I|.
    """

    target: int | None = Field(None, ge=1)
    warmup: float = Field(0.1, ge=0, lt=1)
    final: float = Field(0.3, ge=0, lt=1)
    interval: int = Field(1, ge=1)
    smoothing: float = Field(0.85, gt=0, lt=1)
    uncertainty: float = Field(0.85, gt=0, lt=1)
    orthogonality: float = Field(0.5, ge=0)

    @property
    def kept(self) -> int:
        return max(1, 2 * self.r // 3) if self.target is None else self.target

    @model_validator(mode="after")
    def _fits(self):
        if self.kept > self.r:
            raise ValueError(f"target is {self.target} and r is {self.r}; target must be at most r")
        if self.warmup + self.final >= 1:
            raise ValueError(f"warmup is {self.warmup} and final is {self.final}; their sum must be below 1")
        return self

    def phases(self, steps: int) -> tuple[int, int]:
        """The last step before ranks go, and the one from which on no more go, of so many steps."""
        return round(self.warmup * steps), steps - round(self.final * steps)

    def budget(self, step: int, steps: int, linears: int) -> int:
        """Ranks that all linears keep together after a step of a task: from r to `kept` each, by the cube of what is left."""
        first, last = self.phases(steps)
        left = 1 - min(max(step - first, 0) / max(last - first, 1), 1)
        return int((self.r - self.kept) * linears * left**3 + self.kept * linears)


@register_method
class AdaLoRA(GatedLoRA):
    """AdaLoRA (arXiv 2303.10512; PEFT's AdaLora): one LoRA with ranks in SVD form that trains task after task, under a budget.

    y = x W^T + alpha / r D(x) (B diag(g) A)^T. The importance of an element w is the average of |w dL/dw| times that of its
    deviations; a rank's is that of its g plus the means over its row of A and its column of B. Ranks outside the budget get
    g = 0. The budget starts anew with every task, as do the averages, and every rank may come back: our reading. Inference
    needs no task.
    """

    name = "adalora"
    settings_type = AdaLoRASettings

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        self._averages: dict[str, tuple[Tensor, Tensor]] = {}  # of every trained tensor: importance, its deviations

    def start(self, layer: RankPoolLinear) -> tuple[Tensor, Tensor, Tensor]:
        r = self.options.r
        a, b = layer.empty(r, layer.in_features), layer.empty(layer.out_features, r)
        return a.normal_(std=0.02), b.normal_(std=0.02), torch.zeros_like(layer.choose.lora_gate)

    def begin(self, stage: Stage, batches: Batches) -> None:
        super().begin(stage, batches)
        trained = self.tensors(stage.task)[1]
        self._averages = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in trained.items()}

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        loss = cross_entropy()[0]
        if self.options.orthogonality:
            parts = [layer.part(RANKS) for layer in self.layers.values()]
            terms = [off_orthonormal(rows) for a, b in parts for rows in (a, b.mT)]
            loss = loss + grad_accum_weight * self.options.orthogonality * torch.stack(terms).mean()
        return loss

    def after_step(self, step: int, steps: int, optimizer: torch.optim.Optimizer) -> None:
        first, last = self.options.phases(steps)
        if step < last:
            self._measure()
        if step >= last or (step > first and step % self.options.interval == 0):
            self._allocate(self.options.budget(step, steps, len(self.layers)))

    def _allocate(self, budget: int) -> None:
        scores = torch.cat([self._importance(path) for path in self.layers])
        kept = rank_gate(scores[None], budget)[0][0].bool()
        for gate, keep in zip(self.gates(), kept.split(self.options.r), strict=True):
            gate.masked_fill_(~keep, 0)

    def _measure(self) -> None:
        """One more gradient into the averages; a linear that no sample reached has none."""
        s, trained = self.options, self.tensors(self.tasks[-1])[1]
        for name, (importance, deviation) in self._averages.items():
            p = trained[name]
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            importance.lerp_(now, 1 - s.smoothing)
            deviation.lerp_((now - importance).abs(), 1 - s.uncertainty)

    def _importance(self, path: str) -> Tensor:
        """Of the ranks of a linear, [r]."""
        names = (f"state.{path}.gate", f"{path}.{RANKS}.A", f"{path}.{RANKS}.B0")
        gate, a, b = (importance * deviation for importance, deviation in (self._averages[name] for name in names))
        return gate + a.mean(1) + b.mean(0)

    def progress(self) -> Tensors:
        pairs = self._averages.items()
        return {
            f"{kind}.{name}": t
            for name, pair in pairs
            for kind, t in zip(("importance", "deviation"), pair, strict=True)
        }


def off_orthonormal(rows: Tensor) -> Tensor:
    """Frobenius norm of P P^T - I for rows P [r, K], fp32 at least."""
    gram = (rows @ rows.mT).to(torch.promote_types(rows.dtype, torch.float32))
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
