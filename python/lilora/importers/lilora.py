"""`lilora_task_bank.bin`, the checkpoint of LiLoRA's released code, as the tensors of a bank."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from lilora.errors import UserError
from lilora.families import target_modules
from lilora_kernels.layers.lilora import RANK, default_alpha

from .checkpoint import Checkpoint, Imported, Tensors, common_name, flat, read_json, read_pickle, setting, task_names

FORMAT = "lilora-task-bank-v2"
_PARTS = ("lora_share_A", "lora_share_B", "lora_specific_A", "lora_specific_B")
_SHARED = {"A": "A", "B": "B0"}
_OWN = {("A", "weight"): "V", ("B", "weight"): "U", ("B", "fusion"): "fusion"}
_ALPHA = default_alpha(RANK)  # the published one


def read_lilora(files: Sequence[Path], model: nn.Module, tasks: Sequence[str] | None = None) -> Imported:
    """The tasks in `lilora_task_bank.bin`, for the LLaVA of transformers that they were trained on.

    files: that one file; alpha is that of adapter_config.json beside it, else the published 256.
    model: its names and shapes count, so one on the meta device will do. tasks: their names, in the order they were
    learned; None for task and the number that the file gives each.

    The file is a dict with the format's name, A [r, K] and B0 [N, r] of every adapted linear, V [q, r], U [N, q] and the
    fusion scalar [1] of every task and linear, and the order of the tasks. Names are those of the original LLaVA
    (model.layers.*, mm_projector.*) or of transformers. The newest A and B0 serve all tasks, as in the released code.

    Raises:
        UserError: the file is unreadable, of another format, or does not have exactly the tensors that the model has
            places for; or there is not a name for each task.
    """
    if len(files) != 1:
        raise UserError(f"lilora keeps all tasks in one file and {len(files)} are given; give the newest one alone")
    path, values = files[0], read_pickle(files[0])
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise UserError(
            f"{path} has format {found!r} and this reads {FORMAT!r}; give a {path.name} of the released code"
        )
    check_base(path.with_name("non_lora_trainables.bin"))
    every = {common_name(name): name for name, linear in model.named_modules() if isinstance(linear, nn.Linear)}
    file = Checkpoint(path, {part: values.get(part, {}) for part in _PARTS}, lambda raw: bank_name(raw, every))
    held = [name for name in every.values() if f"{name}.A" in file]
    adapted = {kind: any(kind in name for name in held) for kind in ("projector", "self_attn")}
    pattern = target_modules(model.config, projector=adapted["projector"], attention=adapted["self_attn"])
    linears = {name: model.get_submodule(name) for name in every.values() if re.fullmatch(pattern, name)}
    first = next((name for name in linears if name in held), None)
    if first is None:
        raise UserError(f"{path} has no lora_share_A of a linear of this model; give the base model of its training")
    keys = task_keys(path, values)
    r, q = (file.shape(n)[:1].numel() if n in file else None for n in (f"{first}.A", f"{keys[0]}/{first}.V"))

    shared: Tensors = {}
    own: dict[str, Tensors] = {key: {} for key in keys}
    for name, linear in linears.items():
        shared[f"{name}.A"] = file.take(f"{name}.A", r, linear.in_features)
        shared[f"{name}.B0"] = file.take(f"{name}.B0", linear.out_features, r)
        for key, stored in own.items():
            stored[f"{name}.V"] = file.take(f"{key}/{name}.V", q, r)
            stored[f"{name}.U"] = file.take(f"{key}/{name}.U", linear.out_features, q)
            stored[f"{name}.fusion"] = file.take(f"{key}/{name}.fusion", 1)
    file.finish()

    config = path.with_name("adapter_config.json")
    told = read_json(config) if config.exists() else {}
    alpha = setting(config, told, "lora_alpha", default=_ALPHA)
    settings = {"target_modules": pattern, "r": r, "sub_rank": q, "alpha": alpha}
    notes = file.notes() + (
        () if "lora_alpha" in told else (f"{config} does not tell lora_alpha: alpha is {_ALPHA:g}",)
    )
    names = task_names(path, tasks, [f"task{key}" for key in keys])
    return Imported({name: (own[key], shared) for name, key in zip(names, keys, strict=True)}, settings, notes)


def bank_name(raw: str, names: dict[str, str]) -> str | None:
    """What a bank calls a tensor of the file, after the key of its task and a slash; None for one that is unknown.

    raw: `<part>.<name>`, with the task's key between for the tasks' own. names: common name -> the model's.
    """
    if match := re.fullmatch(r"lora_share_([AB])\.base_model\.(.+)\.lora_share_\1\.default\.weight", raw):
        name = names.get(common_name(match[2]))
        return f"{name}.{_SHARED[match[1]]}" if name else None
    # The name repeats the key in full: task 1 is not task 10.
    own = r"lora_specific_([AB])\.([^.]+)\.base_model\.(.+)\.lora_specific_\1\.default\.\2\.(weight|fusion)"
    if match := re.fullmatch(own, raw):
        name, kind = names.get(common_name(match[3])), _OWN.get((match[1], match[4]))
        return f"{match[2]}/{name}.{kind}" if name and kind else None
    return None


def task_keys(path: Path, values: dict) -> list[str]:
    """The tasks' keys in the order in which they were trained."""
    order, held = values.get("task_order"), values.get("lora_specific_A")
    keys = [str(key) for key in order] if isinstance(order, list | tuple) else []
    stored = {str(key) for key in held} if isinstance(held, dict) else set()
    if not keys or len(set(keys)) != len(keys) or set(keys) != stored:
        raise UserError(f"{path}: task_order is {order!r} and its tasks are {sorted(stored)}; it must name each once")
    return keys


def check_base(path: Path) -> None:
    """UserError if the run has trained weights of the base model, too: they lie beside the file, in one of their own."""
    if path.exists() and (names := list(flat(read_pickle(path)))):
        raise UserError(
            f"{path} holds trained weights of the base model ({names[0]}); put them into the model, save it, and give "
            "that with a copy of the checkpoint alone"
        )
