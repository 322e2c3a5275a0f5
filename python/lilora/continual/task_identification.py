"""The task of every sample of a batch, from the batch alone: for inference without a task id."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lilora.bank.bank import Bank
from lilora.errors import UserError
from lilora.methods.base import Inputs, Tensors, evaluating
from lilora.methods.pclr.queries import image_features, image_token_of, prompt_mean
from lilora.registry import Registry
from lilora_kernels.layers.base import AdaptedLinear

SAMPLES = 512  # training samples of a task that its centroids are means of
MODES, MODE_SAMPLES = 4, 16  # the most centroids of a task, and the fewest samples that one is the mean of
SHRINKAGE = 0.01
KEPT, WEIGHT_DECAY = 256, 1e-3  # of a linear probe


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
            f"{bank.path} has no router for {', '.join(missing)}; run its `lilora train` command again, which adds it "
            "or says why not, or name the task"
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
    """The task with the nearest centroid, by features of the frozen base model (`frozen_features`).

    The distance of a sample with feature x to a centroid is sum over i of (x_i - mean_i)^2 / v_i: linear discriminant
    analysis with the diagonal of the pooled within-task covariance (Dudoit, Fridlyand and Speed, 2002), without class
    priors. v is the mean over tasks of their variances, weighted by samples, with a share SHRINKAGE of its own mean
    mixed in. So what varies little within tasks, as words that all prompts of a task have in common, counts much.

    A task whose features have several modes has a centroid for each, up to `modes`, found by k-means; their number is that
    with the least Bayesian information criterion (Schwarz, 1978; Pelleg and Moore, 2000). A task's statistics depend on no
    other's: `mean` [D], or [modes, D], `variance` [D] around them and `count` [modes], fp32.
    """

    name = "nearest-centroid"
    modes = MODES

    @classmethod
    def load(cls, bank: Bank, model: nn.Module) -> Self:
        router = super().load(bank, model)
        width = next((s["mean"].shape[-1] for s in router.statistics.values() if "mean" in s and s["mean"].dim()), 0)
        for task, statistics in router.statistics.items():
            found = {name: tuple(tensor.shape) for name, tensor in statistics.items()}
            modes = len(statistics["mean"]) if len(found.get("mean", ())) == 2 else 1
            mean = (width,) if modes == 1 else (modes, width)
            if found != {"mean": mean, "variance": (width,), "count": (modes,)}:
                raise UserError(
                    f"{bank.path}: the router of task {task!r} has other tensors than mean, variance [{width}] and count; "
                    "restore the bank from a copy"
                )
        return router

    def fit(self, task: str, batches: Iterable[Inputs]) -> Tensors:
        parts = [frozen_features(self.model, inputs).double() for inputs in batches]
        if not parts:
            raise UserError(f"there are no samples of task {task!r} to route by; pass at least one batch")
        features = torch.cat(parts)
        mode = modes_of(features, self.modes)
        count = mode.bincount()
        mean = torch.zeros(len(count), features.shape[1], dtype=features.dtype, device=features.device)
        mean.index_add_(0, mode, features).div_(count[:, None])
        statistics = {"mean": mean[0] if len(mean) == 1 else mean, "variance": (features - mean[mode]).square().mean(0)}
        statistics["count"] = count
        self.statistics[task] = {name: tensor.float().cpu() for name, tensor in statistics.items()}
        return self.statistics[task]

    def centroids(self) -> tuple[Tensor, Tensor, Tensor]:
        """(mean [C, D] of all centroids, the position [C] of each one's task, scale [D] of a distance of 1)."""
        means = [s["mean"].view(-1, s["mean"].shape[-1]) for s in self.statistics.values()]
        owner = torch.arange(len(means)).repeat_interleave(torch.tensor([len(mean) for mean in means]))
        variance = torch.stack([s["variance"] for s in self.statistics.values()])  # [T, D]
        count = torch.stack([s["count"].sum(0, keepdim=True) for s in self.statistics.values()])  # [T, 1]
        pooled = (count * variance).sum(0) / count.sum()
        # The least number stands for a variance of 0, as one sample of every task has.
        scale = torch.lerp(pooled, pooled.mean(), SHRINKAGE).clamp_min(torch.finfo(pooled.dtype).tiny).sqrt()
        return torch.cat(means), owner, scale

    @torch.no_grad()
    def distances(self, features: Tensor) -> Tensor:
        """[B, T] from features [B, D]; UserError if the tasks' statistics are of another width."""
        mean, owner, scale = (tensor.to(features.device) for tensor in self.centroids())
        require_width(features, mean)
        # By products of matrices, a sample's distances would depend on the others.
        to_all = torch.cdist(features / scale, mean / scale, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest = to_all.new_full((len(features), len(self.statistics)), torch.inf)
        return nearest.scatter_reduce(1, owner.expand(len(features), -1), to_all, "amin")

    def route(self, inputs: Mapping[str, Tensor]) -> list[str]:
        if not self.statistics:
            raise UserError("this router knows no task; call fit(task, batches), or load one from a bank")
        tasks = self.tasks
        return [tasks[i] for i in self.distances(frozen_features(self.model, inputs)).argmin(1).tolist()]


@register_task_identifier
class LinearProbe(TaskRouter):
    """A linear classifier of tasks on features of the frozen base model (`frozen_features`).

    A bank keeps KEPT features of every task's training samples, `features` [n, D] in fp16; the classifier is trained on them
    whenever it is needed and tasks have come: softmax regression with the weight decay WEIGHT_DECAY by L-BFGS, on features
    at mean 0 and deviation 1, in fp64. The same features give the same classifier.
    """

    name = "linear-probe"
    _probe: tuple[Tensor, Tensor] | None = None

    @classmethod
    def load(cls, bank: Bank, model: nn.Module) -> Self:
        router = super().load(bank, model)
        shapes = {task: {n: list(t.shape) for n, t in own.items()} for task, own in router.statistics.items()}
        width = next((s["features"][-1] for s in shapes.values() if len(s.get("features", ())) == 2), 0)
        for task, found in shapes.items():
            rows = found.get("features", [0])[0] if found.get("features") else 0
            if not rows or found != {"features": [rows, width]}:
                raise UserError(
                    f"{bank.path}: the router of task {task!r} has other tensors than features [n, {width}]; restore the bank "
                    "from a copy"
                )
        return router

    def fit(self, task: str, batches: Iterable[Inputs]) -> Tensors:
        parts = [frozen_features(self.model, inputs) for inputs in batches]
        if not parts:
            raise UserError(f"there are no samples of task {task!r} to route by; pass at least one batch")
        features = torch.cat(parts)
        kept = torch.linspace(0, len(features) - 1, min(KEPT, len(features))).long()
        self.statistics[task], self._probe = {"features": features[kept].half().cpu()}, None
        return self.statistics[task]

    def route(self, inputs: Mapping[str, Tensor]) -> list[str]:
        if not self.statistics:
            raise UserError("this router knows no task; call fit(task, batches), or load one from a bank")
        if self._probe is None:
            self._probe = self._trained()
        features = frozen_features(self.model, inputs)
        weight, bias = (tensor.to(features.device) for tensor in self._probe)
        require_width(features, weight)
        # Not by a product of matrices, in which a sample's scores would depend on the others.
        scores = features.unsqueeze(1).mul(weight).sum(2) + bias
        return [self.tasks[i] for i in scores.argmax(1).tolist()]

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _trained(self) -> tuple[Tensor, Tensor]:
        """weight [T, D] and bias [T] of features [B, D], fp32 on the CPU."""
        parts = [own["features"].clone() for own in self.statistics.values()]
        label = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
        x = torch.cat(parts).double()
        centre, scale = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
        x = (x - centre) / scale
        weight = torch.zeros(len(parts), x.shape[1], dtype=x.dtype, requires_grad=True)
        bias = torch.zeros(len(parts), dtype=x.dtype, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ weight.T + bias, label) + WEIGHT_DECAY * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        weight = (weight / scale).detach()
        return weight.float(), (bias.detach() - weight @ centre).float()


def require_width(features: Tensor, known: Tensor) -> None:
    """UserError unless features [B, D] are as wide as what is known of the tasks."""
    if features.shape[1] != known.shape[1]:
        raise UserError(
            f"this model has {features.shape[1]} features and the router's tasks {known.shape[1]}; give the base model that it "
            "was fitted with"
        )


def modes_of(features: Tensor, most: int) -> Tensor:
    """The mode [n] of each of features [n, D], fp64, numbered from 0, of at most `most`."""
    n, width = features.shape
    floor = (SHRINKAGE * features.var(0, correction=0).mean()).clamp_min(torch.finfo(features.dtype).tiny)
    best, least = torch.zeros(n, dtype=torch.int64, device=features.device), torch.inf
    for k in range(1, most + 1):
        mode = _clusters(features, k)
        if mode is None:
            break
        mean = torch.stack([features[mode == i].mean(0) for i in range(k)])
        within = (features - mean[mode]).square().mean(0) + floor
        share = mode.bincount() / n
        entropy = -(share * share.log()).sum()
        criterion = (n * (within.log().sum() + 2 * entropy) + (k + 1) * width * math.log(n)).item()
        if criterion >= least:
            break
        best, least = mode, criterion
    return best


def _clusters(x: Tensor, k: int) -> Tensor | None:
    """k-means on x [n, D] from k-means++ starts of a fixed seed: the cluster [n] of each; None if one is too small."""
    generator = torch.Generator().manual_seed(0)
    centres = x.mean(0, keepdim=True) if k == 1 else x[torch.randint(len(x), (1,), generator=generator)]
    while len(centres) < k:
        far = torch.cdist(x, centres).amin(1).square().cpu()
        if not far.any():
            return None
        centres = torch.cat([centres, x[torch.multinomial(far, 1, generator=generator)]])
    cluster = None
    for _ in range(50):
        before, cluster = cluster, torch.cdist(x, centres).argmin(1)
        if k > 1 and cluster.bincount(minlength=k).min() < MODE_SAMPLES:
            return None
        if before is not None and torch.equal(before, cluster):
            break
        centres = torch.stack([x[cluster == i].mean(0) for i in range(k)])
    return cluster


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
    tower: Any = next((m for m in reversed(list(model.modules())) if hasattr(type(m), "get_image_features")), None)
    device, dtype = model.device, model.dtype
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }
    input_ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
    image_token = image_token_of(model)
    two_encoders = tower is not None and image_token is None
    images_alone = tower is None and model.main_input_name == "pixel_values"
    needed = "pixel_values" if two_encoders or images_alone else "input_ids"
    if needed not in inputs:
        raise UserError(f"{type(tower or model).__name__} routes a batch by its {needed}, which are missing; pass them")
    if pixels is not None and tower is None and not images_alone:
        raise UserError(f"{type(model).__name__} has no vision tower, but the batch has pixel_values; leave them out")
    with evaluating(model), without_adapters(model):
        if two_encoders:
            return F.normalize(tower.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
        if images_alone:
            return F.normalize(pooled(model, inputs), dim=-1)
        embedding = model.get_input_embeddings()
        text = prompt_mean(embedding, image_token, input_ids, inputs.get("attention_mask"), inputs.get("labels"))
        vision = torch.zeros_like(text)
        if pixels is not None:
            rows = image_rows(tower, inputs)
            owner = torch.nonzero(input_ids == image_token)[:, 0]  # images lie in the order of their tokens
            if len(owner) != len(rows):
                raise ValueError(
                    f"the images make {len(rows)} image tokens and input_ids hold {len(owner)}; check the images of the batch"
                )
            member = (owner == torch.arange(len(text), device=device)[:, None]).float()
            vision = F.normalize(member @ rows, dim=-1)
    return torch.cat([text, vision], 1)


def pooled(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, D] fp32 of a model of images alone: what its `classifier` is given, or its pooled output if it has none.

    UserError if there is neither.
    """
    read: list[Tensor] = []
    classifier = getattr(model, "classifier", None)
    with ExitStack() as hooked:
        if classifier is not None:
            hook = classifier.register_forward_pre_hook(lambda module, args: read.append(args[0]))
            hooked.callback(hook.remove)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    found = read[0] if read else outputs.get("pooler_output")
    if found is None or found.dim() != 2:
        raise UserError(f"{type(model).__name__} puts out no pooled feature of an image; choose another base model")
    return found.float()


def image_rows(tower: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What takes the places of the image tokens of a batch, one after the other: [tokens, H] fp32."""
    images = image_features(tower, inputs).pooler_output
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
