"""XGBLoRA: LoRAs of rank 1 that are trained one after another, each on top of those before it, and merged into the base.

In the formula of the gated pool: no gate, ranks "old" and "new" of one pool, all of them used by every sample.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from lilora_kernels.layers.rank_pool import Choice, Chooser, RankPoolLinear

from .base import Batches, Stage, Tensors, add_to_weight, register_method
from .merged import MergedLoRAs
from .olora import ALL_RANKS
from .pooled import fresh, require_grad_only
from .settings import RankSettings

BOOSTERS = "boosters"


class XGBLoRASettings(RankSettings):
    """r: boosters of rank 1 that a task trains, each for 1 / r of its steps; the scale is alpha / r."""

    r: int = Field(16, ge=1)


def boosted(layer: RankPoolLinear, x: Tensor) -> tuple[Choice | None, None]:
    return (ALL_RANKS if "new" in layer.lora_A else None), None  # merged: the model is plain


@register_method
class XGBLoRA(MergedLoRAs):
    """Gradient boosting with LoRAs of rank 1 (XGBLoRA, arXiv 2410.19694): train one, freeze it, start the next.

    Boosters of a task are added to the base weights together, after it: until then a frozen one is a rank beside them, which
    is the same sum, rounded once. A new one has the optimizer's state of its own, and the learning rate goes on: our reading,
    as is training task after task. Inference is the plain model.
    """

    name = "xgblora"
    settings_type = XGBLoRASettings
    one_process_reason = "it starts new boosters between the steps of the optimizer"

    def chooser(self, path: str, linear: nn.Linear) -> Chooser:
        return boosted

    def add(self, task: str) -> None:
        for layer in self.layers.values():
            a, b = fresh(layer, self.options.r)  # the rows of A are where boosters start
            layer.put("old", a, b, train=False)
            layer.put("new", a[:1], b[:, :1], train=False)
        self.tasks.append(task)

    def activate(self, task: str, train: bool) -> None:
        new = [tensor for layer in self.layers.values() for tensor in layer.part("new")]
        require_grad_only(self.model, *(new if train else ()))

    def after_step(self, step: int, steps: int, optimizer: torch.optim.Optimizer) -> None:
        r = self.options.r
        trained, following = (step - 1) * r // steps, step * r // steps
        if trained == following:
            return
        for layer in self.layers.values():
            (old_a, old_b), (a, b) = layer.part("old"), layer.part("new")
            old_a[trained], old_b[:, trained] = a[0], b[:, 0]
            a.copy_(old_a[following : following + 1] if following < r else a)
            b.zero_()
            for p in (a, b):
                for value in optimizer.state.get(p, {}).values():
                    value.zero_()

    def progress(self) -> Tensors:
        parts = {path: layer.part("old") for path, layer in self.layers.items()}
        return {f"{path}.{kind}": t for path, pair in parts.items() for kind, t in zip("AB", pair, strict=True)}

    def end(self, stage: Stage, batches: Batches) -> None:
        stored = {}
        for path, layer in self.layers.items():
            a, b = layer.part("old")
            stored[f"{path}.{BOOSTERS}.A"], stored[f"{path}.{BOOSTERS}.B0"] = a.detach().clone(), b.detach().clone()
        self._merge(stage.task, stored)

    def _merge(self, task: str, stored: Tensors) -> None:
        for path, layer in self.layers.items():
            a, b = stored[f"{path}.{BOOSTERS}.A"], stored[f"{path}.{BOOSTERS}.B0"]
            add_to_weight(layer.base_layer, a, b, layer.scaling)
            for part in ("old", "new"):
                layer.put(part, a[:0], b[:, :0], train=False)
        self.trained[task] = stored
