"""Image classification with a model of images alone: a linear classifier for each task, trained with its adapters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from lilora.bank.bank import Bank
from lilora.errors import UserError
from lilora.methods import Method
from lilora.methods.base import Tensors, evaluating

from .classification import ImageTask, LabelledImage, LabelledImages
from .clip import pixels, score
from .evaluate import TaskScore, in_batches, in_turn
from .mixing import TaskSamples
from .task_identification import pooled

STORED = "state.head."  # of a head's weight and bias in a bank


class TaskHeads(nn.Module):
    """A linear classifier per task, in fp32: features [B, D] -> logits [B, C].

    Each row is classified for the task that `of_rows` names, and has -inf beyond its classes; without, all are for the task
    in training. Before there is one the features themselves come out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        self.classes: dict[str, list[str]] = {}
        self.trained: str | None = None
        self._rows: Sequence[str] | None = None

    def add(self, task: str, classes: Sequence[str], width: int, device: torch.device) -> nn.Linear:
        """A new head, drawn from torch's generator."""
        head = nn.Linear(width, len(classes), dtype=torch.float32)
        self.heads[task] = head.to(device).requires_grad_(False)
        self.classes[task] = list(classes)
        return self.heads[task]

    def train_only(self, task: str) -> None:
        self.trained = task
        for name, head in self.heads.items():
            head.requires_grad_(name == task)

    def stored(self, task: str) -> Tensors:
        """A head's tensors as a bank names them."""
        return {f"{STORED}{name}": tensor for name, tensor in self.heads[task].named_parameters()}

    @contextmanager
    def of_rows(self, tasks: Sequence[str]) -> Iterator[None]:
        before, self._rows = self._rows, tasks
        try:
            yield
        finally:
            self._rows = before

    def forward(self, features: Tensor) -> Tensor:
        features = features.float()
        if self._rows is None:
            return features if self.trained is None else self.heads[self.trained](features)
        tasks, known = self._rows, dict.fromkeys(self._rows)
        logits = features.new_full((len(features), max(len(self.classes[task]) for task in known)), -torch.inf)
        for task in known:
            rows = torch.tensor([i for i, name in enumerate(tasks) if name == task], device=features.device)
            own = F.pad(
                self.heads[task](features[rows]), (0, logits.shape[1] - len(self.classes[task])), value=-torch.inf
            )
            logits = logits.index_copy(0, rows, own)
        return logits


class _Headed:
    """A model of images whose classifier is `TaskHeads`; given labels [B] its forward puts out their mean cross-entropy."""

    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch, the images of all batches of a step
    # A checkpoint may hold a classifier of its own, a pooler, a text tower.
    _keys_to_ignore_on_load_unexpected = [r"."]  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.reads_pooled = not hasattr(self, "classifier")
        if not self.reads_pooled and not isinstance(self.classifier, nn.Identity | nn.Linear):
            raise UserError(
                f"the classifier of {type(self).__name__} is no linear layer, so tasks cannot have their own"
            )
        self.classifier = TaskHeads()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **inputs: Tensor,
    ) -> ImageClassifierOutput:
        outputs = super().forward(pixel_values=pixel_values, **inputs)
        if not self.reads_pooled:
            logits = outputs.logits
        elif outputs.get("pooler_output") is not None:
            logits = self.classifier(outputs.pooler_output)
        else:
            raise UserError(f"{type(self).__name__} puts out no pooled feature to classify; choose another base model")
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels, reduction="sum")
            loss = loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return ImageClassifierOutput(loss=loss, logits=logits)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """transformers' image classifier for a config, or the plain model where it has none; None for one of more than images."""
    for auto in (AutoModelForImageClassification, AutoModel):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            found = found[0] if isinstance(found, tuple) else found
            return found if found.main_input_name == "pixel_values" else None
    return None


def is_vision_model(model: str) -> bool:
    """Whether the config of a model folder or hub id is of a model of images alone. CLIP, whose class names are texts, is not."""
    config = AutoConfig.from_pretrained(model)
    return config.model_type != "clip" and model_class(config) is not None


def load(model: str, dtype: torch.dtype | str) -> tuple[PreTrainedModel, AutoImageProcessor]:
    """Base model without a head, and processor.

    The feature that heads classify is what the family's own image classifier does; without one it is `pooler_output`.
    """
    config = AutoConfig.from_pretrained(model)
    config.id2label = config.label2id = {}
    plain = model_class(config)
    cls = type(plain.__name__, (_Headed, plain), {"__module__": __name__})
    base, loaded = cls.from_pretrained(model, config=config, dtype=dtype, output_loading_info=True)
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"the checkpoint lacks {len(missing)} weights of {plain.__name__}, such as {missing[0]}; give another"
        )
    return base, AutoImageProcessor.from_pretrained(model)


def training_data(specs: Sequence[ImageTask], processor) -> tuple[TaskSamples, "ImageCollator"]:
    return TaskSamples([LabelledImages(spec, "train") for spec in specs]), ImageCollator(processor)


class ImageCollator:
    """Batches of (number of its task, LabelledImage): what the processor makes of images, pixel_values [B, 3, H, W] among it,
    and labels [B] int64."""

    def __init__(self, processor) -> None:
        self.processor = processor

    def __call__(self, batch: list[tuple[int, LabelledImage]]) -> dict[str, Tensor]:
        samples = [sample for _, sample in batch]
        return pixels(self.processor, samples) | {"labels": torch.tensor([sample.label for sample in samples])}


@torch.inference_mode()
def evaluate(
    method: Method, processor, tasks: Sequence[ImageTask], batch_size: int, progress: Progress | None = None
) -> list[TaskScore]:
    """Top-1 accuracy on the tasks' test images, each with its task's head; mixed batches where the method can."""
    data = {spec.name: LabelledImages(spec, "test") for spec in tasks}
    for name, images in data.items():
        require_classes(method, name, images.classes)
    requests = in_turn(data)
    said: dict[str, list[str]] = {name: [] for name in data}
    for (name, _), answer in zip(requests, answers_to(method, processor, requests, batch_size, progress), strict=True):
        said[name].append(answer)
    return [score(spec, data[spec.name], said[spec.name]) for spec in tasks]


def classified(
    method: Method,
    processor,
    spec: ImageTask,
    data: LabelledImages,
    tasks: Sequence[str],
    batch_size: int,
    progress: Progress | None,
) -> list[str]:
    """What each image is called by the head of its task in `tasks`: one of that task's classes."""
    return answers_to(method, processor, list(zip(tasks, data.samples, strict=True)), batch_size, progress)


def answers_to(
    method: Method,
    processor,
    requests: Sequence[tuple[str, LabelledImage]],
    batch_size: int,
    progress: Progress | None,
) -> list[str]:
    """The class that a task finds in each (task, image)."""
    heads: TaskHeads = method.base.classifier

    def answer(part: Sequence[tuple[str, LabelledImage]]) -> list[str]:
        names = [task for task, _ in part]
        inputs = {
            name: value.to(method.model.device) for name, value in pixels(processor, [i for _, i in part]).items()
        }
        inputs = {n: v.to(method.model.dtype) if v.is_floating_point() else v for n, v in inputs.items()}
        ids = {"task_ids": names} if method.mixed_batches and method.needs_task else {}
        with heads.of_rows(names):
            chosen = method.model(**inputs, **ids).logits.argmax(1).tolist()
        return [heads.classes[task][i] for task, i in zip(names, chosen, strict=True)]

    return in_batches(method, requests, answer, batch_size, progress)


def require_classes(method: Method, task: str, classes: Sequence[str]) -> None:
    """UserError unless a task's head was trained for these classes, in whatever order."""
    trained = method.base.classifier.classes[task]
    if sorted(trained) != sorted(classes):
        raise UserError(
            f"task {task!r} was trained with the classes {', '.join(trained)}, and the manifest has {', '.join(classes)}; give "
            "the manifest of its training"
        )


# --- heads in training and in a bank --------------------------------------------------------------------------------------


def train_head(base: nn.Module, task: str, classes: Sequence[str], inputs: dict[str, Tensor]) -> None:
    """Add a head for a task, as wide as the features of a batch of its images, and let it train, and no other."""
    with torch.no_grad(), evaluating(base):
        width = pooled(base, inputs).shape[1]
    base.classifier.add(task, classes, width, base.device)
    base.classifier.train_only(task)


def take_heads(base: nn.Module, bank: Bank, tasks: dict[str, tuple[Tensors, Tensors]]) -> None:
    """Give the base model the heads of a bank's tasks, out of their tensors."""
    for record in bank.describe()["tasks"]:
        own, _ = tasks[record["name"]]
        weight, bias = (own.pop(f"{STORED}{name}") for name in ("weight", "bias"))
        head = base.classifier.add(record["name"], record["info"]["classes"], weight.shape[1], base.device)
        if head.weight.shape != weight.shape or head.bias.shape != bias.shape:
            raise UserError(
                f"{bank.path}: the head of task {record['name']!r} has not the size of its classes; restore it from a copy"
            )
        with torch.no_grad():
            head.weight.copy_(weight), head.bias.copy_(bias)


def head_of(bank: Bank, task: str) -> tuple[Tensors, list[str]]:
    """(weight [C, D] and bias [C], the names of the C classes) of a task's head."""
    own, _ = bank.load_task(task)
    (record,) = (record for record in bank.describe()["tasks"] if record["name"] == task)
    head = {name: own[f"{STORED}{name}"] for name in ("weight", "bias")}
    return head, record["info"]["classes"]


def own_head(base: PreTrainedModel, bank: Bank, task: str) -> None:
    """Let a task's head be the model's own classifier, in its dtype, as transformers saves and loads it."""
    require_classifier(base.config)
    head, classes = head_of(bank, task)
    base.classifier = nn.Linear(*reversed(head["weight"].shape), dtype=base.dtype)
    base.classifier.load_state_dict(head)
    base.config.id2label = dict(enumerate(classes))
    base.config.label2id = {name: i for i, name in enumerate(classes)}
    base.config.architectures = [type(base).__name__]


def exported_head(bank: Bank, task: str) -> tuple[Tensors, str]:
    """(a task's head as tensors of its model, what `from_pretrained` must be told to have a place for it)."""
    try:
        config = AutoConfig.from_pretrained(bank.base_model.id)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the config of the base model {bank.base_model.id} cannot be read, which tells what its classifier is called; put "
            "the model back"
        ) from error
    require_classifier(config)
    head, classes = head_of(bank, task)
    named = {f"classifier.{name}": tensor for name, tensor in head.items()}
    return named, f", num_labels={len(classes)}, ignore_mismatched_sizes=True"


def require_classifier(config: PreTrainedConfig) -> None:
    """UserError for a family that transformers has no image classifier of."""
    if type(config) not in AutoModelForImageClassification._model_mapping:
        raise UserError(
            f"transformers has no image classifier of type {config.model_type!r} that a task's head could be a part of; use "
            "lilora eval"
        )
