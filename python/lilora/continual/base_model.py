"""The base model of a run or a bank, with its processor, and the tasks of a bank put into it."""

from pathlib import Path
from typing import Any

import torch

from lilora.bank.bank import Bank
from lilora.bank.hub import open_bank
from lilora.bank.index import BaseModelId
from lilora.errors import UserError
from lilora.methods import Method, make_method
from lilora.peft.loss import tell_of_loss

from .images import ImageAspect, set_image_aspect
from .kinds import Kind, kind_of
from .run_record import image_aspect_of, train_settings
from .vision import take_heads

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_base(
    model: str, dtype: str, device: str, kind: Kind, image_aspect: ImageAspect = "processor"
) -> tuple[torch.nn.Module, Any]:
    """Base model and processor from a folder or a hub id; UserError in one sentence when that fails.

    image_aspect: what the processor is given of images, as `set_image_aspect` has it.
    """
    place = pick_device(device)
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise UserError(f"--model {model}: there is no such folder; give the path of a model folder, or a hub id")
    try:
        base, processor = kind.load(model, DTYPES[dtype])
        set_image_aspect(processor, image_aspect)
    except torch.OutOfMemoryError:
        raise
    except UserError as error:
        named = str(error).startswith(f"--model {model}")
        raise UserError(str(error) if named else f"--model {model}: {error}") from error
    except Exception as error:  # of several libraries; a damaged file can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"--model {model}: cannot be loaded ({reason}); give a model folder or a hub id") from error
    tell_of_loss(base)
    return base.to(place).requires_grad_(False), processor


def restore(method: Method, bank: Bank) -> None:
    """Put the tasks of a bank into a new method; UserError if its tensors are not those that its settings make."""
    tasks = bank.load_tasks()
    try:
        if kind_of(bank.config).heads:
            take_heads(method.base, bank, tasks)
        method.restore(tasks)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{bank.path} holds other tensors than its settings make ({type(error).__name__}: {error}); restore it from a copy"
        ) from error


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device} is unknown; use auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is not supported; use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this torch sees no CUDA device; use --device cpu or a CUDA build of torch")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA device(s), from cuda:0 on"
        )
    return chosen


def open_trained(path: str | Path) -> Bank:
    """The bank of a folder, a run or a repository of the hub; UserError unless it records a run and has a trained task."""
    bank = open_bank(path)
    train_settings(bank)
    if not bank.tasks:
        raise UserError(f"{path} holds no trained task yet; train first")
    return bank


def load_bank(
    path: str | Path,
    model: str | None = None,
    device: str = "auto",
    *,
    answers: bool = False,
) -> tuple[Bank, Method, Any]:
    """(the bank, its method with all tasks in place, the processor); `method.model` is the model to call.

    path: a bank's folder, a run's, or a repository of the hub. model: the base model, by default the one that the bank was
    made with. UserError if the bank gives no answers and `answers` is set, or fits no such base model.
    """
    bank = open_trained(path)
    if answers and not kind_of(bank.config).answers:
        raise UserError(f"{path} classifies images and writes no text; use lilora eval")
    model = model or bank.base_model.id
    base, processor = load_base(
        model, train_settings(bank).dtype, device, kind_of(bank.config), image_aspect_of(bank.config)
    )
    bank.check_base_model(BaseModelId.of(base, model))
    method = make_method(bank.config["method"], base, bank.config["settings"])
    restore(method, bank)
    return bank, method, processor
