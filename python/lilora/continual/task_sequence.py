"""What the manifests of all kinds of tasks have in common."""

import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from lilora.errors import UserError

from .images import ImageAspect

Split = Literal["train", "validation", "test"]
ScoredOn = Literal["test", "validation"]  # the latter: given as such, or held out of the training samples
_RATE = TypeAdapter(Annotated[float, Field(gt=0, le=1)])


def _rates(given: Any) -> Any:
    """A number, or pairs from methods to numbers: a mapping would leave a task without a hash."""
    by_method = given if isinstance(given, dict) else {"": given}
    try:
        if any(isinstance(rate, bool) for rate in by_method.values()):
            raise ValueError
        rates = {str(method): _RATE.validate_python(rate) for method, rate in by_method.items()}
    except (ValidationError, ValueError):
        raise ValueError(
            "it must be a number above 0 and at most 1, or a mapping from methods to such numbers"
        ) from None
    return tuple(rates.items()) if isinstance(given, dict) else rates[""]


LearningRate = Annotated[float | tuple[tuple[str, float], ...] | None, BeforeValidator(_rates)]


def held_out(samples: int) -> list[int]:
    """Which of so many training samples are scored instead of trained on: a fifth, at most 500, always the same ones."""
    return sorted(random.Random(samples).sample(range(samples), min(math.ceil(samples / 5), 500)))


class Task(BaseModel):
    """What tasks of all kinds have in common: a name and files, relative to the manifest's `data` until `load_manifest`
    resolves them.

    A probe is never trained and has no `train`: it is scored before the first task and after each. validation: the samples
    that `for_validation` scores. learning_rate: of the task, or of some methods by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    train: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    images: Path = Path()
    probe: bool = False
    learning_rate: LearningRate = None
    _scored: Split = PrivateAttr("test")  # the split that `test` is of

    @model_validator(mode="after")
    def _trained_or_probe(self) -> Self:
        if self.probe and self.train is not None:
            raise ValueError("a probe is never trained; leave out the key train, or the key probe")
        if self.probe and self.test is None:
            raise ValueError("a probe wants the key test; add it")
        if self.probe and self.learning_rate is not None:
            raise ValueError("a probe is never trained; leave out the key learning_rate, or the key probe")
        if not self.probe and self.train is None:
            raise ValueError("a task that is no probe wants the key train; add it")
        return self

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(split for split in ("train", "validation", "test") if getattr(self, split) is not None)

    def for_validation(self) -> Self:
        """The task with other samples as `test`: those of `validation` if it is given, or else some held out of `train`.

        A probe without `validation` stays as it is.
        """
        if self.validation is None and self.train is None:
            return self
        scored: Split = "train" if self.validation is None else "validation"
        copy = self.model_copy(update={"test": getattr(self, scored), "validation": None})
        copy._scored = scored
        return copy

    def scoring(self) -> str:
        """A fingerprint of what its scores depend on beside the model: test samples, scorer, what is said and asked."""
        keys = ("scorer", "scorer_model", "instruction", "answer_format", "max_new_tokens", "templates", "classes")
        given = [(key, value) for key in keys if (value := getattr(self, key, None)) is not None]
        digest = hashlib.sha256(repr([(key, v) for key, v in given if not isinstance(v, Path)]).encode())
        for source in [v for key, v in given if isinstance(v, Path) and key != "scorer_model"] + [self.test]:
            if source is not None and source.is_dir():
                files = [f for f in source.rglob("*") if f.is_file()]
                digest.update(repr(sorted((str(f.relative_to(source)), f.stat().st_size) for f in files)).encode())
            elif source is not None and source.is_file():
                with open(source, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def section(self, split: Split) -> Split:
        """The split that the samples of `split` are of, by their file."""
        return self._scored if split == "test" else split

    def part(self, split: Split, samples: int) -> Sequence[int]:
        """Which samples of its file, of as many, are those of a split: all, unless some are held out of the training."""
        if self._scored != "train":
            return range(samples)
        if samples < 2:
            raise UserError(
                f"task {self.name!r}: {self.train} has {samples} sample, and one to train on and one to score are wanted; name "
                "samples to score with the key validation"
            )
        held = held_out(samples)
        return held if split == "test" else sorted(set(range(samples)).difference(held))


class Manifest(BaseModel):
    """A named sequence of tasks of one kind; `data` is the folder of their files, `model` the base if none is given.

    As `load_manifest` returns it, `tasks` are those to train and `probes` the others; a file has all of them as `tasks`.

    image_aspect: whether images go to the "processor" as they are, or "pad"ded to squares (`images.set_image_aspect`).
    learning_rate: of all methods, or of some by name; that of a task, which has the same key, comes first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    data: Path = Path()
    model: str | None = None
    image_aspect: ImageAspect = "processor"
    learning_rate: LearningRate = None
    if TYPE_CHECKING:
        tasks: list[Any]  # of each kind's own type there
    _probes: tuple[Task, ...] = PrivateAttr(())
    _scored_on: ScoredOn = PrivateAttr("test")

    @property
    def probes(self) -> tuple[Task, ...]:
        return self._probes

    @property
    def scored_on(self) -> ScoredOn:
        """What its tasks are scored on."""
        return self._scored_on

    def for_validation(self) -> Self:
        """With each task's `for_validation`."""
        copy = self.model_copy(update={"tasks": [task.for_validation() for task in self.tasks]})
        copy._scored_on = "validation"
        return copy

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

    @property
    def rates(self) -> list[LearningRate]:
        """All that are given here."""
        given = (self.learning_rate, *(task.learning_rate for task in self.tasks))
        return [rate for rate in given if rate is not None]

    def learning_rates(self, method: str, default: float) -> tuple[float, dict[str, float]]:
        """(the learning rate of the tasks for which nothing else is said, that of the others by name) for a method."""
        of_all = _of_method(self.learning_rate, method, default)
        by_task = {task.name: _of_method(task.learning_rate, method, of_all) for task in self.tasks}
        return of_all, {task: rate for task, rate in by_task.items() if rate != of_all}


def _of_method(rates: LearningRate, method: str, default: float) -> float:
    if rates is None:
        return default
    return dict(rates).get(method, default) if isinstance(rates, tuple) else rates
