"""The task of every sample of a batch, from the batch alone: for inference without a task id."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lilora.bank.bank import Bank
from lilora.errors import UserError
from lilora.methods.base import Inputs, Tensors
from lilora.methods.lora import evaluating
from lilora.methods.pclr.queries import prompt_mean
from lilora.registry import Registry
from lilora_kernels.layers.base import AdaptedLinear

SAMPLES = 512  # training samples of a task that its centroid is the mean of
SHRINKAGE = 0.01


class TaskRouter(ABC):
    """Finds tasks: `model.generate(**inputs, task_ids=router.route(inputs))`.

    model: the base model, whatever its adapters. statistics: of each task what `fit` returned, which a bank keeps.
    """

    name: str

    def __init__(self, model: nn.Module, statistics: Mapping[str, Tensors] | None = None) -> None:
        self.model = model
        self.statistics: dict[str, Tensors] = dict(statistics or {})

    @classmethod
    def load(cls, bank: Bank, model: nn.Module) -> Self:
        """That of a bank, for a model of the bank's base, whatever its adapters.

        Raises:
            UserError: there is nothing to route some task of the bank by, or its file is damaged.
        """
        require_statistics(bank)
        return cls(model, bank.load_routers())

    @property
    def tasks(self) -> list[str]:
        return list(self.statistics)

    @abstractmethod
    def fit(self, task: str, batches: Iterable[Inputs]) -> Tensors:
        """Take a task's statistics from batches of its training samples, in place of those it had; returns them.

        The tensors are bfloat16, float16 or float32; what they say of a task depends on no other task.
        """

    @abstractmethod
    def route(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """The name of one of `tasks` for every sample of a batch, as the model takes it; no sample counts for another."""


def require_statistics(bank: Bank) -> None:
    """UserError unless a bank can find all its tasks."""
    missing = [task for task in bank.tasks if task not in bank.routed]
    if missing:
        raise UserError(
            f"{bank.path} has no router for {', '.join(missing)}; run its `lilora train` command again, which adds it, "
            "or name the task"
        )


TASK_IDENTIFIERS: Registry[type[TaskRouter]] = Registry("task identifier", "lilora.task_identifiers")


def register_task_identifier(router: type[TaskRouter]) -> type[TaskRouter]:
    """Class decorator: `lilora train --task-identifier` knows the router by its `name` from then on.

    A package of its own names the module that does so in the entry-point group `lilora.task_identifiers`, under that name.

    Raises:
        UserError: another one has the name.
    """
    return TASK_IDENTIFIERS.register(router.name, router)


def identifier_of(config: Mapping[str, Any]) -> type[TaskRouter]:
    """The one that a bank with this config has its statistics from; a bank names it only if it is not the default."""
    return TASK_IDENTIFIERS.find(config.get("task_identifier", NearestCentroid.name))


@register_task_identifier
class NearestCentroid(TaskRouter):
    """The task whose mean feature is nearest, by features of the frozen base model (`frozen_features`).

    The distance of a sample with feature x to task t is sum over i of (x_i - mean_ti)^2 / v_i: linear discriminant
    analysis with the diagonal of the pooled within-task covariance (Dudoit, Fridlyand and Speed, 2002), without class
    priors. v is the mean over tasks of their variances, weighted by samples, with a share SHRINKAGE of its own mean
    mixed in. So what varies little within tasks, as words that all prompts of a task have in common, counts much.
    Nothing is trained, and a task's statistics depend on no other's: `mean` and `variance` [D] and `count` [1], fp32.
    """

    name = "nearest-centroid"

    @classmethod
    def load(cls, bank: Bank, model: nn.Module) -> Self:
        router = super().load(bank, model)
        width = next((len(s["mean"]) for s in router.statistics.values() if "mean" in s and s["mean"].dim() == 1), 0)
        wanted = {"mean": (width,), "variance": (width,), "count": (1,)}
        for task, statistics in router.statistics.items():
            if {name: tuple(tensor.shape) for name, tensor in statistics.items()} != wanted:
                raise UserError(
                    f"{bank.path}: the router of task {task!r} has other tensors than mean, variance [{width}] and count [1]; "
                    "restore the bank from a copy"
                )
        return router

    def fit(self, task: str, batches: Iterable[Inputs]) -> Tensors:
        count, total, squares = 0, 0.0, 0.0
        for inputs in batches:
            features = frozen_features(self.model, inputs).double()
            count, total, squares = count + len(features), total + features.sum(0), squares + features.square().sum(0)
        if not count:
            raise UserError(f"there are no samples of task {task!r} to route by; pass at least one batch")
        mean = total / count
        statistics = {"mean": mean, "variance": (squares / count - mean.square()).clamp_min(0)}
        statistics["count"] = mean.new_tensor([count])
        self.statistics[task] = {name: tensor.float().cpu() for name, tensor in statistics.items()}
        return self.statistics[task]

    @torch.no_grad()
    def distances(self, features: Tensor) -> Tensor:
        """[B, T] from features [B, D]; UserError if the tasks' statistics are of another width."""
        mean, variance, count = (
            torch.stack([statistics[name] for statistics in self.statistics.values()]).to(features.device)
            for name in ("mean", "variance", "count")
        )  # [T, D], [T, D], [T, 1]
        if features.shape[1] != mean.shape[1]:
            raise UserError(
                f"this model has {features.shape[1]} features and the router's tasks {mean.shape[1]}; give the base model that "
                "it was fitted with"
            )
        pooled = (count * variance).sum(0) / count.sum()
        # The least number stands for a variance of 0, as one sample of every task has.
        scale = torch.lerp(pooled, pooled.mean(), SHRINKAGE).clamp_min(torch.finfo(pooled.dtype).tiny).sqrt()
        # By products of matrices, a sample's distances would depend on the others.
        return torch.cdist(features / scale, mean / scale, compute_mode="donot_use_mm_for_euclid_dist").square()

    def route(self, inputs: Mapping[str, Tensor]) -> list[str]:
        if not self.statistics:
            raise UserError("this router knows no task; call fit(task, batches), or load one from a bank")
        tasks = self.tasks
        return [tasks[i] for i in self.distances(frozen_features(self.model, inputs)).argmin(1).tolist()]


@torch.no_grad()
def frozen_features(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Features of the samples of a batch by the base model alone, without a step of the language model; [B, D] fp32.

    The direction of the mean input embedding of the prompt's text, and that of the mean over the sample's image tokens of
    what the language model would be given for them (0 without images). Of a model of two encoders, such as CLIP, the
    direction of the image's embedding. Padding, answers that labels mark, and adapters have no part in it.

    Raises:
        UserError: inputs hold nothing that this model makes features of.
        ValueError: the images do not explain the image tokens.
    """
    tower = next((m for m in reversed(list(model.modules())) if hasattr(type(m), "get_image_features")), None)
    device, dtype = model.device, model.dtype
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }
    input_ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
    image_token = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    two_encoders = tower is not None and image_token is None
    needed = "pixel_values" if two_encoders else "input_ids"
    if needed not in inputs:
        raise UserError(f"{type(tower or model).__name__} routes a batch by its {needed}, which are missing; pass them")
    if pixels is not None and tower is None:
        raise UserError(f"{type(model).__name__} has no vision tower, but the batch has pixel_values; leave them out")
    with evaluating(model), without_adapters(model):
        if two_encoders:
            return F.normalize(tower.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
        embedding = model.get_input_embeddings()
        text = prompt_mean(embedding, image_token, input_ids, inputs.get("attention_mask"), inputs.get("labels"))
        vision = torch.zeros_like(text)
        if pixels is not None:
            rows = image_rows(tower, inputs)
            owner = (input_ids == image_token).nonzero()[:, 0]  # images lie in the order of their tokens
            if len(owner) != len(rows):
                raise ValueError(
                    f"the images make {len(rows)} image tokens and input_ids hold {len(owner)}; check the images of the batch"
                )
            member = (owner == torch.arange(len(text), device=device)[:, None]).float()
            vision = F.normalize(member @ rows, dim=-1)
    return torch.cat([text, vision], 1)


def image_rows(tower: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What takes the places of the image tokens of a batch, one after the other: [tokens, H] fp32."""
    wanted = inspect.signature(tower.get_image_features).parameters
    images = tower.get_image_features(**{name: value for name, value in inputs.items() if name in wanted}).pooler_output
    return torch.cat([image.reshape(-1, image.shape[-1]) for image in images]).float()


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let PEFT's layers be their base layers; PEFT's own disable_adapter() would change what requires gradients."""
    plain = [m for m in model.modules() if isinstance(m, AdaptedLinear) and not isinstance(m, BaseTunerLayer)]
    if plain:
        raise UserError(
            f"a router wants the adapters of get_peft_model, which it can turn off, not {type(plain[0]).__name__}"
        )
    layers = [
        m
        for m in model.modules()
        if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) and not m.disable_adapters
    ]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
