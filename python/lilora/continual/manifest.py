"""Reading a manifest: a sequence of tasks, in YAML."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from lilora.errors import UserError
from lilora.validation import Location, first_problem, nearest
from lilora.yaml_files import read_yaml
from lilora_kernels import check_task_name

from .classification import ClassificationManifest
from .instructions import TaskManifest
from .task_sequence import Manifest, Task

MANIFESTS = {manifest.model_fields["kind"].default: manifest for manifest in (TaskManifest, ClassificationManifest)}


def load_manifest(
    path: str | Path, order: list[str] | None = None, data: str | Path | None = None, validate: bool = False
) -> Manifest:
    """Read a manifest and check everything it names.

    A key `kind` of the manifest says what its tasks are: `instruction`, a TaskManifest, where it is left out, or
    `classification`, a ClassificationManifest. The returned manifest holds absolute paths: `data` and `model` (when it
    starts with `.` or `/`; otherwise it is a model id) are relative to the manifest's folder, the tasks' files to `data`.
    Probes are apart from the tasks, as `probes`.
    A scorer `module:function` may lie in a file beside the manifest.
    An argument `data` replaces the manifest's folder of data. `order` names the tasks to train, in that order. With
    `validate` the tasks are those of `for_validation`, and a probe without validation samples is left out.

    Raises UserError for a key or name that is not allowed, an unknown scorer or method, a missing or broken file, a task without
    samples, and an image that is missing or cannot be opened.
    """
    manifest = read_manifest(path, order, data, validate)
    with importable(Path(path).resolve().parent):
        for task in (*manifest.tasks, *manifest.probes):
            task.check()
    return manifest


def read_manifest(
    path: str | Path, order: list[str] | None = None, data: str | Path | None = None, validate: bool = False
) -> Manifest:
    """The same without a look at the files that it names."""
    path = Path(path)
    manifest = _parse(path)
    _check_names(path, manifest)
    if all(task.probe for task in manifest.tasks):
        raise UserError(f"{path}: all tasks are probes, which are not trained; add one with the key train.")
    _check_methods(path, manifest)
    if validate:
        manifest = manifest.for_validation()
    root = path.resolve().parent
    folder = Path(data).resolve() if data is not None else (root / manifest.data).resolve()
    manifest = manifest.located(folder)
    probes = [task for task in manifest.tasks if task.probe and not (validate and task.section("test") == "test")]
    tasks = [task for task in manifest.tasks if not task.probe]
    tasks = tasks if order is None else _ordered(manifest, tasks, order)
    model = manifest.model
    if model is not None and model.startswith((".", "/")):
        model = str((root / model).resolve())
    return manifest.with_tasks(tasks, probes, data=folder, model=model)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let modules be imported from a folder, behind all others of their names."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _parse(path: Path) -> Manifest:
    content = read_yaml(path, f"{path}:", "the path of a task manifest")
    kind = str(content.get("kind", "instruction")) if isinstance(content, dict) else "instruction"
    if kind not in MANIFESTS:
        raise UserError(f"{path}: kind {kind!r} is unknown; choose one of {', '.join(MANIFESTS)}.")
    try:
        return MANIFESTS[kind].model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_problem(error, MANIFESTS[kind])}") from error


def _problem(error: ValidationError, manifest: type[Manifest]) -> str:
    """What is wrong with a manifest, without its file."""
    (task,) = get_args(manifest.model_fields["tasks"].annotation)
    misspelt = next((problem["loc"] for problem in error.errors() if problem["type"] == "extra_forbidden"), ())
    return first_problem(error, (task if len(misspelt) > 2 else manifest).model_fields, _place)


def _place(location: Location) -> str:
    """location: (key, ...), ("tasks", index) or ("tasks", index, key, ...)."""
    if len(location) < 2 or location[0] != "tasks":
        return f"key {location[0]!r}" if location else "the manifest"
    task = f"task number {int(location[1]) + 1}"
    return f"key {location[2]!r} of {task}" if len(location) > 2 else task


def _check_names(path: Path, manifest: Manifest) -> None:
    seen = set()
    for task in manifest.tasks:
        if task.name.casefold() in seen:
            raise UserError(f"{path}: two tasks are called {task.name!r} (case is ignored); give each its own name.")
        seen.add(task.name.casefold())
        try:
            check_task_name(task.name)
        except ValueError as error:
            raise UserError(f"{path}: task {task.name!r}: {error}") from error


def _check_methods(path: Path, manifest: Manifest) -> None:
    names = dict.fromkeys(name for rates in manifest.rates if isinstance(rates, tuple) for name, _ in rates)
    if not names:
        return
    from lilora.methods import METHODS  # with PEFT, for seconds

    for name in names:
        if name not in METHODS:
            advice = nearest(name, METHODS, f"known are {', '.join(METHODS)}")
            raise UserError(f"{path}: learning_rate names the method {name!r}, which is unknown; {advice}")


def _ordered(manifest: Manifest, tasks: list[Task], order: list[str]) -> list[Task]:
    by_name = {task.name: task for task in tasks}
    for name in order:
        if name not in by_name and any(task.name == name for task in manifest.tasks):
            raise UserError(f"order: task {name!r} is a probe, which is not trained but always scored; leave it out.")
        if name not in by_name:
            raise UserError(f"order: task {name!r} is unknown; {manifest.name} has {', '.join(by_name)}.")
    if not order or len(set(order)) < len(order):
        raise UserError(f"order: got {','.join(order)!r}; name at least one task and each of them once.")
    return [by_name[name] for name in order]
