"""CLIP on image classification: image-prompt pairs and their contrastive loss, and zero-shot heads."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from rich.markup import escape
from rich.progress import Progress
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, CLIPModel
from transformers.models.clip.modeling_clip import CLIPOutput

from lilora.errors import UserError
from lilora.methods import Method
from lilora.methods.base import evaluating

from .classification import ImageTask, LabelledImage, LabelledImages
from .evaluate import RoutedScore, TaskScore
from .images import images_for
from .memory import InParts
from .mixing import TaskSamples
from .task_identification import TaskRouter

Classified = Callable[..., list[str]]


class ContrastiveCLIP(CLIPModel):
    """CLIP whose forward, given labels [B] of its B image-prompt pairs, puts out their contrastive loss."""

    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch, the pairs of all batches of a step

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CLIPOutput:
        outputs = super().forward(input_ids, pixel_values, attention_mask)
        if labels is not None:
            loss = contrastive_loss(outputs.logits_per_image, labels)
            outputs.loss = loss if num_items_in_batch is None else loss * (len(labels) / num_items_in_batch)
        return outputs


def contrastive_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(CE(logits, Y) + CE(logits^T, Y)) / 2, Y[i, j] = [label_i = label_j] / #{j: label_j = label_i}; fp32, a scalar.

    logits [B, B]: images x prompts. The loss of DAC's released code (arXiv 2601.22828): pairs of one class all match.
    """
    logits = logits.float()
    same = (labels[:, None] == labels).to(logits.dtype)
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def load(model: str, dtype: torch.dtype | str) -> tuple[ContrastiveCLIP, AutoProcessor]:
    """Base model and processor; UserError for a model that is no CLIP."""
    kind = AutoConfig.from_pretrained(model).model_type
    if kind != "clip":
        raise UserError(
            f"--model {model} is of type {kind!r}; classification tasks want a model of type 'clip', or one of images alone"
        )
    return ContrastiveCLIP.from_pretrained(model, dtype=dtype), AutoProcessor.from_pretrained(model)


class PairCollator:
    """Batches of (number of a task, LabelledImage) as image-prompt pairs: pixel_values, input_ids and attention_mask
    [B, L], labels [B] int64.

    Templates are drawn from torch's generator for a whole task, or for each sample from the batch's own indices, so
    that a resumed run draws the same. classes: of each task; classes of one name are one, whatever their task.
    """

    def __init__(self, specs: Sequence[ImageTask], classes: Sequence[list[str]], processor) -> None:
        self.specs, self.classes, self.processor = specs, classes, processor
        self.numbers = {name: i for i, name in enumerate(dict.fromkeys(name for names in classes for name in names))}
        self.of_task = [
            int(torch.randint(len(spec.templates), (1,))) if spec.template_per == "task" else None for spec in specs
        ]

    def __call__(self, batch: list[tuple[int, LabelledImage]]) -> dict[str, Tensor]:
        rng = random.Random(str([sample.index for _, sample in batch]))
        prompts, labels = [], []
        for task, sample in batch:
            spec, name, template = self.specs[task], self.classes[task][sample.label], self.of_task[task]
            prompts.append(spec.prompt(rng.randrange(len(spec.templates)) if template is None else template, name))
            labels.append(self.numbers[name])
        images = [sample for _, sample in batch]
        return {
            **tokenised(self.processor, prompts),
            **pixels(self.processor, images),
            "labels": torch.tensor(labels),
        }


def tokenised(processor, prompts: list[str]) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, L] int64; a name that spells a control token is text."""
    options = {"padding": True, "truncation": True, "split_special_tokens": True}
    return dict(processor.tokenizer(prompts, return_tensors="pt", **options))


def pixels(processor, batch: Sequence[LabelledImage]) -> dict[str, Tensor]:
    """pixel_values [B, 3, H, W] fp32, and what else the image processor makes, if anything."""
    images = images_for(processor, [sample.path for sample in batch])
    return dict(getattr(processor, "image_processor", processor)(images, return_tensors="pt"))


def training_data(specs: Sequence[ImageTask], processor) -> tuple[TaskSamples, PairCollator]:
    parts = [LabelledImages(spec, "train") for spec in specs]
    return TaskSamples(parts), PairCollator(specs, [part.classes for part in parts], processor)


@torch.inference_mode()
def evaluate(
    method: Method, processor, tasks: Sequence[ImageTask], batch_size: int, progress: Progress | None = None
) -> list[TaskScore]:
    """Top-1 accuracy on the tasks' test images, with a zero-shot head for each, over the classes of the label space.

    A method that needs the task is given it; tasks that it was not trained on yet get the base model.
    """
    scores = []
    for spec in tasks:
        data = LabelledImages(spec, "test")
        said = zero_shot(method, processor, spec, data, [spec.name] * len(data), batch_size, progress)
        scores.append(score(spec, data, said))
    return scores


@torch.inference_mode()
def evaluate_routed(
    method: Method,
    processor,
    router: TaskRouter,
    tasks: Sequence[ImageTask],
    given: Sequence[TaskScore],
    batch_size: int,
    progress: Progress | None = None,
    classified: Classified | None = None,
) -> list[RoutedScore]:
    """The same with each image's task as the router finds it: that task's model embeds the image and the class names.

    classified: what a task's model says to images, by default those of CLIP.
    """
    classified = classified or zero_shot
    scores = []
    for spec, result in zip(tasks, given, strict=True):
        data = LabelledImages(spec, "test")
        starts = range(0, len(data), batch_size)
        found: list[str] = []
        route = InParts(lambda part: router.route(pixels(processor, part)), f"finding the tasks of {spec.name}")
        for start in starts if progress is None else progress.track(starts, description=escape(f"routing {spec.name}")):
            found += route(data.samples[start : start + batch_size])
        routed = score(spec, data, classified(method, processor, spec, data, found, batch_size, progress))
        scores.append(RoutedScore(result, routed, dict(Counter(found))))
    return scores


def zero_shot(
    method: Method,
    processor,
    spec: ImageTask,
    data: LabelledImages,
    tasks: Sequence[str],
    batch_size: int,
    progress: Progress | None,
) -> list[str]:
    """What the model of a task says to each image: a class of the label space of `spec`, with its task if that is another."""
    said = [""] * len(data)
    heads, choices = label_space(spec, method.tasks)
    bar = None if progress is None else progress.add_task(escape(f"evaluating {spec.name}"), total=len(data))
    with evaluating(method.model):
        for task in dict.fromkeys(tasks):
            places = [i for i, name in enumerate(tasks) if name == task]
            with of_task(method, task):
                classes = torch.cat(
                    [class_embeddings(method.model, processor, *head, batch_size) for head in heads]  # [C, D]
                )

                def best(part: list[int], classes: Tensor = classes) -> list[int]:
                    batch = pixels(processor, [data.samples[i] for i in part])
                    images = embedded(method.model.get_image_features, method.model, batch)
                    return (images @ classes.T).argmax(1).tolist()

                choose = InParts(best, f"evaluating {spec.name}")
                for start in range(0, len(places), batch_size):
                    own = places[start : start + batch_size]
                    for i, chosen in zip(own, choose(own), strict=True):
                        said[i] = choices[chosen]
                    if progress is not None:
                        progress.advance(bar, len(own))
    if progress is not None:
        progress.remove_task(bar)
    return said


def label_space(spec: ImageTask, trained: Sequence[str]) -> tuple[list[tuple[ImageTask, list[str]]], list[str]]:
    """(tasks with those of their classes that an image of `spec` may be taken for, what each class is called in print).

    Classes with the same prompts cannot be told apart and are one, that of the first of their tasks.
    """
    own = {spec.prompts(name): name for name in spec.class_names()}
    heads, called = [], {}
    for task in spec.rivals(trained):
        names = {task.prompts(name): name for name in task.class_names()}
        new = {prompts: name for prompts, name in names.items() if prompts not in called}
        called |= {prompts: own.get(prompts, f"{name} ({task.name})") for prompts, name in new.items()}
        heads += [(task, list(new.values()))] if new else []
    return heads, list(called.values())


def score(spec: ImageTask, data: LabelledImages, said: Sequence[str]) -> TaskScore:
    """Percentage of the images whose class was said."""
    answers = [
        {"id": str(sample.path), "answer": answer, "reference": data.classes[sample.label]}
        for sample, answer in zip(data.samples, said, strict=True)
    ]
    right = sum(answer["answer"] == answer["reference"] for answer in answers)
    return TaskScore(spec.name, 100 * right / len(answers), None, answers)


def of_task(method: Method, task: str) -> AbstractContextManager:
    if method.needs_task and task not in method.tasks:
        return method.model.disable_adapter()
    method.activate(task, train=False)
    return nullcontext()


def class_embeddings(model, processor, spec: ImageTask, classes: list[str], batch_size: int) -> Tensor:
    """The zero-shot head [C, D]: of each class the mean over the templates of its embedded prompts, normalised."""
    prompts = [prompt for name in classes for prompt in spec.prompts(name)]
    parts = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    embed = InParts(
        lambda part: list(embedded(model.get_text_features, model, tokenised(processor, part))),
        f"the class names of {spec.name}",
    )
    texts = torch.stack([row for part in parts for row in embed(part)])
    return F.normalize(texts.view(len(classes), len(spec.templates), -1).mean(1), dim=-1)


def embedded(encode, model, inputs: dict[str, Tensor]) -> Tensor:
    """[B, D] fp32, rows of norm 1."""
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    inputs = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    return F.normalize(encode(**inputs).pooler_output.float(), dim=-1)
