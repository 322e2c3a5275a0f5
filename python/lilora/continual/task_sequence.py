"""What the manifests of all kinds of tasks have in common."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

Split = Literal["train", "test"]


class Manifest(BaseModel):
    """A named sequence of tasks of one kind; `data` is the folder of their files, `model` the base if none is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    data: Path = Path()
    model: str | None = None
