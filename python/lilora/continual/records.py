"""Records of data sets, as JSON, JSON lines or parquet: instructions in LLaVA's format and in those of its relatives."""

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import AliasChoices, BaseModel, Field, TypeAdapter, ValidationError, field_validator, model_validator

from lilora.errors import UserError

Model = TypeVar("Model", bound=BaseModel)

_SPEAKERS = {"user": "human", "assistant": "gpt", "chatgpt": "gpt", "model": "gpt"}  # other names of LLaVA's two


class _ImageUrl(BaseModel):
    url: str


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


class InstructionRecord(BaseModel):
    """`{id, image, system, conversations: [{from, value}, ...], answers}` as LLaVA has it, all but conversations optional.

    `images` and `messages: [{role, content}, ...]` are the same under other names. Without an id a record is called by its
    number, from 0.
    """

    id: str | int | None = None
    image: str | list[str] | None = Field(None, validation_alias=AliasChoices("image", "images"))
    system: str = ""
    conversations: list[Turn] = Field(validation_alias=AliasChoices("conversations", "messages"))
    answers: list[str] = []

    @model_validator(mode="after")
    def _as_many_images_as_parts(self) -> Self:
        parts = sum(len(turn.images) for turn in self.conversations)
        if parts and len(self.images) != parts:
            raise ValueError(f"there are {len(self.images)} images and {parts} parts of the messages that are images")
        return self

    @property
    def images(self) -> list[str]:
        """Paths: the record's own, or those of its turns."""
        own = [self.image] if isinstance(self.image, str) else self.image or []
        inner = [path for turn in self.conversations for path in turn.images]
        return [path for path in own if path] or [path for path in inner if path]

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(speaker, text) of each turn, a system turn first if there is one."""
        turns = [(turn.speaker, turn.text) for turn in self.conversations]
        return [("system", self.system), *turns] if self.system else turns


def read_records(path: Path, kind: type[Model], where: str, what: str) -> list[Model]:
    """The records of a file: a JSON list, JSON lines (a record on each line), or parquet, through `datasets`.

    Raises UserError when the file cannot be read or is not `what` is wanted.
    """
    if path.suffix == ".parquet":
        return _checked(lambda: TypeAdapter(list[kind]).validate_python(_rows(path, where)), where, f"is not {what}")
    content = _content(path, where)
    if not content.startswith(b"{"):
        return _checked(lambda: TypeAdapter(list[kind]).validate_json(content), where, f"is not {what}")
    lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    return [
        _checked(lambda line=line: kind.model_validate_json(line), where, f"is not {what}: line {number} is no record")
        for number, line in lines
    ]


def read_json(path: Path, wanted: TypeAdapter, where: str, what: str) -> Any:
    """The content of a JSON file; UserError when it cannot be read or is not `what` is wanted."""
    return _checked(lambda: wanted.validate_json(_content(path, where)), where, f"is not {what}")


def _content(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8).lstrip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{where} cannot be read ({reason}); put the data there or pass its folder with --data."
        ) from error


def _rows(path: Path, where: str) -> list[dict[str, Any]]:
    try:
        from datasets import Dataset
    except ImportError as error:
        raise UserError(
            f"{where} is parquet, which wants the package datasets; pip install datasets, or write it as JSON lines."
        ) from error
    if not path.is_file():
        raise UserError(f"{where} cannot be read (no such file); put the data there or pass its folder with --data.")
    try:
        return _given(Dataset.from_parquet(str(path)).to_list())
    except Exception as error:  # of several libraries
        raise UserError(f"{where} cannot be read ({' '.join(str(error).split())[:300]}); replace it.") from error


def _given(value: Any) -> Any:
    """Without the keys of dictionaries that hold nothing, which rows of a table have in common."""
    if isinstance(value, dict):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return [_given(inner) for inner in value] if isinstance(value, list) else value


def _checked(read: Callable[[], Any], where: str, otherwise: str) -> Any:
    try:
        return read()
    except ValidationError as error:
        problems = error.errors(include_url=False)
        first = (problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1])
        problem = max(first, key=lambda problem: len(problem["loc"]))  # of alternatives the one that fits best
        place = ".".join(map(str, problem["loc"]))
        detail = f"{place}: {problem['msg']}" if place else problem["msg"]
        raise UserError(f"{where} {otherwise} ({detail}); mend it.") from error
