"""A bank's model again: the base model with all tasks in place."""

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.bank import Bank, BaseModelId
from ..io.hub import open_bank
from ..methods import Method, make_method
from .kinds import KINDS, kind_of
from .recorded import train_settings
from .train import load_base, restore


def load_bank(
    path: str | Path,
    model: str | None = None,
    device: str = "auto",
    wanted: str | None = None,
    *,
    answers: bool = False,
) -> tuple[Bank, Method, Any]:
    """(the bank, its method with all tasks in place, the processor); `method.model` is the model to call.

    path: a bank's folder, a run's, or a repository of the hub. model: the base model, by default the one that the bank was
    made with. UserError if the bank has no task `wanted`, gives no answers and `answers` is set, or fits no such base model.
    """
    bank = open_bank(path)
    settings = train_settings(bank)
    if not bank.tasks:
        raise UserError(f"{path} holds no learned task yet; train first")
    if answers and kind_of(bank.config) is not KINDS["instruction"]:
        raise UserError(f"{path} has learned to classify images and writes no text; use lilora eval")
    if wanted is not None and wanted not in bank.tasks:
        raise UserError(f"task {wanted!r} is unknown; {path} has {', '.join(bank.tasks)}")
    model = model or bank.base_model.id
    base, processor = load_base(model, settings.dtype, device, kind_of(bank.config))
    bank.check_base_model(BaseModelId.of(base, model))
    method = make_method(bank.config["method"], base, bank.config["settings"])
    restore(method, bank)
    return bank, method, processor
