"""A method's settings, checked."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from lilora.errors import UserError


class Settings(BaseModel):
    """The fields of a method's settings with their types and ranges, all numbers finite; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("it is too large")
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("it is true or false where something else is wanted")
        return value

    @classmethod
    def read(cls, method: str, values: dict[str, Any]) -> Self:
        """The settings in `values`; UserError in one sentence for the first that is unknown, missing or out of range."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, first["loc"])) or "the settings"
            message = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                raise UserError(f"{method} has no setting {name!r}; it has {', '.join(cls.model_fields)}") from error
            if first["type"] == "missing":
                raise UserError(f"{method} lacks the setting {name!r}; give it") from error
            if not first["loc"]:
                raise UserError(f"{method}: {message}") from error
            wanted = message[0].lower() + message[1:]
            raise UserError(f"{method}: {name} is {first['input']!r}; {wanted}") from error
