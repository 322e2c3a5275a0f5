"""What the manifests of all kinds of tasks have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator

from .images import ImageAspect

Split = Literal["train", "test"]


class Task(BaseModel):
    """What tasks of all kinds have in common: a name and files, relative to the manifest's `data` until `load_manifest`
    resolves them.

    A probe is never trained and has no `train`: it is scored before the first task and after each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    train: Path | None = None
    test: Path | None = None
    images: Path = Path()
    probe: bool = False

    @model_validator(mode="after")
    def _trained_or_probe(self) -> Self:
        if self.probe and self.train is not None:
            raise ValueError("a probe is never trained; leave out the key train, or the key probe")
        if self.probe and self.test is None:
            raise ValueError("a probe wants the key test; add it")
        if not self.probe and self.train is None:
            raise ValueError("a task that is no probe wants the key train; add it")
        return self

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(split for split in ("train", "test") if getattr(self, split) is not None)


class Manifest(BaseModel):
    """A named sequence of tasks of one kind; `data` is the folder of their files, `model` the base if none is given.

    As `load_manifest` returns it, `tasks` are those to train and `probes` the others; a file has all of them as `tasks`.

    image_aspect: whether images go to the "processor" as they are, or "pad"ded to squares (`images.set_image_aspect`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    data: Path = Path()
    model: str | None = None
    image_aspect: ImageAspect = "processor"
    _probes: tuple[Task, ...] = PrivateAttr(())

    @property
    def probes(self) -> tuple[Task, ...]:
        return self._probes

    def with_tasks(self, tasks: Sequence[Task], probes: Sequence[Task], **changes: object) -> Self:
        """A copy with these tasks and probes, and other changes of its keys."""
        copy = self.model_copy(update={**changes, "tasks": list(tasks)})
        copy._probes = tuple(probes)
        return copy

    @property
    def unseen(self) -> bool:
        """Whether stages score the tasks that come later too."""
        return False

    def located(self, folder: Path) -> Self:
        """With the paths of its tasks under `folder`."""
        return self.model_copy(update={"tasks": [task.located(folder) for task in self.tasks]})
