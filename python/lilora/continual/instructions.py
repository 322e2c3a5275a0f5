"""Tasks of instruction and answer: their part of a manifest, and the samples of their files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from torch.utils.data import Dataset

from lilora.errors import UserError

from .answer_formats import check_format, in_format
from .images import EmbeddedImage, check_images
from .records import InstructionRecord, Records
from .scorers import Judge
from .task_sequence import Manifest, Split, Task


class TaskSpec(Task):
    """One task: its files, what is said to the model, and how an answer is judged.

    A task without `test` is trained and not scored, and needs no scorer. `scorer_model` is the folder of the model that some
    scorers want. `test_images` is `images` of the test split, where that is another folder. `instruction` follows every
    question that does not end with it, on a new line. `answer_format` is what an answer in the instructed format keeps: a rule
    of `answer_formats`, or a regular expression that it matches in full.
    """

    test_images: Path | None = None
    scorer: str | None = None
    scorer_model: Path | None = None
    instruction: str = ""
    answer_format: str | None = None
    max_new_tokens: int = Field(16, gt=0)

    @field_validator("answer_format")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            check_format(pattern)
        return pattern

    @model_validator(mode="after")
    def _judged(self) -> Self:
        for split in ("test", "validation"):
            if getattr(self, split) is not None and self.scorer is None:
                raise ValueError(f"a task with {split} wants the key scorer; add it")
        return self

    def for_validation(self) -> Self:
        """The same of a task that has a scorer; another one is not scored."""
        return self if self.scorer is None else super().for_validation().model_copy(update={"test_images": None})

    def in_format(self, answer: str, references: Sequence[str]) -> bool:
        """Whether an answer has the format of `answer_format`; UserError when finding out takes more than a second."""
        with self._named():
            return in_format(self.answer_format, answer, references)

    def located(self, folder: Path) -> Self:
        """With the paths under `folder`."""
        keys = [*self.splits, "images", *(key for key in ("test_images", "scorer_model") if getattr(self, key))]
        return self.model_copy(update={key: folder / getattr(self, key) for key in keys})

    def check(self) -> None:
        """Raise UserError for an unknown scorer or one that no test answer suits, a missing or broken file, a split without
        samples, a missing image."""
        with self._named():
            if self.scorer is not None:
                self.judge()
        for split in self.splits:
            data = instruction_data(self, split)
            check_images(data.images(), f"task {self.name!r}: {getattr(self, split)}")
            if split != "train":
                self.check_scorer(data)

    def check_scorer(self, data: "InstructionDataset") -> None:
        """Raise UserError for a scorer that is unknown or that no answer of the samples suits."""
        with self._named():
            suits = self.judge().suits(sample.answers for sample in data)
        if not suits:
            raise UserError(
                f"task {self.name!r}: scorer {self.scorer!r} gives 0 even to the references themselves, such as "
                f"{data[0].answers[0][:80]!r} in {getattr(self, data.split)}; choose another scorer."
            )

    def judge(self) -> Judge:
        """What scores the answers."""
        return Judge(self.scorer, self.scorer_model)

    def image_folder(self, split: Split) -> Path:
        """What the image paths of a split start from."""
        return self.test_images if split == "test" and self.test_images is not None else self.images

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Let a UserError say which task it is of."""
        try:
            yield
        except UserError as error:
            raise UserError(f"task {self.name!r}: {error}") from error


class TaskManifest(Manifest):
    """Tasks of instruction and answer, for multimodal language models."""

    kind: Literal["instruction"] = "instruction"
    tasks: list[TaskSpec] = Field(min_length=1)


@dataclass(frozen=True)
class Sample:
    """A question about some images (or none). `answers` are the references; training teaches the first.

    history: the questions and answers of the same conversation ahead of it; training teaches these answers, too. system:
    the text of its system turn. images_ahead: how many of the images come with each question; (): all with the first.
    """

    id: str
    images: tuple[Path | EmbeddedImage, ...]
    question: str
    answers: tuple[str, ...]
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""
    images_ahead: tuple[int, ...] = ()


class InstructionDataset(Dataset):
    """The samples of one split of a task, from LLaVA's instruction format; one at a time is made when it is asked for.

    The file is a JSON list, JSON lines, parquet, or a folder that `datasets` wrote, of `{id, image, conversations: [{from:
    human | gpt, value}, ...]}` with `image` a path under `spec.images`, a list of paths, empty or absent; `datasets` may
    store the images themselves. `{images, messages: [{role: user | assistant, content}, ...]}` says the same, with contents
    as strings or as lists of parts, which may hold the images' paths.

    `{question_id, image, text, answer}`, as test files of LLaVA have it, is one question and its answer.

    A human turn is a question, which the task's instruction follows unless it ends with it; the gpt turn after it is its
    answer. A record of several questions is one sample, a conversation: training teaches all of its answers, as LLaVA's does,
    and evaluation asks the last question, with the earlier ones and their answers ahead of it. A list `answers` gives several
    references for the last. A first turn `system`, or a key of that name, is kept; a first turn of gpt, which answers nothing,
    is left out, as LLaVA does. `<image>` marks say with which question an image comes, ahead of its text; where there are not
    as many as images, all come with the first.

    Raises UserError when the file is missing or broken or has no samples, and when human and gpt do not take turns.

    first: of each make of sample the index of its first: (with images, of several turns, with a system turn) -> index.
    """

    def __init__(self, spec: TaskSpec, split: Split):
        self.spec = spec
        self.split = split
        self._where = f"task {spec.name!r}: {getattr(spec, split)}"
        self._records = _records(spec, split)
        if not self._records:
            raise UserError(f"{self._where} has no samples; add some or take the task out of the manifest.")
        self._numbers = spec.part(split, len(self._records))
        self.first: dict[tuple[bool, bool, bool], int] = {}
        for index, sample in enumerate(self):
            self.first.setdefault((bool(sample.images), bool(sample.history), bool(sample.system)), index)

    def _sample(self, record: InstructionRecord, number: int) -> Sample:
        name = str(number if record.id is None else record.id)

        def wrong(what: str) -> UserError:
            return UserError(f"{self._where}: {self._records.file.place(number)}: sample {name!r} {what}")

        turns, system = record.turns, ""
        if turns and turns[0][0] == "system":
            system = turns.pop(0)[1]
        if turns and turns[0][0] == "gpt":
            del turns[0]
        if not turns:
            raise wrong("has no human turn; add the question.")
        for turn, (speaker, _) in enumerate(turns):
            wanted = ("human", "gpt")[turn % 2]
            if speaker != wanted:
                raise wrong(
                    f"is wrong: turn number {turn + 1} of human and gpt is from {speaker!r} where {wanted!r} is wanted; "
                    "let them take turns, a system turn ahead."
                )
        questions, replies = [text for _, text in turns[::2]], [text for _, text in turns[1::2]]
        answers = list(record.answers)
        if len(replies) == len(questions):
            if replies[-1] in answers:
                answers.remove(replies[-1])
            answers.insert(0, replies.pop())
        if not answers:
            raise wrong(
                "has no answer, neither a gpt turn behind its last question nor the key answer or answers; add one."
            )
        images = record.images
        marks = tuple(question.count("<image>") for question in questions)
        if any(marks) and not images:
            raise wrong(f"has {sum(marks)} marks <image> and no image; name its files under the key image or images.")
        if any(marks[1:]) and sum(marks) != len(images):
            raise wrong(f"has {len(images)} images and {sum(marks)} marks <image>; mark each where it comes.")
        *earlier, question = (self._instructed(q.replace("<image>", "").strip()) for q in questions)
        return Sample(
            id=name,
            images=tuple(
                EmbeddedImage(f"{i + 1} of sample {name!r} in {getattr(self.spec, self.split)}", image)
                if isinstance(image, bytes)
                else self.spec.image_folder(self.split) / image
                for i, image in enumerate(images)
            ),
            question=question,
            answers=tuple(answers),
            history=tuple(zip(earlier, replies, strict=True)),
            system=system,
            images_ahead=marks if any(marks[1:]) else (),
        )

    def _instructed(self, question: str) -> str:
        """The question with the task's instruction behind it, once."""
        instruction = self.spec.instruction
        if " ".join(question.split()).endswith(" ".join(instruction.split())):  # always of an instruction that is empty
            return question
        return f"{question}\n{instruction}" if question else instruction

    def images(self) -> Iterator[Path | EmbeddedImage]:
        """The images of all samples, one after another."""
        return (image for sample in self for image in sample.images)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        number = self._numbers[index]
        return self._sample(self._records[number], number)

    def __iter__(self) -> Iterator[Sample]:
        wanted = set(self._numbers)
        return (self._sample(record, number) for number, record in enumerate(self._records) if number in wanted)


def instruction_data(spec: TaskSpec, split: Split) -> InstructionDataset:
    """The samples of one split of a task; a file that does not change is checked once in a process."""
    return _checked(spec, split, _records(spec, split).file)


def _records(spec: TaskSpec, split: Split) -> Records[InstructionRecord]:
    return Records(getattr(spec, split), InstructionRecord, f"task {spec.name!r}", "LLaVA instruction record")


@cache
def _checked(spec: TaskSpec, split: Split, file: object) -> InstructionDataset:
    return InstructionDataset(spec, split)
