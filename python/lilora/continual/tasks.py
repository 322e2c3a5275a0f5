"""A sequence of tasks: the manifest (YAML) and the samples of its JSON files."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import regex
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch.utils.data import Dataset

from lilora.continual.images import check_images
from lilora.continual.records import InstructionRecord, read_records
from lilora.continual.scorers import scorer
from lilora.errors import UserError

Split = Literal["train", "test"]


class TaskSpec(BaseModel):
    """One task: its files, what is said to the model, and how an answer is judged.

    `instruction` follows every question, on a new line. `answer_format` is a regular expression that an answer in the
    instructed format matches in full. Paths are relative to the manifest's `data` until `load_manifest` resolves them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    train: Path
    test: Path
    images: Path = Path()
    scorer: str
    instruction: str = ""
    answer_format: str | None = None
    max_new_tokens: int = Field(16, gt=0)

    @field_validator("answer_format")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return pattern

    def in_format(self, answer: str) -> bool:
        """Whether the whole answer matches `answer_format`; UserError when that takes more than a second."""
        try:
            return regex.fullmatch(self.answer_format, answer, timeout=1) is not None
        except TimeoutError as error:
            raise UserError(
                f"task {self.name!r}: answer_format {self.answer_format!r} takes more than a second on an answer of "
                f"{len(answer)} characters; write it without a repetition of what can be read in several ways."
            ) from error

    def located(self, folder: Path) -> Self:
        """With the paths under `folder`."""
        return self.model_copy(update={key: folder / getattr(self, key) for key in ("train", "test", "images")})

    def check(self) -> None:
        """Raise UserError for an unknown scorer or one that no test answer suits, a missing or broken file, a split without
        samples, a missing image."""
        try:
            judge = scorer(self.scorer)
        except UserError as error:
            raise UserError(f"task {self.name!r}: {error}") from error
        for split in ("train", "test"):
            data = InstructionDataset(self, split)
            data.check_images()
        if not any(judge(sample.answers[0], list(sample.answers)) for sample in data.samples):
            raise UserError(
                f"task {self.name!r}: scorer {self.scorer!r} gives 0 even to the references themselves, such as "
                f"{data.samples[0].answers[0][:80]!r} in {self.test}; choose another scorer."
            )


class Manifest(BaseModel):
    """A named sequence of tasks of one kind; `data` is the folder of their files, `model` the base if none is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    data: Path = Path()
    model: str | None = None


class TaskManifest(Manifest):
    """Tasks of instruction and answer, for multimodal language models."""

    kind: Literal["instruction"] = "instruction"
    tasks: list[TaskSpec] = Field(min_length=1)


def load_manifest(path: str | Path, order: list[str] | None = None, data: str | Path | None = None) -> Manifest:
    """Read a manifest and check everything it names.

    A key `kind` of the manifest says what its tasks are: `instruction`, a TaskManifest, where it is left out, or
    `classification`, a ClassificationManifest. The returned manifest holds absolute paths: `data` and `model` (when it
    starts with `.` or `/`; otherwise it is a model id) are relative to the manifest's folder, the tasks' files to `data`.
    An argument `data` replaces the manifest's folder of data. `order` names the tasks to run, in that order.

    Raises UserError for a key or name that is not allowed, an unknown scorer, a missing or broken file, a task without
    samples, and an image that is missing or cannot be opened.
    """
    path = Path(path)
    manifest = _parse(path)
    _check_names(path, manifest)
    tasks = manifest.tasks if order is None else _ordered(manifest, order)
    root = path.resolve().parent
    folder = Path(data).resolve() if data is not None else (root / manifest.data).resolve()
    tasks = [task.located(folder) for task in tasks]
    for task in tasks:
        task.check()
    model = manifest.model
    if model is not None and model.startswith((".", "/")):
        model = str((root / model).resolve())
    return manifest.model_copy(update={"tasks": tasks, "data": folder, "model": model})


def _parse(path: Path) -> Manifest:
    from .classification import ClassificationManifest

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a task manifest.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())}); correct it.") from error
    kinds = {manifest.model_fields["kind"].default: manifest for manifest in (TaskManifest, ClassificationManifest)}
    kind = str(content.get("kind", "instruction")) if isinstance(content, dict) else "instruction"
    if kind not in kinds:
        raise UserError(f"{path}: kind {kind!r} is unknown; choose one of {', '.join(kinds)}.")
    try:
        return kinds[kind].model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error, kinds[kind])}") from error


def _first_problem(error: ValidationError, manifest: type[Manifest]) -> str:
    """The first problem of a manifest as one sentence without its file; a misspelt key before the key it should be."""
    problem = min(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    location = problem["loc"]  # (), (key, ...), ("tasks", index) or ("tasks", index, key, ...)
    in_task = len(location) > 1 and location[0] == "tasks"
    place = f" of task number {location[1] + 1}" if in_task else ""
    within = location[2:] if in_task else location
    if not within:
        return f"the manifest{place} is wrong: it must be a mapping of keys to values; correct it."
    key = within[0]
    if problem["type"] == "extra_forbidden":
        (task,) = get_args(manifest.model_fields["tasks"].annotation)
        known = list((task if in_task else manifest).model_fields)
        near = difflib.get_close_matches(str(key), known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}."
        return f"key {key!r}{place} is unknown; {advice}"
    if problem["type"] == "missing":
        return f"key {key!r}{place} is missing; add it."
    message = problem["msg"].removeprefix("Value error, ")
    return f"key {key!r}{place} is wrong: {message[0].lower() + message[1:]}; correct it."


def _check_names(path: Path, manifest: Manifest) -> None:
    from lilora_kernels.linear import check_task_name

    seen = set()
    for task in manifest.tasks:
        if task.name.casefold() in seen:
            raise UserError(f"{path}: two tasks are called {task.name!r} (case is ignored); give each its own name.")
        seen.add(task.name.casefold())
        try:
            check_task_name(task.name)
        except ValueError as error:
            raise UserError(f"{path}: task {task.name!r}: {error}") from error


def _ordered(manifest: Manifest, order: list[str]) -> list:
    by_name = {task.name: task for task in manifest.tasks}
    for name in order:
        if name not in by_name:
            raise UserError(f"order: task {name!r} is unknown; {manifest.name} has {', '.join(by_name)}.")
    if not order or len(set(order)) < len(order):
        raise UserError(f"order: got {','.join(order)!r}; name at least one task and each of them once.")
    return [by_name[name] for name in order]


@dataclass(frozen=True)
class Sample:
    """A question about some images (or none). `answers` are the references; training teaches the first.

    history: the questions and answers of the same conversation ahead of it; training teaches these answers, too. system:
    the text of its system turn. images_ahead: how many of the images come with each question; (): all with the first.
    """

    id: str
    images: tuple[Path, ...]
    question: str
    answers: tuple[str, ...]
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""
    images_ahead: tuple[int, ...] = ()


class InstructionDataset(Dataset):
    """The samples of one split of a task, from LLaVA's instruction format.

    The file is a JSON list, or JSON lines, or parquet, of `{id, image, conversations: [{from: human | gpt, value}, ...]}`
    with `image` a path under `spec.images`, a list of paths, empty or absent. `{images, messages: [{role: user | assistant,
    content}, ...]}` says the same, with contents as strings or as lists of parts, which may hold the images' paths.

    A human turn is a question, which the task's instruction follows; the gpt turn after it is its answer. A record of
    several questions is one sample, a conversation: training teaches all of its answers, as LLaVA's does, and evaluation
    asks the last question, with the earlier ones and their answers ahead of it. A list `answers` gives several references
    for the last. A first turn `system`, or a key of that name, is kept; a first turn of gpt, which answers nothing, is left
    out, as LLaVA does. `<image>` marks say with which question an image comes, ahead of its text; where there are not as
    many as images, all come with the first.

    Raises UserError when the file is missing or broken or has no samples, and when human and gpt do not take turns.
    """

    def __init__(self, spec: TaskSpec, split: Split):
        self.spec = spec
        self.split = split
        path = getattr(spec, split)
        self._where = f"task {spec.name!r}: {path}"
        records = read_records(path, InstructionRecord, self._where, "a list of LLaVA instruction records")
        if not records:
            raise UserError(f"{self._where} has no samples; add some or take the task out of the manifest.")
        self.samples = [self._sample(record, number) for number, record in enumerate(records)]

    def _sample(self, record: InstructionRecord, number: int) -> Sample:
        name = str(number if record.id is None else record.id)
        where = f"{self._where}: sample {name!r}"
        turns, system = record.turns, ""
        if turns and turns[0][0] == "system":
            system = turns.pop(0)[1]
        if turns and turns[0][0] == "gpt":
            del turns[0]
        if not turns:
            raise UserError(f"{where} has no human turn; add the question.")
        for number, (speaker, _) in enumerate(turns):
            wanted = ("human", "gpt")[number % 2]
            if speaker != wanted:
                raise UserError(
                    f"{where}: turn number {number + 1} of human and gpt is from {speaker!r} where {wanted!r} is wanted; "
                    "let them take turns, a system turn ahead."
                )
        questions, said = [text for _, text in turns[::2]], [text for _, text in turns[1::2]]
        answers = list(record.answers)
        if len(said) == len(questions):
            if said[-1] in answers:
                answers.remove(said[-1])
            answers.insert(0, said.pop())
        if not answers:
            raise UserError(f"{where} has no gpt turn behind its last question and no answers; add one.")
        names = record.images
        marks = tuple(question.count("<image>") for question in questions)
        if any(marks[1:]) and sum(marks) != len(names):
            raise UserError(
                f"{where} has {len(names)} images and {sum(marks)} marks <image>; mark each where it comes."
            )
        *earlier, question = (
            "\n".join(filter(None, (q.replace("<image>", "").strip(), self.spec.instruction))) for q in questions
        )
        return Sample(
            id=name,
            images=tuple(self.spec.images / name for name in names),
            question=question,
            answers=tuple(answers),
            history=tuple(zip(earlier, said, strict=True)),
            system=system,
            images_ahead=marks if any(marks[1:]) else (),
        )

    def check_images(self) -> None:
        """Raise UserError at the first image that is missing or, in all but very large splits, cannot be opened."""
        check_images([image for sample in self.samples for image in sample.images], self._where)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]
