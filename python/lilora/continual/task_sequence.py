"""What the manifests of all kinds of tasks have in common."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from .images import ImageAspect

Split = Literal["train", "test"]


class Manifest(BaseModel):
    """A named sequence of tasks of one kind; `data` is the folder of their files, `model` the base if none is given.

    image_aspect: whether images go to the "processor" as they are, or "pad"ded to squares (`images.set_image_aspect`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    data: Path = Path()
    model: str | None = None
    image_aspect: ImageAspect = "processor"
