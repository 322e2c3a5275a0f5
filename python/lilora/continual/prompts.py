"""Questions for the tasks of a bank: read from a file, checked before a model is loaded, answered in mixed batches."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.progress import Progress

from lilora.bank.bank import Bank
from lilora.errors import UserError, shortened
from lilora.methods import METHODS, Method
from lilora.validation import Location, first_problem

from .evaluate import answers_to, identify
from .images import open_image
from .instructions import Sample
from .task_identification import identifier_of, require_statistics


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1)
    task: str | None = None
    image: str | list[str] = []
    id: str | int | None = None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, no key of which is given twice."""
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise UserError(f"the key {shortened(key)} is given {times} times; keep one of them")
    return dict(pairs)


def _key(location: Location) -> str:
    return f"key {location[0]!r}" if location else "the line"


@dataclass(frozen=True)
class Prompt:
    """where: what errors call it. task: None where the bank is to find it."""

    where: str
    id: str | int
    task: str | None
    images: tuple[Path, ...]
    text: str


def read_prompts(path: Path, task: str | None = None) -> list[Prompt]:
    """The questions of a file with one JSON object `{"prompt", "task", "image", "id"}` per line; only `prompt` must be there.

    image: a path or a list of paths, relative to the file's folder. id: by default the number of the line, from 1. task: that
    of the lines that name none. Empty lines are passed over.

    Raises:
        UserError: the file cannot be read or has no questions; or the first line that is wrong, by its number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON has the other ends of lines in strings
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read ({error}); give a file of JSON lines") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            read = _Line.model_validate(json.loads(line, object_pairs_hook=_once))
        except ValidationError as error:
            raise UserError(f"{where}: {first_problem(error, _Line.model_fields, _key)}") from error
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f'{where} is no JSON ({error}); write {{"task": ..., "prompt": ...}}') from error
        images = [read.image] if isinstance(read.image, str) else read.image
        paths = tuple(path.parent / image for image in images)
        identity = number if read.id is None else read.id
        prompts.append(Prompt(where, identity, task if read.task is None else read.task, paths, read.prompt))
    if not prompts:
        raise UserError(f"--prompts {path} holds no questions; write one JSON object per line")
    return prompts


def check_prompts(prompts: Sequence[Prompt], bank: Bank) -> None:
    """UserError for the first prompt whose image cannot be opened, or whose task the bank neither has nor can find."""
    opened: set[Path] = set()
    for prompt in prompts:
        if prompt.task is not None and prompt.task not in bank.tasks:
            what = f"--task {prompt.task}" if prompt.where == "--prompt" else f"{prompt.where}: task {prompt.task!r}"
            raise UserError(f"{what} is unknown; {bank.path} has {', '.join(bank.tasks)}")
        if prompt.task is None and METHODS[bank.config["method"]].needs_task:
            try:
                require_statistics(bank)
            except UserError as error:
                raise UserError(f"{prompt.where} names no task: {error}") from error
        for image in prompt.images:
            if image not in opened:
                try:
                    open_image(image)
                except UserError as error:
                    raise UserError(f"{prompt.where}: {error}") from error
                opened.add(image)


def limits_of_bank(bank: Bank) -> dict[str, int]:
    """The most tokens of an answer of each task, as its manifest said; 64 in banks that do not record it.

    Where one state serves all tasks, a prompt's task may not be known: each has the most of all.
    """
    limits = {task["name"]: task["info"].get("max_new_tokens") or 64 for task in bank.describe()["tasks"]}
    if METHODS[bank.config["method"]].needs_task:
        return limits
    return dict.fromkeys(limits, max(limits.values()))


@torch.inference_mode()
def answer_prompts(
    bank: Bank,
    method: Method,
    processor: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int | None,
    batch_size: int,
    progress: Progress | None = None,
) -> list[tuple[str, str]]:
    """(task, answer) of each prompt, in their order; where none is named, the task that the bank finds.

    bank, method, processor: as `load_bank` returns them. max_new_tokens: None for those of each task
    (`limits_of_bank`). Batches mix tasks where the method can.
    """
    samples = [Sample(str(prompt.id), prompt.images, prompt.text, ("",)) for prompt in prompts]
    tasks = [prompt.task for prompt in prompts]
    unnamed = [i for i, task in enumerate(tasks) if task is None]
    if unnamed:
        found = [bank.tasks[-1]] * len(unnamed)  # one state serves all tasks
        if method.needs_task:
            router = identifier_of(bank.config).load(bank, method.model)
            found = identify(router, processor, [samples[i] for i in unnamed], batch_size, progress)
        for i, task in zip(unnamed, found, strict=True):
            tasks[i] = task
    limits = limits_of_bank(bank) if max_new_tokens is None else dict.fromkeys(bank.tasks, max_new_tokens)
    requests = list(zip(tasks, samples, strict=True))
    answers = answers_to(method, processor, requests, limits, batch_size, progress)
    return list(zip(tasks, answers, strict=True))
