"""What the manifests of all kinds of tasks have in common."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

Split = Literal["train", "test"]
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
            f"it is {given!r}; it must be a number above 0 and at most 1, or a mapping from methods to such numbers"
        ) from None
    return tuple(rates.items()) if isinstance(given, dict) else rates[""]


LearningRate = Annotated[float | tuple[tuple[str, float], ...] | None, BeforeValidator(_rates)]


class Manifest(BaseModel):
    """A named sequence of tasks of one kind; `data` is the folder of their files, `model` the base if none is given.

    learning_rate: of all methods, or of some by name; that of a task, which has the same key, comes first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    data: Path = Path()
    model: str | None = None
    learning_rate: LearningRate = None
    tasks: list[Any]

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
