"""LiLoRA tasks in PEFT's own folder format, one adapter folder each, from and to a bank."""

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lilora.bank.bank import read_tensors
from lilora.bank.export import CONFIG, PREFIX, WEIGHTS, write_tensors
from lilora.errors import UserError
from lilora.peft.config import OF_METHOD, PRESETS, LiLoRAConfig
from lilora.peft.tuner import chosen_experts, fingerprint
from lilora_kernels.layers.experts import ExpertWeight

from .checkpoint import Checkpoint, Imported, Tensors, read_json

_KINDS = {"A": "A", "B": "B0", "U": "U", "V": "V", "fusion": "fusion"}  # lilora_* in PEFT's files -> in a bank


def write_peft(
    folder: Path, own: Tensors, shared: Tensors, settings: dict[str, Any], base_model: str | None, first: bool
) -> None:
    """A task of a bank into an existing folder, as `save_pretrained` of a PEFT model would write its adapter.

    first: whether A and B0 were made with it.
    """
    config = LiLoRAConfig(**settings, base_model_name_or_path=base_model, inference_mode=True)
    config.shared_fingerprint, config.first_of_chain = fingerprint(shared), first
    config.save_pretrained(str(folder))
    theirs = {ours: kind for kind, ours in _KINDS.items()}
    tensors = {}
    for name, tensor in (own | shared).items():
        path, _, kind = name.rpartition(".")
        tensors[f"{PREFIX}{path}.lilora_{theirs[kind]}"] = tensor
    write_tensors(folder, tensors)


def read_peft(folders: Sequence[Path], model: nn.Module, tasks: Sequence[str] | None = None) -> Imported:
    """Tasks that a PEFT model with LiLoRA adapters has saved, one folder each, in the order they were trained.

    model: the base model; its names and shapes count, so one on the meta device will do. tasks: their names; None for
    those of the folders. Tensors are taken as they are.

    Raises:
        UserError: a folder is unreadable, of another PEFT method or has other tensors than its config and the model ask
            for; the folders differ in a setting, or in A and B0 where their configs do not allow it; there is not a name
            for each.
    """
    names = [folder.absolute().name for folder in folders] if tasks is None else list(tasks)
    if not folders or len(names) != len(folders) or len(set(names)) != len(names):
        raise UserError(
            f"{len(folders)} folders hold one task each and the names are {', '.join(names)}; name each once"
        )
    configs = [read_config(folder / CONFIG) for folder in folders]
    settings = settings_of(configs[0])
    found: dict[str, tuple[Tensors, Tensors]] = {}
    notes: tuple[str, ...] = ()
    for name, folder, config in zip(names, folders, configs, strict=True):
        if settings_of(config) != settings:
            raise UserError(f"{folder} and {folders[0]} differ in their settings; give the folders of one model")
        file = Checkpoint(folder / WEIGHTS, read_tensors(folder / WEIGHTS, "restore it from a copy"), bank_name)
        own, shared = take_task(file, model, config)
        before = found[names[0]][1] if found else shared
        if all(torch.equal(tensor, before[key]) for key, tensor in shared.items()):
            shared = before
        elif config.on_shared_mismatch == "error":
            raise UserError(
                f"{folder} and {folders[0]} have other shared factors; give folders saved together, or set "
                f"on_shared_mismatch to 'replace' in {folder / CONFIG}: the last folder's then serve all tasks"
            )
        found[name] = own, shared
        notes += file.notes()
    return Imported(found, settings, notes)


def read_config(path: Path) -> LiLoRAConfig:
    values = read_json(path)
    if not isinstance(values, dict) or values.get("peft_type") != "LILORA":
        kind = values.get("peft_type") if isinstance(values, dict) else None
        raise UserError(f"{path} is of PEFT type {kind!r}; give the folder of a LILORA adapter")
    try:
        config = PeftConfig.from_pretrained(str(path.parent))
    except (TypeError, ValueError) as error:  # a UserError of LiLoRAConfig's own, too
        raise UserError(f"{path}: {error}; restore it from a copy") from error
    if config.bias != "none" or config.modules_to_save:
        raise UserError(f"{path} has trained biases or modules_to_save, which a bank does not hold; train without them")
    if not config.target_modules:
        raise UserError(f"{path}: target_modules is {config.target_modules!r}; it must name the layers that it adapts")
    return config


def settings_of(config: LiLoRAConfig) -> dict[str, Any]:
    """What a bank keeps of it, JSON-able: the policies, and what else is not the default."""
    values = {f.name: (getattr(config, f.name), f.default) for f in fields(LiLoRAConfig) if f.name in OF_METHOD}
    chosen = {name: v for name, (v, default) in values.items() if name in PRESETS["frozen"] or v != default}
    return {name: sorted(v) if isinstance(v, set) else v for name, v in chosen.items()}


def take_task(file: Checkpoint, model: nn.Module, config: LiLoRAConfig) -> tuple[Tensors, Tensors]:
    """(own, shared) of every linear that the config adapts; UserError unless the file has exactly their tensors."""
    own, shared = {}, {}

    def take(path: str, n: int, k: int, config: LiLoRAConfig, *experts: int) -> None:
        r, q = config.r, config.sub_rank
        for of, shapes in ((shared, {"A": (r, k), "B0": (n, r)}), (own, {"U": (n, q), "V": (q, r)})):
            for kind, shape in shapes.items():
                of[f"{path}.{kind}"] = file.take(f"{path}.{kind}", *experts, *shape)
        if config.fusion:
            own[f"{path}.fusion"] = file.take(f"{path}.fusion", *(experts or (1,)))

    for path, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and check_target_module_exists(config, path):
            take(path, linear.out_features, linear.in_features, config)
    for path in chosen_experts(model, config) if config.experts else ():
        module, _, name = path.rpartition(".")
        weight = ExpertWeight(model.get_submodule(module), name)
        take(path, weight.out_features, weight.in_features, config.of_experts(), weight.experts)
    file.finish()
    if not shared:
        raise UserError(f"{file.path}: target_modules match no linear of this model; give the model of its training")
    return own, shared


def bank_name(raw: str) -> str | None:
    match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lilora_(A|B|U|V|fusion)", raw)
    return f"{match[1]}.{_KINDS[match[2]]}" if match else None
