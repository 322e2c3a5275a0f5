"""Putting the tensors of a saved task into a model that lives: everything is checked before anything is written."""

from os import PathLike
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftConfig
from peft.utils import CONFIG_NAME, ModulesToSaveWrapper, load_peft_weights
from torch import Tensor, nn

from lilora.errors import UserError
from lilora.module_names import unwrapped

from .config import LiLoRAConfig
from .layer import Linear, adapted_layers

SHARED = ("lilora_A", "lilora_B")
OTHER_CHAIN = "load tasks of one chain together, or set on_shared_mismatch='replace' in the task's config"


def hotswap(model: nn.Module, source: str | PathLike | dict[str, Tensor], task: str) -> None:
    """Overwrite a task of a live model with a saved one, its modules_to_save too, in place; it keeps its name and its id.

    No tensor moves, in the stacked bank of mixed batches neither, so compiled and captured graphs stay valid and see the
    new values. model: adapted through PEFT or transformers, compiled or parallel or not. source: the folder of one task as
    `save_pretrained` writes it, or the tensors of `get_peft_model_state_dict`. UserError, and the model as it was, unless
    the source has the model's settings, names, shapes, dtypes and shared factors.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    layers = adapted_layers(model)
    for path, layer in layers.items():
        if task not in layer.tasks:
            raise UserError(f"task {task!r} is unknown; this model knows {layer.tasks}")
        if layer.merged_task == task:
            raise UserError(f"task {task!r} is merged into the weight of {path}; unmerge it before the swap")
    if not layers:
        raise UserError("this model has no task that could be swapped; adapt it first")
    if not isinstance(source, dict):
        if not Path(source).is_dir():
            raise UserError(f"{source} is no folder; give that of one task, as save_pretrained writes it")
        if not (Path(source) / CONFIG_NAME).is_file():  # PEFT would ask the hub for it
            held = ", ".join(sorted(path.parent.name for path in Path(source).glob(f"*/{CONFIG_NAME}")))
            raise UserError(
                f"{source} has no {CONFIG_NAME}; give the folder of one task, as save_pretrained writes it"
                + (f": it holds {held}" if held else "")
            )
        config = PeftConfig.from_pretrained(source)
        if not isinstance(config, LiLoRAConfig):
            raise UserError(f"{source} holds an adapter of type {config.peft_type.value}, not a LiLoRA task")
        config.require_same_settings(model.peft_config[task])
        source = dict(load_peft_weights(source, device="cpu"))
    saved = {
        f"{unwrapped(path).removeprefix('base_model.model.')}.{key}": own
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and task in module.modules_to_save
        for key, own in module.modules_to_save[task].state_dict(keep_vars=True).items()
    }
    if away := [name for name, own in saved.items() if own.is_meta]:
        raise UserError(f"{away[0]} is offloaded, and cannot be overwritten; load the model in full first")
    pairs = matched(layers, task, source, saved)
    for name, (own, new) in pairs.items():
        if new.dtype != own.dtype:
            raise UserError(f"{name} is {new.dtype}, but the model's is {own.dtype}; cast the tensors to it first")
        if name.endswith(SHARED) and not torch.equal(new.to(own.device), own):
            raise UserError(
                f"{name} differs from the model's, so the task belongs to other shared factors; swap within one chain"
            )
    for path, layer in layers.items():
        kinds = [kind for kind in layer.adapter_layer_names if task in getattr(layer, kind)]
        layer.overwrite_task(task, *(pairs[f"{path}.{kind}"][1] for kind in kinds))
    with torch.no_grad():
        for name, own in saved.items():
            own.copy_(pairs[name][1])


def check_loadable(
    model: nn.Module, config: LiLoRAConfig, task: str, state: dict[str, Tensor], new: bool, resumes: bool
) -> None:
    """Raise UserError unless `state` fits the task; A and B0 that other tasks rely on may change only with a task that trains
    them, or where all tasks are loaded, one after the other, as a Trainer `resumes`."""
    layers = adapted_layers(model)
    pairs = matched(layers, task, {name: tensor for name, tensor in state.items() if ".lilora_" in name})
    for path, layer in layers.items():
        if layer.merged_task == task:
            raise UserError(f"task {task!r} is merged into the weight of {path}; unmerge it before loading over it")
        for kind in SHARED if layer.merged_task is not None else ():
            own, value = pairs[f"{path}.{kind}"]
            if not torch.equal(value.to(own.device, own.dtype), own):
                raise UserError(
                    f"{path}.{kind} of task {task!r} differs from the model's, and task {layer.merged_task!r} is merged; "
                    "unmerge it first"
                )
    if config.on_shared_mismatch == "replace" or all(len(layer.tasks) == 1 for layer in layers.values()):
        return
    trains = not new and (resumes or any(task in layer.active for layer in layers.values()))
    for name, (own, value) in pairs.items():
        held = name.endswith(SHARED) and not (trains and own.requires_grad)
        if held and not torch.equal(value.to(own.device, own.dtype), own):
            raise UserError(f"{name} differs from the model's, which its other tasks share; {OTHER_CHAIN}")


def matched(
    layers: dict[str, Linear], task: str, state: dict[str, Tensor], saved: dict[str, Tensor] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """(the model's Parameter, the new value) of each of a task's tensors, by name; UserError for other names or shapes.

    saved: the model's of modules_to_save, where `state` has them.
    """
    for layer in layers.values():
        layer.onload()
    own = {
        f"{path}.{kind}": getattr(layer, kind)[task]
        for path, layer in layers.items()
        for kind in (*layer.other_param_names, *layer.adapter_layer_names)
        if task in getattr(layer, kind)
    } | (saved or {})
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    for name in [*own, *state]:
        if name not in own or name not in state:
            where = "is missing in" if name in own else "is unknown to the model, but in"
            raise UserError(
                f"{name} {where} the tensors of task {task!r}; use a task of this base model and these targets"
            )
        if state[name].shape != own[name].shape:
            raise UserError(
                f"{name} of task {task!r} is {list(state[name].shape)}, but this model needs {list(own[name].shape)}; "
                "use a task of the same base model"
            )
    return {name: (own[name], state[name]) for name in own}
