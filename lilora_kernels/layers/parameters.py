"""The parameters of an adapted layer, by task."""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..offloading import offloading


def check_task_name(name: str) -> None:
    """Raise ValueError for a name that cannot be a task: it becomes a key of parameters and a file name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(
            f"task name {name!r} is not allowed; use letters, digits, '-' and '_', starting with a letter or digit"
        )
    if (
        hasattr(nn.ParameterDict, name)
        or name in ("training", "weight", "bias", "base_layer", "modules_to_save", "original_module")
        or name.startswith(("lilora_", "lora_"))
    ):
        raise ValueError(
            f"task name {name!r} is reserved by torch or PEFT; choose another, for example {'task-' + name!r}"
        )


class TaskParameters(nn.ParameterDict):
    """Parameters by task, which tell their layer when code puts others in their places, as loaders and sharding do.

    What it has itself is private: a task may have any other name.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not as a submodule

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):
            self._changed(name)
        elif name == "_hf_hook":
            # It knows tied parameters by their addresses, which tensors that are read from a file share in turn.
            for hook in offloading(self):
                hook.tied_params_map, hook.tied_params_names = None, set()
                if not all(key in hook.weights_map for key in self._parameters):
                    self.__dict__["_layer"].keep(self, hook.execution_device)
            self._tie()

    def _tie(self) -> None:
        """Let what was put past `__setattr__` be seen: by accelerate's hooks, which offload under a parameter's first name."""

    def _changed(self, name: str) -> None:
        self.__dict__["_layer"].replaced(name)


class SharedParameter(TaskParameters):
    """One Parameter under every task's name: written under one name, it is the new one under all."""

    _parameters: dict[str, nn.Parameter]

    # transformers asks every module of a model which names may be ties, to save each under one of them. A pattern that is true of
    # all such names: of the thousands of layers and tasks it then tries but one for each.
    _tied_weights_keys = {r"|\.lilora_[AB]\.": ""}  # noqa: RUF012

    def _tie(self) -> None:
        self._parameters.update(dict.fromkeys(self._parameters, next(iter(self._parameters.values()))))

    def _changed(self, name: str) -> None:
        entries = self._parameters
        new = entries[name]
        if new.is_meta:  # a task added on the meta device, to be loaded, does not have the values yet
            new = next((p for p in entries.values() if not p.is_meta), new)
        for key in entries:
            entries[key] = new
        super()._changed(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SharedParameter":
        names = list(self._parameters)
        if not names:
            return super()._apply(fn, recurse)
        self._parameters = {name: self._parameters[name] for name in names[:1]}
        super()._apply(fn, recurse)
        self._parameters = dict.fromkeys(names, self._parameters[names[0]])
        return self


def stacked(entries: nn.ParameterDict, names: tuple[str, ...]) -> Tensor:
    """The parameters of these tasks, [tasks, ...]; without a copy for one."""
    own = entries._parameters
    if missing := [name for name in names if name not in own]:
        raise ValueError(f"a layer does not have the tasks {missing} of this batch; add every task to every layer")
    return own[names[0]].unsqueeze(0) if len(names) == 1 else torch.stack([own[name] for name in names])


def window(place: Tensor) -> Tensor:
    """The memory of a contiguous tensor under a storage of its own: files and copies then hold it alone, not all around it."""
    start = place.storage_offset() * place.element_size()
    storage = place.untyped_storage()[start : start + place.nbytes]
    return place.new_empty(0).set_(storage, 0, place.shape, place.stride())
