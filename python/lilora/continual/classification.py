"""Image classification: manifests of kind `classification`, and the labelled images of their tasks."""

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationInfo, field_validator
from torch.utils.data import Dataset

from lilora.errors import UserError

from .images import check_images
from .records import Records, read_json
from .task_sequence import Manifest, Split

_SHOTS_SEED = 0


def _with_a_place(templates: tuple[str, ...]) -> tuple[str, ...]:
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} must have one {{}}, for the class name")
    return templates


Templates = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_with_a_place)]
Shots = Annotated[int | None, Field(ge=1)]
TemplatePer = Literal["sample", "task"]

TEMPLATES: Templates = ("a photo of a {}.", "a picture of a {}.", "an image that shows a {}.")


class ImageTask(BaseModel):
    """One task: its images and the names of their classes.

    train and test are folders with a folder of images per class, or JSON lists of `{image, label}` with paths under
    `images`. classes: a list of names, whose labels are the names themselves or their numbers from 0; or a mapping from
    label to name; or a file that holds either as JSON, or a name on each line (.txt). Without classes the labels are the
    names, with spaces for underscores. templates: prompts with {} for the class name. shots: training images per class,
    the same in every run; None: all of them. template_per: whether each training "sample" gets a random template or one
    serves the whole "task". Paths are relative to the manifest's `data` until `load_manifest` resolves them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    train: Path
    test: Path
    images: Path = Path()
    classes: list[str] | dict[str, str] | Path | None = None
    templates: Templates = TEMPLATES
    shots: Shots = None
    template_per: TemplatePer = "sample"

    def located(self, folder: Path) -> Self:
        """With the paths under `folder`."""
        keys = ["train", "test", "images"] + ["classes"] * isinstance(self.classes, Path)
        return self.model_copy(update={key: folder / getattr(self, key) for key in keys})

    def check(self) -> None:
        """Raise UserError for files, labels, class names or images that are missing or wrong."""
        for split in ("train", "test"):
            LabelledImages(self, split).check_images()

    def prompt(self, template: int, name: str) -> str:
        """What is said of a class."""
        return self.templates[template].replace("{}", name)


class ClassificationManifest(Manifest):
    """Tasks of image classification; templates, shots and template_per hold for tasks that give none.

    Templates are for CLIP: a model of images alone has a classifier for each task instead.
    """

    kind: Literal["classification"] = "classification"
    templates: Templates = TEMPLATES
    shots: Shots = None
    template_per: TemplatePer = "sample"
    tasks: list[ImageTask] = Field(min_length=1)

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


class LabelledImages(Dataset):
    """The images of one split of a task; `classes` are the names of the task's classes, in the order of their numbers.

    Raises UserError when files are missing or broken, there are no images, a label is unknown, or names are not unique.
    """

    def __init__(self, spec: ImageTask, split: Split):
        source = getattr(spec, split)
        self._where = f"task {spec.name!r}: {source}"
        found = _read(spec, source)
        numbers, self.classes = _classes(spec)
        for _, label in found:
            if label not in numbers:
                known = ", ".join(list(numbers)[:5]) + (", ..." if len(numbers) > 5 else "")
                raise UserError(f"{self._where} has the label {label!r}, no class of the task ({known}); correct it.")
        pairs = [(path, numbers[label]) for path, label in found]
        if split == "train" and spec.shots is not None:
            pairs = few(pairs, spec.shots)
        self.samples = [LabelledImage(i, path, label) for i, (path, label) in enumerate(pairs)]

    def check_images(self) -> None:
        """Raise UserError at the first image that is missing or, in all but very large splits, cannot be opened."""
        check_images([sample.path for sample in self.samples], self._where)

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


def _read(spec: ImageTask, source: Path) -> list[tuple[Path, str]]:
    """The images of a split with their labels."""
    where = f"task {spec.name!r}: {source}"
    if source.is_dir():
        kinds = Image.registered_extensions()
        folders = sorted(entry for entry in source.iterdir() if entry.is_dir())
        found = [(p, folder.name) for folder in folders for p in sorted(folder.iterdir()) if p.suffix.lower() in kinds]
    else:
        records = Records(source, _Record, f"task {spec.name!r}", "{image, label}")
        found = [(spec.images / record.image, str(record.label)) for record in records]
    if not found:
        raise UserError(f"{where} has no images; add some or take the task out of the manifest.")
    return found


def _classes(spec: ImageTask) -> tuple[dict[str, int], list[str]]:
    """(number of each label, names of the classes)."""
    classes = _class_file(spec) if isinstance(spec.classes, Path) else spec.classes
    if classes is None:
        labels = {label for source in (spec.train, spec.test) for _, label in _read(spec, source)}
        classes = {label: label.replace("_", " ") for label in sorted(labels)}
    if isinstance(classes, dict):
        numbers, names = {label: i for i, label in enumerate(classes)}, list(classes.values())
    else:
        numbers = {name: i for i, name in enumerate(classes)}
        numbers, names = {str(i): i for i in range(len(classes))} | numbers, classes
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
    try:
        lines = spec.classes.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{where} cannot be read ({error}); put a text file with a class name on each line there."
        ) from error
    return [line.strip() for line in lines if line.strip()]
