"""Answers to the test samples of several tasks, in mixed batches where the method can, and their scores."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import Progress
from transformers import GenerationConfig

from lilora.bank.atomic import write_atomically
from lilora.continual import processes
from lilora.errors import Diverged, UserError
from lilora.methods import Method
from lilora.methods.base import evaluating

from .collator import IGNORED, Collator
from .instructions import Sample, TaskSpec, instruction_data
from .memory import InParts
from .task_identification import TaskRouter

Kept = TypeVar("Kept")
# Of a generation_config: what the model was built with, and no taste.
OF_MODEL = (
    "bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids",
    "suppress_tokens", "begin_suppress_tokens", "cache_implementation", "use_cache",
)  # fmt: skip


@dataclass(frozen=True)
class TaskScore:
    """score in points, 0..100 (of CIDEr 0..1000); format_share: answers in the instructed format, 0..1, None without one; nll:
    see `answer_nll`, None where it was not asked for."""

    task: str
    score: float
    format_share: float | None
    answers: list[dict[str, str]]
    nll: float | None = None


@dataclass(frozen=True)
class RoutedScore:
    """given: with the task of every sample given; routed: with the tasks that a router routed, which `routes` counts."""

    given: TaskScore
    routed: TaskScore
    routes: dict[str, int]

    @property
    def task(self) -> str:
        return self.given.task

    @property
    def accuracy(self) -> float:
        """Percentage of the samples whose task was routed."""
        return 100 * self.routes.get(self.task, 0) / sum(self.routes.values())


@torch.inference_mode()
def evaluate(
    method: Method,
    processor,
    tasks: Sequence[TaskSpec],
    batch_size: int,
    progress: Progress | None = None,
    nll: bool = False,
) -> list[TaskScore]:
    """Score the test samples of the tasks that have some, by greedy generation with the task given; with `nll` by the
    likelihood of the references, too.

    A method that can route takes all tasks in the same batches, in turn one sample of each; another one batch of one task
    after the other. Several processes take turns with the batches, and all get all answers. Batch size, mixing and
    processes change nothing but rounding.
    """
    tasks = with_test(tasks)
    samples = {spec.name: instruction_data(spec, "test") for spec in tasks}
    requests = in_turn(samples)
    answers: dict[str, list[dict[str, str]]] = {name: [] for name in samples}
    predictions = answers_to(method, processor, requests, limits_of(tasks), batch_size, progress)
    for (name, sample), answer in zip(requests, predictions, strict=True):
        answers[name].append({"id": sample.id, "answer": answer, "reference": sample.answers[0]})
    results = [score(spec, samples[spec.name], answers[spec.name]) for spec in tasks]
    if not nll:
        return results
    likelihoods = (answer_nll(method, processor, spec.name, samples[spec.name], batch_size, progress) for spec in tasks)
    return [replace(result, nll=value) for result, value in zip(results, likelihoods, strict=True)]


@torch.inference_mode()
def evaluate_routed(
    method: Method,
    processor,
    router: TaskRouter,
    tasks: Sequence[TaskSpec],
    given: Sequence[TaskScore],
    batch_size: int,
    progress: Progress | None = None,
) -> list[RoutedScore]:
    """Score the tasks' test samples with the task that the router finds; `tasks` holds all of the router's.

    given: their scores with the task given. A sample keeps its answer from there if its task is routed.
    """
    tasks = with_test(tasks)
    samples = {spec.name: instruction_data(spec, "test") for spec in tasks}
    requests = [(name, sample) for name, own in samples.items() for sample in own]
    routed = identify(router, processor, [sample for _, sample in requests], batch_size, progress)
    answers = [answer for result in given for answer in result.answers]
    misrouted = [i for i, (name, _) in enumerate(requests) if routed[i] != name]
    again = [(routed[i], requests[i][1]) for i in misrouted]
    predictions = answers_to(method, processor, again, limits_of(tasks), batch_size, progress)
    for i, answer in zip(misrouted, predictions, strict=True):
        answers[i] = answers[i] | {"answer": answer}
    results, start = [], 0
    for spec, result in zip(tasks, given, strict=True):
        own = slice(start, start + len(result.answers))
        rescored = score(spec, samples[spec.name], answers[own])
        results.append(RoutedScore(result, rescored, dict(Counter(routed[own]))))
        start = own.stop
    return results


def identify(
    router: TaskRouter, processor, samples: Sequence[Sample], batch_size: int, progress: Progress | None
) -> list[str]:
    """The task that the router finds for each sample."""
    collator = Collator(processor, {"": 0}, train=False)
    starts = range(0, len(samples), batch_size)
    routed: list[str] = []
    route = InParts(lambda part: router.route(collator([("", sample) for sample in part])), "finding tasks")
    for start in starts if progress is None else progress.track(starts, description="routing"):
        routed += route(samples[start : start + batch_size])
    return routed


def with_test(tasks: Sequence[TaskSpec]) -> list[TaskSpec]:
    """The tasks that have a test split; UserError if none has."""
    scored = [spec for spec in tasks if spec.test is not None]
    if not scored:
        raise UserError(
            f"none of the tasks {', '.join(spec.name for spec in tasks)} has a test split; add the key test to one in the "
            "manifest"
        )
    return scored


def limits_of(tasks: Sequence[TaskSpec]) -> dict[str, int]:
    return {spec.name: spec.max_new_tokens for spec in tasks}


def answers_to(
    method: Method,
    processor,
    requests: Sequence[tuple[str, Sample]],
    limits: dict[str, int],
    batch_size: int,
    progress: Progress | None,
) -> list[str]:
    """The answer of a task to each (task, sample)."""
    collator = Collator(processor, {name: i for i, name in enumerate(limits)}, train=False)

    def answer(part: Sequence[tuple[str, Sample]]) -> list[str]:
        return generate(method, processor, collator, part, limits)

    return in_batches(method, requests, answer, batch_size, progress)


def in_batches(
    method: Method,
    requests: Sequence[tuple[str, Any]],
    answer: Callable[[Sequence[tuple[str, Any]]], list[str]],
    batch_size: int,
    progress: Progress | None,
) -> list[str]:
    """`answer` to each (task, sample), in mixed batches where the method can; several processes take turns with them."""
    groups = [list(range(len(requests)))]
    if not method.mixed_batches:
        groups = [[i for i, (task, _) in enumerate(requests) if task == name] for name in dict(requests)]
    answers = [""] * len(requests)
    answer = InParts(answer, "evaluating")
    bar = None if progress is None else progress.add_task("evaluating", total=len(requests))
    with evaluating(method.model):
        for group in groups:
            if not method.mixed_batches:
                method.activate(requests[group[0]][0], train=False)
            batches = [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
            own = {}
            for number in range(processes.rank(), len(batches), processes.world_size()):
                batch = [requests[i] for i in batches[number]]
                own[number] = answer(batch)
                if progress is not None:
                    progress.advance(bar, processes.world_size() * len(batch))
            for number, predictions in (item for part in processes.all_gather(own) for item in part.items()):
                for i, prediction in zip(batches[number], predictions, strict=True):
                    answers[i] = prediction
    if progress is not None:
        progress.remove_task(bar)
    return answers


def answer_nll(
    method: Method, processor, task: str, samples: Sequence[Sample], batch_size: int, progress: Progress | None
) -> float:
    """Mean negative log-likelihood, in nats, of the tokens of the samples' first references and of the ends of answers.

    It is the model's own loss, as in training, of the task's model; earlier answers of a conversation are given and do not
    count. Several processes take turns with the batches. Raises Diverged where it is not finite.
    """
    collator = Collator(processor, {task: 0}, train=True)
    batch_size = max(1, batch_size // 8)  # as in training: here all positions have logits

    def losses(part: Sequence[Sample]) -> list[tuple[float, int]]:
        inputs = {key: value.to(method.model.device) for key, value in collator([(task, s) for s in part]).items()}
        del inputs["task_ids"]
        dtype = method.model.dtype
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        inputs["labels"] = last_answers(inputs["labels"])
        tokens = int(inputs["labels"].ne(IGNORED).sum())
        return [(tokens * float(method.model(**inputs).loss), tokens), *[(0.0, 0)] * (len(part) - 1)]

    starts = range(processes.rank() * batch_size, len(samples), processes.world_size() * batch_size)
    measure, own = InParts(losses, "evaluating"), []
    method.activate(task, train=False)
    with evaluating(method.model):
        for start in starts if progress is None else progress.track(starts, description="likelihood"):
            own += measure([samples[i] for i in range(start, min(start + batch_size, len(samples)))])
    loss, tokens = map(sum, zip(*(pair for part in processes.all_gather(own) for pair in part), strict=True))
    if not math.isfinite(loss):
        raise Diverged(
            f"task {task!r} diverged: what its model puts out is not finite; start another run with a lower --lr"
        )
    return loss / tokens


def last_answers(labels: torch.Tensor) -> torch.Tensor:
    """labels [B, L] of the last answer of each row alone, which nothing but padding follows."""
    answered = labels.ne(IGNORED)
    ends = answered & ~torch.nn.functional.pad(answered[:, 1:], (0, 1))
    ends_from_here = ends.flip(1).cumsum(1).flip(1)
    return labels.where(answered & ends_from_here.eq(1), torch.full_like(labels, IGNORED))


def write_answers(path: Path, answers: Sequence[dict[str, str]]) -> None:
    """One JSON object {"id", "answer", "reference"} per line."""
    lines = "\n".join(json.dumps(answer, ensure_ascii=False) for answer in answers)
    write_atomically(path, (lines + "\n").encode())


def in_turn(samples: Mapping[str, Sequence[Kept]]) -> list[tuple[str, Kept]]:
    """One sample of each task after the other, until all are used."""
    longest = max(map(len, samples.values()))
    return [(name, own[i]) for i in range(longest) for name, own in samples.items() if i < len(own)]


def generate(
    method: Method, processor, collator: Collator, batch: list[tuple[str, Sample]], limits: dict[str, int]
) -> list[str]:
    """Greedy answers, each cut at its task's own limit of new tokens.

    What else the model's generation_config.json asks for (penalties, least lengths, biases) would change scores unseen.
    """
    inputs = {key: value.to(method.model.device) for key, value in collator(batch).items()}
    task_ids = inputs.pop("task_ids")
    if method.mixed_batches and method.needs_task:
        names = list(limits)
        inputs["task_ids"] = [names[i] for i in task_ids.tolist()]
    dtype = method.model.dtype
    inputs = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    longest = max(limits[name] for name, _ in batch)
    stops = collator.stops(method.base)
    own = method.base.generation_config
    kept = {name: getattr(own, name) for name in OF_MODEL if getattr(own, name, None) is not None}
    method.base.generation_config = GenerationConfig(**kept)
    try:
        output = method.model.generate(
            **inputs,
            max_new_tokens=longest,
            do_sample=False,
            num_beams=1,
            pad_token_id=processor.tokenizer.pad_token_id,
            eos_token_id=stops,
        )
    finally:
        method.base.generation_config = own
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    cut = [before_any(stops, tokens[: limits[name]]) for (name, _), tokens in zip(batch, new, strict=True)]
    return [text.strip() for text in processor.tokenizer.batch_decode(cut, skip_special_tokens=True)]


def before_any(stops: list[int], tokens: list[int]) -> list[int]:
    """The tokens ahead of the first that is one of `stops`; all of them if none is."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), None)]


def score(spec: TaskSpec, samples: Iterable[Sample], answers: list[dict[str, str]]) -> TaskScore:
    """The score of the answers, given in the order of the samples."""
    said, references = [answer["answer"] for answer in answers], [sample.answers for sample in samples]
    share = None
    if spec.answer_format is not None:
        share = sum(map(spec.in_format, said, references)) / len(said)
    return TaskScore(spec.name, 100 * spec.judge()(said, references), share, answers)
