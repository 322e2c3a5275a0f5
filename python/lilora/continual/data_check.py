"""What of a manifest's data is there, and what is missing or wrong, split by split."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lilora.errors import UserError

from .classification import ImageTask, LabelledImages
from .images import EmbeddedImage, check_images
from .instructions import TaskSpec, instruction_data
from .task_sequence import Manifest, Split


@dataclass
class SplitReport:
    """One split of a task: its file or folder, the folder of its images, counts, and the first problem in one sentence.

    state: "missing" if the problem is that a file or image is not there, "wrong" if one that is there cannot be used.
    samples: None where the file cannot be read to its end. images: different paths, and those that the records hold.
    """

    task: str
    split: Split
    file: str
    images_from: str
    samples: int | None = None
    images: int = 0
    missing_images: int = 0
    problem: str | None = None
    state: Literal["ok", "missing", "wrong"] = "ok"


def check_data(manifest: Manifest) -> Iterator[SplitReport]:
    """A report on every split of a manifest's tasks and probes."""
    for spec in (*manifest.tasks, *manifest.probes):
        for split in spec.splits:
            yield _checked(spec, split)


def _checked(spec: TaskSpec | ImageTask, split: Split) -> SplitReport:
    folder = spec.image_folder(split) if isinstance(spec, TaskSpec) else spec.images
    report = SplitReport(spec.name, split, str(getattr(spec, split)), str(folder))
    where = f"task {spec.name!r}: {report.file}"
    for path, what in _needed(spec, split).items():
        if not path.exists():
            report.problem, report.state = f"task {spec.name!r}: {path} is missing; put {what}", "missing"
            return report
    try:
        if isinstance(spec, TaskSpec):
            data = instruction_data(spec, split)
        else:
            data = LabelledImages(spec.model_copy(update={"shots": None}), split)
        report.samples = len(data)
        paths, embedded = {}, 0  # the bytes of all embedded images need not fit into memory
        for image in data.images():
            if isinstance(image, EmbeddedImage):
                embedded += 1
            else:
                paths[image] = None
        missing = [path for path in paths if not os.path.isfile(path)]
        report.images, report.missing_images = len(paths) + embedded, len(missing)
        if missing:
            report.problem = f"{where}: {len(missing)} of {report.images} images are missing, the first is {missing[0]}"
            report.state = "missing"
            return report
        check_images(data.images(), where)
        if split != "train":
            spec.check_scorer(data)
    except UserError as error:
        report.problem, report.state = str(error).rstrip("."), "wrong"
    return report


def _needed(spec: TaskSpec | ImageTask, split: Split) -> dict[Path, str]:
    """Path -> what is to be put there, as the path's name tells."""
    path = getattr(spec, split)
    if isinstance(spec, ImageTask):
        lists = "a list of {image, label} in JSON, or a file of splits as CoOp has them,"
        forms = {"": "a folder of images for each class", ".txt": "lines of an image and its class"}
        files = {path: f"{forms.get(path.suffix, lists)} there"}
        return files | ({spec.classes: "its class names there"} if isinstance(spec.classes, Path) else {})
    records = "records {id, image, conversations} in JSON or JSON lines"
    forms = {"": "a folder of records that datasets wrote", ".parquet": "a table of records"}
    files = {path: f"{forms.get(path.suffix, records)} there, and its images under {spec.image_folder(split)}"}
    if split != "train" and spec.scorer_model is not None:
        files[spec.scorer_model] = "the folder of the scorer's model there"
    return files


def lies_there(folder: Path) -> str:
    """A folder in print, with the first of what lies in it."""
    if not folder.is_dir():
        return f"{folder}, which is missing"
    found = sorted(entry.name for entry in folder.iterdir())
    return f"{folder}, which holds {', '.join(found[:8]) or 'nothing'}{', ...' if len(found) > 8 else ''}"
