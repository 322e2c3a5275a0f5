"""The cosine-regularised basis stability loss of LiLoRA."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lilora.errors import UserError
from lilora.peft.tuner import full_tensor
from lilora_kernels import LiLoRALinear


class StabilityLoss:
    """weight * mean over layers of (1 - c) * ||B0 - B0_prev||_F^2 / ||B0_prev||_F^2, for training one task.

    c in [0, 1] is the mean cosine between U V of the task and U_j V_j of each earlier task j, not differentiated; a
    cosine with a zero norm counts 0. B0_prev is B0 at construction, so build the loss at the start of the task, after
    the model is on its device and before a checkpoint of the same task is restored. The loss is 0 for the first task,
    and a layer whose B0_prev is 0 contributes 0.

    The published formula was not available to us: this is our reading of the paper's description, that large changes
    of the shared basis are penalised when the new task is unlike the earlier ones.

    layers: adapted layers by name, see `lilora.peft.layer.adapted_layers`. Memory: one copy of each B0 and, while running,
    Gram matrices [sub_rank, sub_rank]; no U V [N, r] is formed. Raises UserError for no layers, an unknown task or a
    negative weight.
    """

    def __init__(self, layers: Mapping[str, LiLoRALinear], task: str, weight: float) -> None:
        if not layers:
            raise UserError("layers is empty; pass the adapted layers of a model, see lilora.peft.layer.adapted_layers")
        if not 0 <= weight < float("inf"):
            raise UserError(f"weight is {weight}; it must be a number of at least 0")
        for name, layer in layers.items():
            if task not in layer.tasks:
                raise UserError(f"task {task!r} is unknown to {name}, which has {layer.tasks}; add the task first")
        self.weight = weight
        self._terms = [_LayerTerm(layer, task) for layer in layers.values()]

    def __call__(self) -> Tensor:
        """The loss, a scalar in fp32 (fp64 for fp64 parameters), differentiable with respect to every B0."""
        terms = [term() for term in self._terms]
        return self.weight * torch.stack([term.to(terms[0].device) for term in terms]).mean()


class _LayerTerm:
    @torch.no_grad()
    def __init__(self, layer: LiLoRALinear, task: str) -> None:
        self.layer, self.task = layer, task
        self.earlier = layer.tasks[: layer.tasks.index(task)]
        b0 = layer.lilora_B[task]
        self.device, self.dtype = b0.device, torch.promote_types(b0.dtype, torch.float32)
        if self.earlier:
            self.b0_prev = b0.clone()
            self.b0_prev_square = b0.to(self.dtype).square().sum()
            factors = [self._factors(name) for name in self.earlier]
            self.norms = torch.stack([_inner(f, f) for f in factors]).sqrt()  # [earlier tasks]

    def __call__(self) -> Tensor:
        if not self.earlier:
            return torch.zeros((), device=self.device, dtype=self.dtype)
        with torch.autocast(self.device.type, enabled=False):
            moved = (full_tensor(self.layer.lilora_B[self.task]).to(self.dtype) - self.b0_prev).square().sum()
            return (1 - self.similarity()) * _ratio(moved, self.b0_prev_square)

    @torch.no_grad()
    def similarity(self) -> Tensor:
        own = self._factors(self.task)
        inner = torch.stack([_inner(own, self._factors(name)) for name in self.earlier])
        return _ratio(inner, _inner(own, own).sqrt() * self.norms).mean().clamp(0, 1)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        return tuple(full_tensor(own[name]).to(self.dtype) for own in (self.layer.lilora_U, self.layer.lilora_V))


def _inner(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> Tensor:
    """<U_p V_p, U_q V_q>_F from two Gram matrices."""
    return ((p[0].mT @ q[0]) * (p[1] @ q[1].mT)).sum()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where the denominator is 0."""
    zero = denominator == 0
    return torch.where(zero, 0, numerator / torch.where(zero, 1, denominator))
