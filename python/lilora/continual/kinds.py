"""The kinds of runs: what the tasks of a manifest are to training and evaluation, with the base model's part in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from lilora.continual import clip, evaluate, text_models, vision
from lilora.errors import UserError
from lilora.methods import METHODS, Method

from .collator import Collator
from .images import extreme_images
from .instructions import TaskSpec, instruction_data
from .mixing import TaskSamples
from .task_sequence import Manifest

Collate = Callable[[list], dict[str, Tensor]]


@dataclass(frozen=True)
class Kind:
    """load(model, dtype): a base model whose forward puts out the loss of a training batch, and its processor.
    check(task, processor): raises UserError where the processor cannot make batches of the task's samples.
    training_data(tasks, processor): their samples, and what makes a batch of them. evaluate(method, processor, tasks,
    batch_size, progress): the tasks' scores; evaluate_routed(method, processor, router, tasks, those scores, batch_size,
    progress): the same without the task. pipeline, auto_class: what the hub and transformers call such models. answers:
    whether samples have answers in tokens, which the model writes, as some methods want. one_process_reason: why several
    processes cannot train on them together. heads: whether each task has a classifier of its own (`vision.TaskHeads`).
    """

    load: Callable[[str, torch.dtype | str], tuple[nn.Module, Any]]
    check: Callable[[Any, Any], None]
    training_data: Callable[[Sequence[Any], Any], tuple[TaskSamples, Collate]]
    evaluate: Callable[..., list[evaluate.TaskScore]]
    evaluate_routed: Callable[..., list[evaluate.RoutedScore]]
    pipeline: str
    auto_class: str
    answers: bool = True
    one_process_reason: str | None = None
    heads: bool = False

    def needs_task(self, method: type[Method]) -> bool:
        """Whether inference must be given the task."""
        return method.needs_task or self.heads

    def check_method(self, method: type[Method]) -> None:
        """UserError for a method that cannot train such tasks."""
        fit = sorted(
            name
            for name, other in METHODS.items()
            if (self.answers or not other.answers_only) and not (self.heads and other.trains_on != "task")
        )
        if method.answers_only and not self.answers:
            raise UserError(
                f"--method {method.name} cannot train on tasks of this kind of manifest; choose one of {', '.join(fit)}"
            )
        if self.heads and method.trains_on != "task":
            raise UserError(
                f"--method {method.name} does not train on one task after another alone, and a model of images alone has a "
                f"classifier for each task; choose one of {', '.join(fit)}, or take CLIP"
            )

    def unseen(self, manifest: Manifest) -> bool:
        """Whether stages score the tasks that come later too."""
        return manifest.unseen and not self.heads

    def check_manifest(self, manifest: Manifest) -> None:
        """UserError for a manifest that wants scores which a model with a classifier for each task cannot have."""
        if not self.heads:
            return
        if manifest.probes:
            raise UserError(
                f"task {manifest.probes[0].name!r} is a probe, which no classifier is trained for; leave it out, or take CLIP"
            )
        if manifest.label_space != "task":
            raise UserError(
                f"label_space is {manifest.label_space!r}, and a model of images alone has a classifier for each task; take CLIP"
            )

    def measures(self, nll: bool) -> dict[str, bool]:
        """What `evaluate` takes beside its arguments; UserError for `nll` where samples have no answers."""
        if nll and not self.answers:
            raise UserError("--nll measures answers, and tasks of this kind of manifest have none; leave it out")
        return {"nll": True} if nll else {}


def load_multimodal(model: str, dtype: torch.dtype | str) -> tuple[nn.Module, Any]:
    config = AutoConfig.from_pretrained(model)
    if config.is_encoder_decoder:  # its encoder would be given the answers, too
        raise UserError(
            f"--model {model} is of type {config.model_type!r}, an encoder-decoder, which lilora train does not take; adapt it "
            'in Python with LiLoRAConfig(task_type="SEQ_2_SEQ_LM") and train it with transformers\' Seq2SeqTrainer'
        )
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
    processor = AutoProcessor.from_pretrained(model)
    Collator(processor, {}, train=True)  # refuses a processor that cannot make prompts
    return base, processor


def load_text(model: str, dtype: torch.dtype | str) -> tuple[nn.Module, Any]:
    base, processor = text_models.load(model, dtype)
    Collator(processor, {}, train=True)
    return base, processor


def check_instructions(spec: TaskSpec, processor) -> None:
    """Make a batch of the first sample of each make, and of those with the images of the most extreme shapes.

    Makes: with images or without, of several turns or one, with a system turn.
    """
    for split in spec.splits:
        collator = Collator(processor, {spec.name: 0}, train=split == "train")
        data = instruction_data(spec, split)
        images = ((index, image) for index, sample in enumerate(data) for image in sample.images)
        for index in dict.fromkeys((*data.first.values(), *extreme_images(images))):
            collator([(spec.name, data[index])])


def instructions(specs: Sequence[TaskSpec], processor) -> tuple[TaskSamples, Collate]:
    names = [spec.name for spec in specs]
    collator = Collator(processor, {name: i for i, name in enumerate(names)}, train=True)

    def collate(samples: list) -> dict[str, Tensor]:
        inputs = collator([(names[number], sample) for number, sample in samples])
        inputs.pop("task_ids")  # what is trained serves all of them
        return inputs

    return TaskSamples([instruction_data(spec, "train") for spec in specs]), collate


_ANSWERS = check_instructions, instructions, evaluate.evaluate, evaluate.evaluate_routed
KINDS = {
    "instruction": Kind(load_multimodal, *_ANSWERS, "image-text-to-text", "AutoModelForImageTextToText"),
    "text": Kind(load_text, *_ANSWERS, "text-generation", "AutoModelForCausalLM"),
    "classification": Kind(
        clip.load,
        lambda spec, processor: None,
        clip.training_data,
        clip.evaluate,
        clip.evaluate_routed,
        "zero-shot-image-classification",
        "AutoModel",
        answers=False,
        one_process_reason="their loss compares all pairs of a batch",
    ),
    "vision": Kind(
        vision.load,
        lambda spec, processor: None,
        vision.training_data,
        vision.evaluate,
        partial(clip.evaluate_routed, classified=vision.classified),
        "image-classification",
        "AutoModelForImageClassification",
        answers=False,
        heads=True,
    ),
}


def kind_name(manifest_kind: str, model: str) -> str:
    """Of a run: instructions for a base model that sees no images, and classes for one of images alone, are of other kinds."""
    narrower = {
        "instruction": ("text", text_models.is_text_model),
        "classification": ("vision", vision.is_vision_model),
    }
    name, fits = narrower[manifest_kind]
    try:
        return name if fits(model) else manifest_kind
    except (OSError, ValueError):  # loading it says what is wrong
        return manifest_kind


def kind_of(config: dict[str, Any]) -> Kind:
    """The kind of the tasks of a bank with this config; earlier versions knew but one, and did not name it."""
    return KINDS[config.get("kind", "instruction")]
