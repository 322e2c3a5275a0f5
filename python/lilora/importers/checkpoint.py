"""Checkpoints of other programs: nothing but plain tensors is read from them, and a bank is written whole or not at all."""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilora.bank.atomic import new_folder
from lilora.bank.bank import Bank
from lilora.bank.index import DTYPES, BaseModelId
from lilora.errors import UserError

_REMEDY = "give the file as the released code wrote it, and the base model that it was trained on"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Imported:
    """What checkpoints hold: each task's own and shared tensors, in training order, as `Bank.add_task` takes them; the
    settings of the method that they show; and what the user should know, one sentence each."""

    tasks: dict[str, tuple[Tensors, Tensors]]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_pickle(path: Path) -> Any:
    """Tensors, numbers, strings, lists and dicts that torch.save wrote, on the CPU.

    Raises:
        UserError: the file cannot be read, is damaged, or would have to run code to be read.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged pickle can raise anything
                raise UserError(f"{path} is truncated, or holds more than plain tensors; {_REMEDY}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a checkpoint file") from error


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, {"a": {"b": c}} as {"a.b": c}."""
    if not isinstance(values, dict):
        return {prefix: values}
    items: dict[str, Any] = {}
    for key, value in values.items():
        items |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return items


def setting(path: Path, values: Any, name: str, *, default: float | None = None, whole: bool = False) -> float:
    """The number above 0 of this name in what a file holds; UserError if it is anything else."""
    value = values.get(name, default) if isinstance(values, dict) else None
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value < float("inf"):
        raise UserError(f"{path}: {name} is {value!r}; it must be {'a whole' if whole else 'a'} number above 0")
    return value


def common_name(linear: str) -> str:
    """A linear's name without what differs between LLaVA's own tree and that of transformers: layers.0.mlp.up_proj."""
    name = re.sub(r"^((base_model|model|language_model)\.)+", "", linear)
    return {"mm_projector.0": "multi_modal_projector.linear_1", "mm_projector.2": "multi_modal_projector.linear_2"}.get(
        name, name
    )


def task_names(path: Path, given: Sequence[str] | None, own: list[str]) -> list[str]:
    """The tasks' names: those given, or by default `own`; UserError unless there is one for each."""
    if given is None:
        return own
    if len(given) != len(own) or len(set(given)) != len(own):
        raise UserError(f"{path} holds {len(own)} tasks and the names given are {', '.join(given)}; name each once")
    return list(given)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend the path or its permissions") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); restore it from a copy") from error


class Checkpoint:
    """The tensors of a file under the names of a bank, each to be taken once with the shape that the model wants.

    rename: name in the file -> name in a bank, None for a name that means nothing.

    Raises:
        UserError: the file is no dict of plain tensors, or has one that is unknown or a second for the same place.
    """

    def __init__(self, path: Path, values: Any, rename: Callable[[str], str | None]) -> None:
        self.path = path
        self.converted: set[torch.dtype] = set()
        self._found: dict[str, tuple[str, Tensor]] = {}  # name in a bank -> its name in the file, and itself
        for raw, tensor in flat(values).items():
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
                raise UserError(f"{path}: {raw or 'the content'} is no plain tensor; {_REMEDY}")
            name = rename(raw)
            if name is None or name in self._found:
                raise self._unknown(raw)
            self._found[name] = raw, tensor

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def shape(self, name: str) -> torch.Size:
        return self._found[name][1].shape

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor, of this shape (None: any number), as it is; in fp32 if a bank cannot hold its dtype.

        Raises:
            UserError: it is missing, has another shape or is not finite.
        """
        if name not in self._found:
            raise UserError(f"{self.path} has no tensor for {name}; {_REMEDY}")
        raw, tensor = self._found.pop(name)
        wanted = tuple(got if size is None else size for size, got in zip(shape, tensor.shape, strict=False))
        if tensor.dim() != len(shape) or tensor.shape != wanted or not tensor.numel():
            wanted = ", ".join("n" if size is None else str(size) for size in shape)
            raise UserError(f"{self.path}: tensor {raw} is {list(tensor.shape)}; {name} wants [{wanted}]; {_REMEDY}")
        if tensor.dtype not in DTYPES:
            self.converted.add(tensor.dtype)
            tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise UserError(f"{self.path}: tensor {raw} is not finite; {_REMEDY}")
        return tensor

    def finish(self) -> None:
        """UserError unless every tensor was taken."""
        for raw, _ in self._found.values():
            raise self._unknown(raw)

    def notes(self) -> tuple[str, ...]:
        names = ", ".join(sorted(str(dtype) for dtype in self.converted))
        return (f"{self.path}: {names} is stored as torch.float32",) if names else ()

    def _unknown(self, raw: str) -> UserError:
        return UserError(f"{self.path} holds the tensor {raw}, which has no place in this model; {_REMEDY}")


def write_bank(
    path: Path,
    config: dict[str, Any],
    base_model: BaseModelId,
    tasks: dict[str, tuple[Tensors, Tensors]],
    track: Callable[[Iterable], Iterable] = iter,
) -> Bank:
    """A new bank of these tasks in the new or empty folder `path`; whatever fails, there is no bank. `track` shows progress.

    Raises:
        UserError: the folder holds anything, a task's name is bad, or the system refused to write.
    """
    with new_folder(path) as folder:
        bank = Bank.create(folder, config=config, base_model=base_model)
        for name in track(list(tasks)):
            bank.add_task(name, *tasks[name])
    return Bank.open(path)
