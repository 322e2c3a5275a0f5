"""Records of data sets: instructions in LLaVA's format and in those of its relatives."""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import AliasChoices, BaseModel, Field, TypeAdapter, ValidationError, field_validator, model_validator

from lilora.errors import UserError
from lilora.validation import first_problem

from .record_files import record_file

Model = TypeVar("Model", bound=BaseModel)

_SPEAKERS = {"user": "human", "assistant": "gpt", "chatgpt": "gpt", "model": "gpt"}  # other names of LLaVA's two


class _ImageUrl(BaseModel):
    url: str


class StoredImage(BaseModel):
    """An image as `datasets` stores it: the bytes of its file, or its path."""

    content: bytes | None = Field(None, validation_alias="bytes")
    path: str | None = None


class _Part(BaseModel):
    """A part of a turn's content: `{type: text, text}`, or `{type: image}` with the image's path or without."""

    type: str
    text: str = ""
    image: str | _ImageUrl | None = Field(None, validation_alias=AliasChoices("image", "path", "url", "image_url"))

    @field_validator("type")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in ("text", "image", "image_url"):
            raise ValueError(f"{kind!r} is neither text nor image")
        return kind


class Turn(BaseModel):
    """What `speaker` says: human, gpt, system, or another that no record should have."""

    speaker: str = Field(validation_alias=AliasChoices("from", "role"))
    content: str | list[_Part] = Field(validation_alias=AliasChoices("value", "content"))

    @field_validator("speaker")
    @classmethod
    def _named_as_by_llava(cls, speaker: str) -> str:
        return _SPEAKERS.get(speaker.strip().lower(), speaker.strip().lower())

    @property
    def text(self) -> str:
        """Its text, with a mark `<image>` for each part that is an image."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text if part.type == "text" else "<image>" for part in self.content)

    @property
    def images(self) -> list[str]:
        """The path of each part that is an image, "" where it has none."""
        parts = [] if isinstance(self.content, str) else [part for part in self.content if part.type != "text"]
        return [part.image.url if isinstance(part.image, _ImageUrl) else part.image or "" for part in parts]


Picture = str | StoredImage


class InstructionRecord(BaseModel):
    """`{id, image, system, conversations: [{from, value}, ...], answers}` as LLaVA has it, all but conversations optional.

    `images` and `messages: [{role, content}, ...]` are the same under other names. `{question_id, image, text, answer}`, as
    LLaVA's evaluation has it, is a conversation of one question, `answer` one reference or a list of them, or `answer_bbox` as
    CoIN's Grounding has it. Without an id a record is called by its number, from 0.
    """

    id: str | int | None = None
    image: Picture | list[Picture] | None = Field(None, validation_alias=AliasChoices("image", "images"))
    system: str = ""
    conversations: list[Turn] = Field(validation_alias=AliasChoices("conversations", "messages"))
    answers: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _of_question(cls, record: Any) -> Any:
        if not isinstance(record, dict) or "text" not in record or record.keys() & {"conversations", "messages"}:
            return record
        turns = [{"from": "human", "value": record["text"]}]
        if "answer_bbox" in record:
            record = record | {"answer": record["answer_bbox"]}
        if isinstance(record.get("answer"), list):  # several references
            record = record | {"answers": [*record["answer"], *record.get("answers", [])]}
        elif "answer" in record:
            turns.append({"from": "gpt", "value": record["answer"]})
        return {"id": record.get("question_id")} | record | {"conversations": turns}

    @model_validator(mode="after")
    def _as_many_images_as_parts(self) -> Self:
        parts = sum(len(turn.images) for turn in self.conversations)
        if parts and len(self.images) != parts:
            raise ValueError(f"there are {len(self.images)} images and {parts} parts of the messages that are images")
        return self

    @property
    def images(self) -> list[str | bytes]:
        """Paths, or the content of files: the record's own, or those of its turns."""
        own = self.image if isinstance(self.image, list) else [self.image]
        own = [(image.content or image.path) if isinstance(image, StoredImage) else image for image in own]
        inner = [path for turn in self.conversations for path in turn.images]
        return [image for image in own if image] or [path for path in inner if path]

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(speaker, text) of each turn, a system turn first if there is one."""
        turns = [(turn.speaker, turn.text) for turn in self.conversations]
        return [("system", self.system), *turns] if self.system else turns


class Records(Sequence[Model]):
    """The records of a file, each parsed and checked when it is asked for.

    Raises UserError, which `owner` begins, for a file that cannot be read and a record that is no `what`.
    """

    def __init__(self, path: Path, kind: type[Model], owner: str, what: str) -> None:
        self._kind, self._where, self._what = kind, f"{owner}: {path}", what
        try:
            self.file = record_file(path)
        except UserError as error:
            raise UserError(f"{owner}: {error}") from error

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> Model:
        return self._checked(index, self.file[index])

    def __iter__(self) -> Iterator[Model]:
        return map(self._checked, range(len(self)), self.file)

    def _checked(self, index: int, content: bytes | dict[str, Any]) -> Model:
        try:
            if isinstance(content, bytes):
                return self._kind.model_validate_json(content)
            return self._kind.model_validate(content)
        except ValidationError as error:
            raise UserError(
                f"{self._where}: {self.file.place(index)} is no {self._what} ({first_problem(error)}); mend it."
            ) from error


def read_json(path: Path, wanted: TypeAdapter, where: str, what: str) -> Any:
    """The content of a JSON file; UserError when it cannot be read or is not `what` is wanted."""
    try:
        return wanted.validate_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise UserError(
            f"{where} cannot be read ({error.strerror}); put the data there or pass its folder with --data."
        ) from error
    except ValidationError as error:
        raise UserError(f"{where} is not {what} ({first_problem(error)}); mend it.") from error
