"""What a bank records of its run, read back with its types: anyone may have written it."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from lilora.bank.bank import Bank
from lilora.errors import UserError
from lilora.methods import METHODS
from lilora.methods.settings import Settings
from lilora.registry import Registry
from lilora.reports.scores import ScoreMatrix
from lilora.validation import first_problem

from .images import ImageAspect
from .kinds import KINDS
from .task_identification import TASK_IDENTIFIERS, NearestCentroid


class TrainSettings(Settings):
    """How each task is trained. A run keeps them for all its tasks: they are part of the bank's config.

    batch_size: samples per batch of all processes together, so that their number changes nothing but rounding, and the last
    batch of an epoch, which several fill up with samples of its beginning. max_steps: -1
    for as many as epochs need. learning_rate: AdamW moves every weight by about that much in a step, so it is at most 1;
    learning_rates: those of tasks that have another, by name. max_grad_norm: a gradient with a larger norm is scaled down
    to it; 0: none is. The defaults are those of LiLoRA's paper, 64 samples a step.
    """

    learning_rate: float = Field(2e-5, gt=0, le=1)
    learning_rates: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field({})
    weight_decay: float = Field(0.01, ge=0)
    epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(-1, ge=-1)
    batch_size: int = Field(8, ge=1)
    gradient_accumulation: int = Field(8, ge=1)
    warmup: float = Field(0.03, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0)
    gradient_checkpointing: bool = False
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = Field(0, ge=0)

    def rate_of(self, task: str) -> float:
        return self.learning_rates.get(task, self.learning_rate)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """UserError for a value out of range, in the words of the command."""
        if values.get("max_steps") == 0:
            raise UserError("train: max_steps is 0; give at least 1, or -1 for as many as epochs need")
        return cls.read("train", values)


class _Record(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


def _known(parts: Registry) -> Callable[[str], str]:
    def check(name: str) -> str:
        parts.find(name)
        return name

    return check


Points = Annotated[float, Field(ge=0, le=1000)]  # those of CIDEr go to 1000


class _Config(_Record):
    method: Annotated[str, AfterValidator(_known(METHODS))]
    settings: dict[str, JsonValue] = {}
    train: dict[str, JsonValue] = {}
    kind: Literal[tuple(KINDS)] = "instruction"  # earlier versions knew but one, and did not name it
    model: str = ""
    manifest: str = ""
    label: str | None = None
    image_aspect: ImageAspect = "processor"  # named only if it is another
    tasks: list[str] | None = None  # of a method that trains on all of them together
    task_identifier: Annotated[str, AfterValidator(_known(TASK_IDENTIFIERS))] = NearestCentroid.name


class _Info(_Record):
    """Of one task; banks of earlier versions do not say all of it."""

    parameters: int | None = Field(None, ge=0, lt=2**63)
    ranks: int | None = Field(None, ge=0, lt=2**63)
    seconds: float | None = Field(None, ge=0)
    losses: dict[str, list[tuple[int, float]]] = {}  # by stage: (step, mean loss since the entry before)
    max_new_tokens: int | None = Field(None, gt=0)
    classes: list[str] = []  # of the task's own classifier, if it has one


class _Scores(_Record):
    matrix: dict[str, JsonValue]
    functions: dict[str, dict[str, str]]
    seconds: dict[str, float]
    zero_shot: dict[str, Points] = {}  # of tasks and probes before any training
    probes: dict[str, dict[str, Points]] = {}  # stage -> probe -> points


def train_settings(bank: Bank) -> TrainSettings:
    """How the bank's tasks were trained, after everything that the bank records of its run was checked.

    Raises:
        UserError: something there is not what `lilora` writes; names the bank and the place.
    """
    try:
        config = _Config.model_validate(bank.config)
        TypeAdapter(dict[str, _Info]).validate_python({t["name"]: t["info"] for t in bank.describe()["tasks"]})
        if bank.scores:
            ScoreMatrix.from_dict(_Scores.model_validate(bank.scores).matrix)
        METHODS[config.method].read_settings(config.settings)
        check_label(config.label)
        return TrainSettings.of(config.train)
    except ValidationError as error:
        raise UserError(
            f"{bank.path} does not record a run as lilora does: {first_problem(error)}; restore it from a copy"
        ) from error
    except UserError as error:
        raise UserError(f"{bank.path} does not record a run as lilora does: {error}") from error


def image_aspect_of(config: dict[str, Any]) -> ImageAspect:
    """What the processor was given of images, in a bank with this config."""
    return config.get("image_aspect", "processor")


def check_label(label: str | None) -> None:
    """UserError unless reports can print it in one line."""
    if label is not None and (not label.strip() or not label.isprintable() or len(label) > 200):
        raise UserError(f"label is {label!r}; give one line of at most 200 characters that can be printed")
