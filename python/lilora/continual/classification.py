"""Image classification: manifests of kind `classification`, and the labelled images of their tasks."""

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from PIL import Image
from pydantic import AfterValidator, BaseModel, Field, PrivateAttr, TypeAdapter, ValidationInfo, field_validator
from torch.utils.data import Dataset

from lilora.errors import UserError

from .images import check_images
from .records import Records, read_json
from .task_sequence import Manifest, Split, Task

_SHOTS_SEED = 0


def _with_a_place(templates: tuple[str, ...]) -> tuple[str, ...]:
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} must have one {{}}, for the class name")
    return templates


Templates = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_with_a_place)]
Shots = Annotated[int | None, Field(ge=1)]
TemplatePer = Literal["sample", "task"]
LabelSpace = Literal["task", "all", "seen"]

TEMPLATES: Templates = ("a photo of a {}.", "a picture of a {}.", "an image that shows a {}.")


class ImageTask(Task):
    """One task: its images and the names of their classes.

    train, validation and test are folders with a folder of images per class, or lists with paths under `images`: JSON of `{image,
    label}`; a file of splits as CoOp has them, `{train: [[path, number, class], ...], val, test}`, which all may name; or
    text with an image, `.jpg` left out, and its class on each line, as FGVC-Aircraft has it. classes: a list of names,
    whose labels are the names themselves or their numbers from 0; or a mapping from label to name; or a file that holds
    either as JSON, or a name on each line (.txt). Without classes the labels are the names, with spaces for underscores.
    templates: prompts with {} for the class name. shots: training images per class, the same in every run; None: all of
    them. template_per: whether each training "sample" gets a random template or one serves the whole "task".
    """

    test: Path
    classes: list[str] | dict[str, str] | Path | None = None
    templates: Templates = TEMPLATES
    shots: Shots = None
    template_per: TemplatePer = "sample"
    _label_space: LabelSpace = PrivateAttr("task")
    _all: tuple["ImageTask", ...] = PrivateAttr(())  # all tasks of the manifest, if its label space wants them

    def located(self, folder: Path) -> Self:
        """With the paths under `folder`."""
        keys = [*self.splits, "images"] + ["classes"] * isinstance(self.classes, Path)
        return self.model_copy(update={key: folder / getattr(self, key) for key in keys})

    def check(self) -> None:
        """Raise UserError for files, labels, class names or images that are missing or wrong."""
        for split in self.splits:
            LabelledImages(self, split).check_images()

    def check_scorer(self, data: "LabelledImages") -> None:
        """Top-1 accuracy suits all images."""

    def rivals(self, trained: Sequence[str]) -> list["ImageTask"]:
        """The tasks whose classes an image of this task may be taken for, by the manifest's `label_space`."""
        if self._label_space == "task":
            return [self]
        return [task for task in self._all if self._label_space == "all" or task.name in (*trained, self.name)]

    def class_names(self) -> list[str]:
        """The names of the classes, in the order of their numbers."""
        return _classes(self)[1]

    def prompt(self, template: int, name: str) -> str:
        """What is said of a class."""
        return self.templates[template].replace("{}", name)

    def prompts(self, name: str) -> tuple[str, ...]:
        """The same with every template."""
        return tuple(self.prompt(t, name) for t in range(len(self.templates)))


class ClassificationManifest(Manifest):
    """Tasks of image classification; templates, shots and template_per hold for tasks that give none.

    Templates and label spaces are for CLIP: a model of images alone has a classifier for each task instead.

    label_space: among which classes an image is placed. `task`: those of its own task. `all`: those of all tasks of the
    manifest, as X-TAIL has it (arXiv 2406.18868). `seen`: those of the tasks trained so far, as class-incremental learning
    has it, and of its own; a task is scored from its own training on. A probe is placed among its own. Classes of several
    tasks whose prompts are the same are one class.
    """

    kind: Literal["classification"] = "classification"
    templates: Templates = TEMPLATES
    shots: Shots = None
    template_per: TemplatePer = "sample"
    label_space: LabelSpace = "task"
    tasks: list[ImageTask] = Field(min_length=1)

    @property
    def unseen(self) -> bool:
        return self.label_space != "seen"

    def located(self, folder: Path) -> Self:
        tasks = super().located(folder).tasks
        if self.label_space == "task":
            return self.model_copy(update={"tasks": tasks})
        linked = [task.model_copy() for task in tasks]
        for task in linked:
            if not task.probe:  # a probe is placed among its own classes
                task._label_space, task._all = self.label_space, tuple(other for other in tasks if not other.probe)
        return self.model_copy(update={"tasks": linked})

    @field_validator("tasks", mode="before")
    @classmethod
    def _with_defaults(cls, tasks: object, info: ValidationInfo) -> object:
        shared = {key: info.data[key] for key in ("templates", "shots", "template_per") if key in info.data}
        return (
            [shared | task if isinstance(task, dict) else task for task in tasks] if isinstance(tasks, list) else tasks
        )


@dataclass(frozen=True)
class LabelledImage:
    """An image and the number of its class; `index` is its place in the split."""

    index: int
    path: Path
    label: int


class _Record(BaseModel):
    image: str
    label: str | int


_CLASSES = TypeAdapter(list[str] | dict[str, str])
_COOP = TypeAdapter(dict[str, list[tuple[str, int, str]]])


class LabelledImages(Dataset):
    """The images of one split of a task; `classes` are the names of the task's classes, in the order of their numbers.

    Raises UserError when files are missing or broken, there are no images, a label is unknown, or names are not unique.
    """

    def __init__(self, spec: ImageTask, split: Split):
        source = getattr(spec, split)
        self._where = f"task {spec.name!r}: {source}"
        found = _read(spec, split)
        numbers, self.classes = _classes(spec)
        for _, label in found:
            if label not in numbers and str(label) not in numbers:
                labels = list(dict.fromkeys(map(str, numbers)))
                known = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
                raise UserError(f"{self._where} has the label {label!r}, no class of the task ({known}); correct it.")
        pairs = [(path, numbers[label if label in numbers else str(label)]) for path, label in found]
        if spec.section(split) == "train" and spec.shots is not None:
            pairs = few(pairs, spec.shots)
        pairs = [pairs[number] for number in spec.part(split, len(pairs))]
        self.samples = [LabelledImage(i, path, label) for i, (path, label) in enumerate(pairs)]

    def images(self) -> Iterator[Path]:
        """The images of all samples, one after another."""
        return (sample.path for sample in self.samples)

    def check_images(self) -> None:
        """Raise UserError at the first image that is missing or, in all but very large splits, cannot be opened."""
        check_images(self.images(), self._where)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> LabelledImage:
        return self.samples[index]


def few(pairs: list[tuple[Path, int]], shots: int) -> list[tuple[Path, int]]:
    """At most `shots` images of each class, the same ones whenever the images are the same."""
    by_class = defaultdict(list)
    for path, label in pairs:
        by_class[label].append(path)
    rng = random.Random(_SHOTS_SEED)
    return [
        (path, label) for label, paths in sorted(by_class.items()) for path in rng.sample(paths, min(shots, len(paths)))
    ]


def _read(spec: ImageTask, split: Split) -> list[tuple[Path, str | int]]:
    """The images of a split with their labels; an integer is the number of a class, where these have an order."""
    source = getattr(spec, split)
    where = f"task {spec.name!r}: {source}"
    if source.is_dir():
        kinds = Image.registered_extensions()
        folders = sorted(entry for entry in source.iterdir() if entry.is_dir())
        found = [(p, folder.name) for folder in folders for p in sorted(folder.iterdir()) if p.suffix.lower() in kinds]
    elif source.suffix == ".txt":
        pairs = (line.partition(" ") for line in _lines(source, where, "an image and its class"))
        found = [(spec.images / (image if Path(image).suffix else f"{image}.jpg"), label) for image, _, label in pairs]
    elif _is_coop(source):
        splits, section = read_json(source, _COOP, where, "CoOp's file of splits"), spec.section(split)
        named = "val" if section == "validation" else section
        found = [(spec.images / path, label) for path, _, label in splits.get(named, [])]
    else:
        records = Records(source, _Record, f"task {spec.name!r}", "{image, label}")
        found = [(spec.images / record.image, record.label) for record in records]
    if not found:
        raise UserError(f"{where} has no images; add some or take the task out of the manifest.")
    return found


def _is_coop(source: Path) -> bool:
    """Whether a file starts as CoOp's files of splits do; a line of records starts otherwise."""
    if not source.is_file():
        return False
    with open(source, encoding="utf-8-sig", errors="replace") as file:
        return re.match(r'\s*\{\s*"(train|val|test)"\s*:\s*\[', file.read(200)) is not None


def _integers_are_names(spec: ImageTask, names: list[str]) -> bool:
    """Whether integer labels are names, where names are numbers but not their own; UserError if they may be either."""
    if not any(name.isdecimal() and name != str(i) for i, name in enumerate(names)):
        return False
    labels = {label for split in spec.splits for _, label in _read(spec, split) if isinstance(label, int)}
    if not labels or not all(str(label) in names for label in labels):
        return False
    if all(label in range(len(names)) for label in labels):
        raise UserError(
            f"task {spec.name!r}: the labels are integers that may be the names of classes or their numbers; write them as text "
            "if they are names, or give classes as a mapping from label to name"
        )
    return True


def _classes(spec: ImageTask) -> tuple[dict[str | int, int], list[str]]:
    """(number of each label, names of the classes)."""
    classes = _class_file(spec) if isinstance(spec.classes, Path) else spec.classes
    if classes is None:
        labels = {str(label) for split in spec.splits for _, label in _read(spec, split)}
        classes = {label: label.replace("_", " ") for label in sorted(labels)}
    if isinstance(classes, dict):
        numbers, names = {label: i for i, label in enumerate(classes)}, list(classes.values())
    else:
        numbers = {name: i for i, name in enumerate(classes)}
        every = range(len(classes))
        by_number = {} if _integers_are_names(spec, classes) else {i: i for i in every}
        numbers, names = by_number | {str(i): i for i in every} | numbers, classes
    if not names:
        raise UserError(f"task {spec.name!r} has no classes; name them.")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"task {spec.name!r} has two classes called {name!r}; give each a name of its own.")
    return numbers, names


def _class_file(spec: ImageTask) -> list[str] | dict[str, str]:
    where = f"task {spec.name!r}: {spec.classes}"
    if spec.classes.suffix != ".txt":
        return read_json(spec.classes, _CLASSES, where, "a list of class names or a mapping from label to name")
    return _lines(spec.classes, where, "a class name")


def _lines(file: Path, where: str, what: str) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read ({error}); put a text file with {what} on each line there.") from error
    return [line.strip() for line in lines if line.strip()]
