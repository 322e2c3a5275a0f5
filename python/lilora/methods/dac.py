"""DAC: rank-1 experts in one LoRA, chosen by the guiding token of each linear's input, merged into the base after a task."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lilora_kernels.functional import rank_gate
from lilora_kernels.layers.rank_pool import Choice, RankPoolLinear
from lilora_kernels.routing.context import AHEAD
from lilora_kernels.routing.placement import places

from .base import Batches, Inputs, Stage, Tensors, add_to_weight, register_method
from .merged import MergedLoRAs
from .pooled import fresh, require_grad_only
from .settings import MethodSettings

EXPERTS = "experts"
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "merged": 4,
        "router": "random",
        "scope": "batch",
        "weights": "binary",
        "guide_dropout": True,
        "old_experts": "all",
    },
}


class DACSettings(MethodSettings):
    """DAC (arXiv 2601.22828). Where the paper and its code differ the default is the paper's; preset "released" is the code.

    r: rank-1 experts of a task in each linear; active: those that a forward uses; merged: those that go into the base
    weight after the task, None for as many as are active; the scale is alpha / r. router: "learned", or "random":
    drawn for each task and never trained. scope: experts chosen per "sample", or by majority once per "batch".
    weights: "probability" weighs the chosen experts by the router's probabilities, scaled to a mean of 1 over them,
    and merges them with their mean weight over all samples (our reading); "binary" does neither. guide: the "first"
    token of the linear's input ([CLS]) or the "mean" over its tokens, without padding in the text; guide_dropout:
    after the dropout. orthogonality: weight of the activation-guided orthogonal loss between the `critical` most
    chosen experts and those of old tasks: their `critical` ones or "all".
    """

    r: int = Field(12, ge=1)
    alpha: float = Field(1.0, gt=0)
    dropout: float = Field(0.2, ge=0, lt=1)
    active: int = Field(8, ge=1)
    merged: int | None = Field(None, ge=1)
    router: Literal["learned", "random"] = "learned"
    scope: Literal["sample", "batch"] = "sample"
    weights: Literal["probability", "binary"] = "probability"
    guide: Literal["first", "mean"] = "first"
    guide_dropout: bool = False
    orthogonality: float = Field(0.1, ge=0)
    critical: int = Field(4, ge=1)
    old_experts: Literal["critical", "all"] = "critical"

    @model_validator(mode="after")
    def _within_r(self):
        for name in ("active", "merged", "critical"):
            if (getattr(self, name) or 0) > self.r:
                raise ValueError(f"{name} is {getattr(self, name)} and r is {self.r}; {name} must be at most r")
        return self


class Padding:
    """mask: the attention mask [B, L] of the model's running forward, 0 at padding; None if it was given none."""

    mask: Tensor | None = None

    def take(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.mask = kwargs.get("attention_mask")

    def mean(self, tokens: Tensor) -> Tensor:
        """[B, L, K] -> [B, K]."""
        if self.mask is None or self.mask.shape != tokens.shape[:2]:
            return tokens.mean(1)
        real = self.mask.to(tokens.dtype)
        return (real[:, None] @ tokens).squeeze(1) / real.sum(1, keepdim=True)


class Router(nn.Module):
    """Chooses a layer's experts: top-`active` of softmax(R c + rho) for the guiding token c [B, K] of each sample.

    counts [r]: samples that have chosen each expert; weights [r]: their summed weights; samples [1]: how many there were.
    All in fp32 or wider, on the device; inputs are [B, ..., K]. padding: of a text layer's tokens.
    """

    def __init__(self, settings: DACSettings, linear: nn.Linear, padding: Padding) -> None:
        super().__init__()
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        like = {"device": linear.weight.device, "dtype": wide}
        self.settings, self.padding = settings, padding
        self.lora_router = nn.Linear(linear.in_features, settings.r, **like)
        for name, size in (("counts", settings.r), ("weights", settings.r), ("samples", 1)):
            self.register_buffer(name, torch.zeros(size, **like), persistent=False)

    def reset(self) -> None:
        """A new task: a new router, nothing counted."""
        self.lora_router.reset_parameters()
        for counted in (self.counts, self.weights, self.samples):
            counted.zero_()

    def forward(self, layer: RankPoolLinear, x: Tensor) -> tuple[Choice | None, Tensor | None]:
        if EXPERTS not in layer.lora_A:  # merged: the model is plain
            return None, None
        batch = self.settings.scope == "batch"
        with torch.autocast(x.device.type, enabled=False):
            probabilities = self._probabilities(x, layer.dropout)
            member, ranks = rank_gate(probabilities.detach(), self.settings.active)
            chosen = member
            if batch:
                chosen, ranks = rank_gate(member.sum(0, keepdim=True), self.settings.active)
                probabilities = probabilities.mean(0, keepdim=True)
            gate = self._weighted(probabilities, chosen)
        if self.training and torch._C._current_graph_task_id() == -1:  # a recomputation in backward counts nothing
            self.counts += member.sum(0)
            self.weights += gate.detach().sum(0) * (len(member) / len(gate))
            self.samples += len(member)
        if batch:
            return Choice((((EXPERTS,), ranks[0]),), gate.gather(1, ranks)), None
        rows = torch.arange(len(x), dtype=torch.int32, device=x.device).repeat_interleave(x.shape[1:-1].numel())
        return Choice((((EXPERTS,), None),), gate), rows

    def _probabilities(self, x: Tensor, dropout: float) -> Tensor:
        """[B, r] in the router's dtype."""
        tokens = x.reshape(len(x), -1, x.shape[-1])
        guide = tokens[:, 0] if self.settings.guide == "first" else self.padding.mean(tokens)
        if self.settings.guide_dropout:
            guide = nn.functional.dropout(guide, dropout, self.training)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.settings.router == "learned"):
            return self.lora_router(guide.to(self.lora_router.weight.dtype)).softmax(-1)

    def _weighted(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """The gate [G, r]; with binary weights a learned router gets its gradient straight through."""
        if self.settings.weights == "probability":
            kept = probabilities * chosen
            return kept * (self.settings.active / kept.sum(1, keepdim=True))
        if self.settings.router == "learned":
            return chosen + (probabilities - probabilities.detach()) * chosen
        return chosen


def orthogonality(new: Tensor, critical: Tensor, old: Tensor) -> Tensor:
    """sum over linears p, critical experts i and old experts j of |b_pi . b_pj|, a scalar.

    new [P, N, r] and old [P, N, c]: columns of B of P linears of equal width; critical [P, r]: 1 for the experts that count.
    """
    return ((new.mT @ old).abs().sum(-1) * critical).sum()


@register_method
class DAC(MergedLoRAs):
    """After a task its experts are part of the base weights: inference is the plain model, whatever the task."""

    name = "dac"
    settings_type = DACSettings
    one_process_reason = "it counts how often the samples of a batch choose each expert"
    presets = PRESETS
    train_defaults = {"learning_rate": 2e-3}  # noqa: RUF012
    train_presets = {"released": {"max_grad_norm": 0.0}}  # noqa: RUF012

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        self._padding, self._placed = Padding(), places(base, [path for path, _ in base.named_modules()])
        super().__init__(base, settings)
        base.register_forward_pre_hook(self._padding.take, with_kwargs=True)
        self._old: list[tuple[list[RankPoolLinear], Tensor]] = []  # layers of equal width, their old B [P, N, c]

    def chooser(self, path: str, linear: nn.Linear) -> Router:
        return Router(self.options, linear, Padding() if self._placed[path] == AHEAD else self._padding)

    def add(self, task: str) -> None:
        for layer in self.layers.values():
            layer.choose.reset()
            layer.put(EXPERTS, *fresh(layer, self.options.r), train=True)
        self.tasks.append(task)

    def activate(self, task: str, train: bool) -> None:
        trained = [p for layer in self.layers.values() for p in layer.part(EXPERTS)]
        if self.options.router == "learned":
            trained += [p for layer in self.layers.values() for p in layer.choose.parameters()]
        require_grad_only(self.model, *(trained if train else ()))

    # --- training ---------------------------------------------------------------------------------------------------

    def begin(self, stage: Stage, batches: Batches) -> None:
        super().begin(stage, batches)
        by_width: dict[int, list[str]] = {}
        for path, layer in self.layers.items():
            by_width.setdefault(layer.out_features, []).append(path)
        self._old = []
        for paths in by_width.values() if self.trained and self.options.orthogonality else ():
            old = torch.stack(
                [torch.cat([self._old_experts(t, path) for t in self.trained.values()], 1) for path in paths]
            )
            self._old.append(([self.layers[path] for path in paths], old))

    def _old_experts(self, stored: Tensors, path: str) -> Tensor:
        """B's columns of a task that new experts shall be orthogonal to, [N, c]."""
        b = stored[f"{path}.{EXPERTS}.B0"]
        if self.options.old_experts == "critical":
            counts = stored[f"state.{path}.counts"]
            b = b.index_select(1, rank_gate(counts[None], self.options.critical)[1][0])
        return b

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        loss = cross_entropy()[0]
        terms = []
        for layers, old in self._old:
            new = torch.stack([layer.part(EXPERTS)[1] for layer in layers])
            counts = torch.stack([layer.choose.counts for layer in layers])
            terms.append(orthogonality(new, rank_gate(counts, self.options.critical)[0], old))
        if terms:
            loss = loss + grad_accum_weight * self.options.orthogonality / len(self.layers) * torch.stack(terms).sum()
        return loss

    def progress(self) -> Tensors:
        kinds = ("counts", "weights", "samples")
        return {f"{path}.{k}": getattr(layer.choose, k) for path, layer in self.layers.items() for k in kinds}

    def end(self, stage: Stage, batches: Batches) -> None:
        stored = {}
        for path, layer in self.layers.items():
            a, b = layer.part(EXPERTS)
            stored[f"{path}.{EXPERTS}.A"], stored[f"{path}.{EXPERTS}.B0"] = a.detach().clone(), b.detach().clone()
            stored[f"state.{path}.counts"] = layer.choose.counts.clone()
            binary = self.options.weights == "binary"
            samples = layer.choose.samples.clamp(min=1)  # 0 in layers ahead of the decoder, of a task of text alone
            mean = torch.ones_like(layer.choose.weights) if binary else layer.choose.weights / samples
            stored[f"state.{path}.weights"] = mean
        self._merge(stage.task, stored)

    def _merge(self, task: str, stored: Tensors) -> None:
        """The most chosen experts alone. stored: all experts, their counts and the weights to merge them with."""
        for path, layer in self.layers.items():
            a, b = stored[f"{path}.{EXPERTS}.A"], stored[f"{path}.{EXPERTS}.B0"]
            kept = self.options.merged or self.options.active
            best = rank_gate(stored[f"state.{path}.counts"][None], kept)[1][0]
            weights = stored[f"state.{path}.weights"].index_select(0, best)
            chosen = weights[:, None] * a.index_select(0, best), b.index_select(1, best)
            add_to_weight(layer.base_layer, *chosen, layer.scaling)
            layer.put(EXPERTS, a[:0], b[:, :0], train=False)
        self.trained[task] = stored
