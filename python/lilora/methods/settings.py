"""A method's settings, checked: one model of them gives their types, ranges and defaults, and the options of the command."""

import json
from types import UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from lilora.errors import UserError
from lilora.families import pattern_error
from lilora.validation import first_problem, nearest
from lilora_kernels.layers.lilora import DROPOUT, RANK, default_alpha

OPTIONS = ("r", "sub_rank", "alpha", "dropout")  # settings with an option of their own; --set gives the others


class Settings(BaseModel):
    """Fields with their types and ranges, all numbers finite; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("it is too large")
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("it is true or false where something else is wanted")
        return value

    @classmethod
    def read(cls, method: str, values: dict[str, Any]) -> Self:
        """The settings in `values`; UserError in one sentence for the first that is unknown, missing or out of range."""
        for name in values:
            if name not in cls.model_fields:
                raise cls.unknown(method, name)
        try:
            return cls._made(values)
        except ValidationError as error:
            raise UserError(f"{method}: {first_problem(error)}") from error

    @classmethod
    def _made(cls, values: dict[str, Any]) -> Self:
        return cls(**values)

    @classmethod
    def unknown(cls, method: str, name: str) -> UserError:
        known = f"it has {', '.join(cls.model_fields)}"
        return UserError(f"{method} has no setting {name!r}; {nearest(str(name), cls.model_fields, known)}")


class MethodSettings(Settings):
    """target_modules: a pattern that the names of the adapted linears match in full.

    A method's settings derive from it. `lilora train` has the options --r, --sub-rank, --alpha and --dropout for the
    settings of these names, and --set for all.
    """

    target_modules: str

    @field_validator("target_modules")
    @classmethod
    def _pattern(cls, pattern: str) -> str:
        if reason := pattern_error(pattern):
            raise ValueError(f"it is no regular expression ({reason}); mend it")
        return pattern

    renamed: ClassVar[dict[str, str]] = {}  # option -> setting, where a method calls it otherwise

    @classmethod
    def options(cls) -> dict[str, str]:
        """Option -> setting, of those in OPTIONS that the method has."""
        named = {option: cls.renamed.get(option, option) for option in OPTIONS}
        return {option: setting for option, setting in named.items() if setting in cls.model_fields}

    @classmethod
    def table(cls) -> list[tuple[str, str, str]]:
        """(setting, its type, its default), as --set takes values: text or JSON."""
        return [(name, _type_text(field.annotation), _default_text(field)) for name, field in cls.model_fields.items()]


def alpha_field() -> Any:
    """An alpha above 0, 2 r where it is not given."""
    return Field(default_factory=lambda values: default_alpha(values["r"]), gt=0, json_schema_extra={"default": "2 r"})


class RankSettings(MethodSettings):
    """r: ranks of each linear; the scale is alpha / r."""

    r: int = Field(RANK, ge=1)
    alpha: float = alpha_field()
    dropout: float = Field(DROPOUT, ge=0, lt=1)


def _type_text(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(_type_text, get_args(annotation)))
    if annotation is type(None):
        return "null"
    return str(annotation) if get_args(annotation) else annotation.__name__


def _default_text(field: Any) -> str:
    if field.is_required():
        return ""
    default = (field.json_schema_extra or {}).get("default") or field.default
    return default if isinstance(default, str) else json.dumps(default)
