"""What of a manifest's data is there, and what is missing or wrong, split by split."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lilora.errors import UserError

from .classification import ImageTask, LabelledImages
from .images import EmbeddedImage, check_images
from .instructions import TaskSpec, instruction_data
from .task_sequence import Manifest, Split


@dataclass
class SplitReport:
    """One split of a task: its file or folder, the folder of its images, counts, and the first problem in one sentence.

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


def check_data(manifest: Manifest) -> Iterator[SplitReport]:
    """A report on every split of a manifest's tasks and probes."""
    for spec in (*manifest.tasks, *manifest.probes):
        for split in spec.splits:
            yield _checked(spec, split)


def _checked(spec: TaskSpec | ImageTask, split: Split) -> SplitReport:
    folder = spec.image_folder(split) if isinstance(spec, TaskSpec) else spec.images
    report = SplitReport(spec.name, split, str(getattr(spec, split)), str(folder))
    where = f"task {spec.name!r}: {report.file}"
    if not os.path.exists(report.file):
        beside = f", and its images under {folder}" if isinstance(spec, TaskSpec) else ""
        report.problem = f"{where} is missing; put it there{beside}"
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
            return report
        check_images(data.images(), where)
        if split != "train":
            spec.check_scorer(data)
    except UserError as error:
        report.problem = str(error).rstrip(".")
    return report


def lies_there(folder: Path) -> str:
    """A folder in print, with the first of what lies in it."""
    if not folder.is_dir():
        return f"{folder}, which is missing"
    found = sorted(entry.name for entry in folder.iterdir())
    return f"{folder}, which holds {', '.join(found[:8]) or 'nothing'}{', ...' if len(found) > 8 else ''}"
