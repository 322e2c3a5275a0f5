"""A bank of what other code has trained."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig

from lilora.bank.bank import Bank
from lilora.bank.index import BaseModelId
from lilora.importers.checkpoint import Imported, write_bank
from lilora.importers.dac import read_dac
from lilora.importers.lilora import read_lilora
from lilora.importers.pclr import read_pclr
from lilora.importers.peft_folder import read_peft
from lilora.methods import DAC, PCLR, LiLoRA, Method, make_method

from .base_model import load_base
from .images import ImageAspect
from .kinds import KINDS
from .publish import write_bank_card


class Source(NamedTuple):
    """Whose files `read` understands, the method that their tasks are of, and what LLaVA was given of images there."""

    read: Callable[..., Imported]
    method: type[Method]
    image_aspect: ImageAspect = "processor"


SOURCES = {
    "lilora": Source(read_lilora, LiLoRA, "pad"),
    "pclr": Source(read_pclr, PCLR, "pad"),
    "dac": Source(read_dac, DAC),
    "peft": Source(read_peft, LiLoRA),
}


def import_bank(
    source: Source,
    files: Sequence[Path],
    model: str,
    config: PretrainedConfig,
    out: Path,
    tasks: Sequence[str] | None = None,
    track: Callable[[Iterable], Iterable] = iter,
) -> tuple[Bank, tuple[str, ...]]:
    """A new bank in the new or empty folder `out`, and notes for the user, one sentence each.

    model, config: the base model that the tasks were trained on. tasks: their names, else as the source names them. track
    shows progress.

    Raises:
        UserError: the files, the base model and the method do not fit together, or the folder is in use.
    """
    kind = "classification" if config.model_type == "clip" else "instruction"
    image_aspect = source.image_aspect if config.model_type == "llava" else "processor"
    base, _ = load_base(model, "auto", "cpu", KINDS[kind], image_aspect)
    identity = BaseModelId.of(base, model)
    found = source.read(files, base, tasks)
    method = source.method.name
    settings = {**source.method.presets["released"], **found.settings}
    make_method(method, base, settings)  # refuses what it could not be restored with
    recorded = {"method": method, "settings": settings, "train": {"dtype": "auto"}, "kind": kind, "model": model}
    if image_aspect != "processor":
        recorded["image_aspect"] = image_aspect
    bank = write_bank(out, recorded, identity, found.tasks, track)
    write_bank_card(bank)
    return bank, found.notes
