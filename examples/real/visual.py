"""The visual suite's data: six tasks on real pictures, two of text between them, and the generic mix of the base model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pictures
import tasks
from pictures import Maker, Rng
from tqdm import tqdm

SIZES = {"train": 480, "test": 100}
TEXT = ("capital", "backwards")


class VisualTask(NamedTuple):
    make: Maker
    question: str
    answer: Callable[[str], str] = str  # of what a picture shows


def first_word(shown: str) -> str:
    return shown.split()[0]


def visual_tasks(packages: Path | None) -> dict[str, VisualTask]:
    """The tasks on pictures, without those whose pictures lie in `packages` where there is no such folder."""
    found = {
        "count": VisualTask(pictures.discs, "How many discs are there?", first_word),
        "digit": VisualTask(pictures.digit, "Which digit was written by hand?"),
        "word": VisualTask(pictures.words(pictures.WORDS, anywhere=False), "Read the printed word."),
    }
    if packages is None:
        return found
    return found | {
        "clothing": VisualTask(pictures.clothing(packages), "Which garment is it?"),
        "flag": VisualTask(pictures.flags(packages, pictures.FLAGS), "Name the country of the flag."),
        "stamp": VisualTask(pictures.stamps(packages, of_task=True), "What does the stamp show?"),
    }


class Kind(NamedTuple):
    """Pictures of the mix: what they are called in captions, and in a short answer."""

    make: Maker
    caption: str
    short: str = "{}"


DESCRIBE = ("Describe the picture.", "What is in the picture?")
SHORT = ("Answer with the name alone.", "Name it.")


def mix(packages: Path | None) -> list[Kind]:
    """What the base model is taught: other flags, stamps and words than those of the tasks."""
    found = [
        Kind(pictures.digit, "the digit {}"),
        Kind(pictures.words(pictures.OTHER_WORDS, anywhere=True), "the word {}"),
        Kind(pictures.discs, "{} discs"),
    ]
    if packages is None:
        return found
    return [
        *found,
        Kind(pictures.clothing(packages), "a picture of a {}"),
        Kind(pictures.flags(packages, pictures.OTHER_FLAGS), "the flag of {}"),
        Kind(pictures.stamps(packages, of_task=False), "{}"),
        Kind(pictures.stamps(packages, of_task=False), "{}"),  # twice: they are the most various
    ]


def pictures_of_mix(packages: Path | None) -> list[Maker]:
    """What the tower sees: the same kinds, and all stamps but those of the task."""
    makers = dict.fromkeys(kind.make for kind in mix(packages) if kind.caption != "{}")
    return [*makers, *([pictures.any_stamp(packages)] if packages else [])]


def record(id: str, question: str, answer: str, image: str | None = None) -> dict[str, Any]:
    """A sample in LLaVA's instruction format."""
    mark = "<image>\n" if image else ""
    turns = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": turns} if image else {"id": id, "conversations": turns}


def write_task(
    folder: Path, name: str, task: VisualTask | tasks.Task, rng: Callable[[str], Rng], sizes: dict[str, int]
):
    """folder/<split>.json, and folder/images for a task on pictures."""
    folder.mkdir(parents=True)
    if isinstance(task, VisualTask):
        (folder / "images").mkdir()
    for split, size in sizes.items():
        drawing, records = rng(split), []
        for i in range(size):
            id = f"{name}-{split}-{i}"
            if isinstance(task, VisualTask):
                picture, shown = task.make(drawing, split == "train")
                image = f"{split}-{i:04d}.png"
                picture.save(folder / "images" / image)
                records.append(record(id, task.question, task.answer(shown), image))
            else:
                records.append(record(id, *task(drawing, split == "train")))
        (folder / f"{split}.json").write_text(json.dumps(records, indent=1))


def write_data(folder: Path, packages: Path | None, seed: int, sizes: dict[str, int] = SIZES) -> None:
    written = visual_tasks(packages) | {name: tasks.TASKS[name] for name in TEXT}
    for name, task in tqdm(written.items(), desc="tasks"):
        key = int.from_bytes(name.encode()[:4])  # the same samples whichever tasks are written
        write_task(
            folder / name, name, task, lambda split, key=key: np.random.default_rng([seed, key, len(split)]), sizes
        )
