"""LoDA: a LoRA per task, all added up, in directions that the features of the tasks choose and that training leaves alone.

The layers are those of O-LoRA: ranks "old" and "new" of one pool, all of them used by every sample.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lilora.errors import UserError
from lilora_kernels.layers.rank_pool import Choice, Chooser, RankPoolLinear
from lilora_kernels.routing.context import AHEAD
from lilora_kernels.routing.placement import places

from .base import Batches, Inputs, Stage, Tensors, evaluating, next_labels, register_method
from .dac import Padding
from .olora import ALL_RANKS, OLoRA
from .ortholora import WithGradients, losses_of_tasks
from .pooled import fresh, pool_tensors, require_grad_only
from .settings import RankSettings

PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "released": {"remembered": "both", "train_a": "first"}}


class LoDASettings(RankSettings):
    """r: ranks of each of the two branches; the scale is alpha / r. general: weight of the general branch beside the isolated
    one. gamma: weight of the new task where the general branch is fitted to all. lookahead: rho, how far what trains is
    moved at most down the gradient of one half of a batch before that of the other is taken; 0: ordinary gradients.
    samples: training samples of a task that features are taken from, at most. remembered: features of the "merged" model
    stand for the task later, or, as in the published code, "both" those and the ones before merging. train_a: whether the
    directions train in the "first" task, as in the published code.
    """

    general: float = Field(0.5, gt=0)
    gamma: float = Field(3.0, gt=0)
    lookahead: float = Field(0.3, ge=0)
    samples: int = Field(256, ge=1)
    remembered: Literal["merged", "both"] = "merged"
    train_a: Literal["never", "first"] = "never"


def ranks_so_far(layer: RankPoolLinear, x: Tensor) -> tuple[Choice | None, None]:
    return (ALL_RANKS if layer.lora_A else None), None  # none where the first task's features are taken


@register_method
class LoDA(OLoRA):
    """Low-rank decomposition and adaptation (LoDA, arXiv 2603.00191; code HHHLF/LoDA_ICML2026): B trains in chosen directions.

    y = x W^T + alpha / r sum over tasks D(x) (general B_G A_G + B_I A_I)^T. With S the second moment of a linear's inputs, of
    the new task and summed over the old ones: the rows of A_G are the directions of most energy in both, those of A_I span
    the ones of the greatest ratio of new to old; the first task has A_G alone. After a task each column of its B_G is
    multiplied by gamma n / (o + gamma n), n and o the energies of its direction in the new task and the old ones. Inference
    needs no task. The bank has the old moment as `state.*.moment`.
    """

    name = "loda"
    settings_type = LoDASettings
    presets = PRESETS
    answers_only = True
    one_process_reason = "it takes the gradients of halves of a whole batch"

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        self._padding, placed = Padding(), places(base, list(self.layers))
        self._text = {path for path in self.layers if placed[path] != AHEAD}  # inputs that the mask is of
        base.register_forward_pre_hook(self._padding.take, with_kwargs=True)
        self.moments = {path: _no_moment(layer) for path, layer in self.layers.items()}  # of the old tasks, [K, K]

    def chooser(self, path: str, linear: nn.Linear) -> Chooser:
        return ranks_so_far

    def add(self, task: str) -> None:
        for layer in self.layers.values():
            (old_a, old_b), (a, b) = layer.part("old"), layer.part("new")
            layer.put("old", torch.cat([old_a, a]), torch.cat([old_b, b], 1), train=False)
            layer.put("new", *fresh(layer, self._branches() * self.options.r), train=False)
        self.tasks.append(task)

    def _branches(self) -> int:
        """Of the next task."""
        return 2 if self.tasks else 1

    def activate(self, task: str, train: bool) -> None:
        require_grad_only(self.model, *(self._trained() if train else ()))

    def _trained(self) -> list[Tensor]:
        """B of the newest task, of every linear, and A where it trains."""
        from_a = 0 if self.options.train_a == "first" and len(self.tasks) == 1 else 1
        return [factor for layer in self.layers.values() for factor in layer.part("new")[from_a:]]

    def begin(self, stage: Stage, batches: Batches) -> None:
        r, branches = self.options.r, self._branches()
        for path, layer in self.layers.items():
            if (ranks := branches * r) > layer.in_features:
                raise UserError(
                    f"loda: r is {r} and {path} has {layer.in_features} inputs, of which {ranks} directions cannot be made; give "
                    "at most half as many ranks as inputs"
                )
        new = self.measured(batches)
        self.add(stage.task)
        for path, layer in self.layers.items():
            moments = new[path].double(), self.moments[path].double()
            rows = [self.options.general * general_directions(*moments, r)]
            if branches == 2:
                rows.append(isolated_directions(*moments, r))
            layer.part("new")[0].data.copy_(torch.cat(rows))
        self.activate(stage.task, train=True)

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        """The cross-entropy, with the gradient of each half of the batch where what trains is moved down that of the other."""
        loss, outputs = cross_entropy()
        if not self.options.lookahead:
            return loss
        labels = next_labels(inputs)
        half = torch.randperm(len(labels)).to(labels.device) % 2
        parts = losses_of_tasks(loss, outputs.logits, labels, half)
        if len(parts) == 1:
            return loss
        trained = self._trained()
        directions = [torch.autograd.grad(part, trained, retain_graph=True, materialize_grads=True) for part in parts]
        step, starts = self.options.lookahead * torch.rand(()).item(), [p.detach().clone() for p in trained]
        total = [torch.zeros_like(p) for p in trained]
        for direction, other in zip(directions, (1, 0), strict=True):
            with torch.no_grad():
                for p, start, g in zip(trained, starts, direction, strict=True):
                    branches = g.tensor_split(min(len(self.tasks), 2), 1)
                    p.copy_(start - step * torch.cat([part / part.norm().clamp_min(1e-12) for part in branches], 1))
            moved, outputs = cross_entropy()
            part = losses_of_tasks(moved, outputs.logits, labels, half)[other]
            for sum_, g in zip(total, torch.autograd.grad(part, trained, materialize_grads=True), strict=True):
                sum_ += g
        with torch.no_grad():
            for p, start in zip(trained, starts, strict=True):
                p.copy_(start)
        return WithGradients.apply(loss.detach(), total, *trained)

    @torch.no_grad()
    def end(self, stage: Stage, batches: Batches) -> None:
        trained = self.measured(batches)
        for path, layer in self.layers.items() if len(self.tasks) > 1 else ():
            a, b = layer.part("new")
            general = a[: self.options.r].double()
            new, old = (energies(general, moment.double()) for moment in (trained[path], self.moments[path]))
            kept = self.options.gamma * new / (old + self.options.gamma * new)
            b[:, : self.options.r] *= kept.nan_to_num(1.0)  # nan: a linear that no sample reaches
        merged = self.measured(batches)
        for path, moment in self.moments.items():
            moment += merged[path]
            if self.options.remembered == "both":
                moment += trained[path]

    def progress(self) -> Tensors:
        return {f"{path}.A": layer.part("new")[0] for path, layer in self.layers.items()}

    @torch.no_grad()
    def measured(self, batches: Batches) -> dict[str, Tensor]:
        """Of each linear the mean of x x^T over its inputs, without padding of the text, [K, K] in fp32 at least."""
        sums = {path: torch.zeros_like(moment) for path, moment in self.moments.items()}
        counts = dict.fromkeys(sums, 0)

        def add(path: str, x: Tensor) -> None:
            mask = self._padding.mask if path in self._text else None
            rows = x.flatten(0, -2) if mask is None or mask.shape != x.shape[:-1] else x[mask.bool()]
            rows = rows.to(sums[path])
            sums[path] += rows.mT @ rows
            counts[path] += len(rows)

        hooks = [
            layer.register_forward_pre_hook(lambda _, args, path=path: add(path, args[0]))
            for path, layer in self.layers.items()
        ]
        try:
            with evaluating(self.model):
                for inputs in batches(self.options.samples):
                    self.model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return {path: total / max(counts[path], 1) for path, total in sums.items()}

    # --- the bank ---------------------------------------------------------------------------------------------------

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        moments = {f"state.{path}.moment": moment for path, moment in self.moments.items()}
        return {}, pool_tensors(self.layers) | moments

    def restore(self, tasks: dict[str, tuple[Tensors, Tensors]]) -> None:
        super().restore(tasks)
        for path, moment in self.moments.items() if tasks else ():
            moment.copy_(tasks[self.tasks[-1]][1][f"state.{path}.moment"])

    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in pool_tensors(self.layers).values())

    @classmethod
    def inference_parameters(cls, settings: LoDASettings, linears: Sequence[tuple[int, int]]) -> None:
        """None: the first task has half as many as the others."""

    def ranks(self) -> int:
        return self.options.r * max(2 * len(self.tasks) - 1, 0)


def _no_moment(layer: RankPoolLinear) -> Tensor:
    like = layer.empty(0)
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(layer.in_features, layer.in_features, dtype=wide, device=like.device)


def energies(rows: Tensor, moment: Tensor) -> Tensor:
    """a S a^T for each row a of [r, K]: [r], not below 0."""
    return ((rows @ moment) * rows).sum(1).clamp_min(0)


def general_directions(new: Tensor, old: Tensor, r: int) -> Tensor:
    """The r directions of most energy in S_new + S_old [K, K], as orthonormal rows [r, K]."""
    return torch.linalg.eigh(new + old)[1][:, -r:].flip(1).mT


def isolated_directions(new: Tensor, old: Tensor, r: int) -> Tensor:
    """Orthonormal rows [r, K] that span the r directions u of the greatest u S_new u^T / u S_old u^T.

    An old moment that is not positive definite gets the smallest power of ten of its mean diagonal, from 1e-12 on, that makes
    it so.
    """
    size, share = old.diagonal().mean().item() or 1.0, 1e-12
    lower, failed = torch.linalg.cholesky_ex(old)
    while failed:
        lower, failed = torch.linalg.cholesky_ex(old + share * size * torch.eye(len(old)).to(old))
        share *= 10
    whitened = torch.linalg.solve_triangular(lower, new, upper=False)
    whitened = torch.linalg.solve_triangular(lower, whitened.mT, upper=False)
    best = torch.linalg.eigh((whitened + whitened.mT) / 2)[1][:, -r:].flip(1)
    return torch.linalg.qr(torch.linalg.solve_triangular(lower.mT, best, upper=True))[0].mT
