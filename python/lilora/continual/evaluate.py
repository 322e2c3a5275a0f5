"""Answers to the test samples of several tasks, in mixed batches where the method can, and their scores."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress

from ..methods import Method
from . import processes
from .scorers import scorer
from .tasks import Collator, InstructionDataset, Sample, TaskSpec


@dataclass(frozen=True)
class TaskScore:
    """score in points 0..100; format_share: answers in the instructed format, 0..1, None if the task names none."""

    task: str
    score: float
    format_share: float | None
    answers: list[dict[str, str]]


@torch.inference_mode()
def evaluate(
    method: Method, processor, tasks: Sequence[TaskSpec], batch_size: int, progress: Progress | None = None
) -> list[TaskScore]:
    """Score the tasks' test samples by greedy generation with the task given.

    A method that can route takes all tasks in the same batches, in turn one sample of each; another one batch of one task
    after the other. Several processes take turns with the batches, and all get all answers. Batch size, mixing and
    processes change nothing but rounding.
    """
    samples = {spec.name: InstructionDataset(spec, "test").samples for spec in tasks}
    collator = Collator(processor, {name: i for i, name in enumerate(samples)}, train=False)
    groups = [in_turn(samples)] if method.mixed_batches else [[(name, s) for s in own] for name, own in samples.items()]
    answers: dict[str, list[dict[str, str]]] = {name: [] for name in samples}
    limits = {spec.name: spec.max_new_tokens for spec in tasks}
    was_training = method.model.training
    method.model.eval()
    bar = None if progress is None else progress.add_task("evaluating", total=sum(map(len, samples.values())))
    for group in groups:
        if not method.mixed_batches:
            method.activate(group[0][0], train=False)
        batches = [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
        own = {}
        for number in range(processes.rank(), len(batches), processes.count()):
            own[number] = generate(method, processor, collator, batches[number], limits)
            if progress is not None:
                progress.advance(bar, processes.count() * len(batches[number]))
        generated = {number: batch for part in processes.gathered(own) for number, batch in part.items()}
        for number, batch in enumerate(batches):
            for (name, sample), answer in zip(batch, generated[number], strict=True):
                answers[name].append({"id": sample.id, "answer": answer, "reference": sample.answers[0]})
    if progress is not None:
        progress.remove_task(bar)
    method.model.train(was_training)
    return [score(spec, samples[spec.name], answers[spec.name]) for spec in tasks]


def in_turn(samples: dict[str, list[Sample]]) -> list[tuple[str, Sample]]:
    """One sample of each task after the other, until all are used."""
    longest = max(map(len, samples.values()))
    return [(name, own[i]) for i in range(longest) for name, own in samples.items() if i < len(own)]


def generate(
    method: Method, processor, collator: Collator, batch: list[tuple[str, Sample]], limits: dict[str, int]
) -> list[str]:
    """Greedy answers, each cut at its task's own limit of new tokens."""
    inputs = {key: value.to(method.model.device) for key, value in collator(batch).items()}
    task_ids = inputs.pop("task_ids")
    if method.mixed_batches and method.needs_task:
        names = list(limits)
        inputs["task_ids"] = [names[i] for i in task_ids.tolist()]
    dtype = method.model.dtype
    inputs = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    longest = max(limits[name] for name, _ in batch)
    pad = processor.tokenizer.pad_token_id
    output = method.model.generate(**inputs, max_new_tokens=longest, do_sample=False, num_beams=1, pad_token_id=pad)
    new = output[:, inputs["input_ids"].shape[1] :]
    cut = [tokens[: limits[name]] for (name, _), tokens in zip(batch, new, strict=True)]
    return [text.strip() for text in processor.tokenizer.batch_decode(cut, skip_special_tokens=True)]


def score(spec: TaskSpec, samples: list[Sample], answers: list[dict[str, str]]) -> TaskScore:
    """Mean score of the answers, given in the order of the samples."""
    judge = scorer(spec.scorer)
    points = [judge(a["answer"], list(s.answers)) for a, s in zip(answers, samples, strict=True)]
    share = None
    if spec.answer_format is not None:
        share = sum(re.fullmatch(spec.answer_format, a["answer"]) is not None for a in answers) / len(answers)
    return TaskScore(spec.name, 100 * sum(points) / len(points), share, answers)
