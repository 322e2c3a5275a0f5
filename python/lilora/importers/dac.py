"""Checkpoints of DAC's released code (one `<Dataset>.pt` per task) as the tensors of a bank."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lilora.errors import UserError
from lilora.families import target_modules

from .checkpoint import Checkpoint, Imported, Tensors, read_pickle, setting

# A block is three layers of the file, attention, c_fc and c_proj: their linears -> those of transformers' CLIP.
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "proj": "out_proj"}
_BLOCK = (
    {theirs: f"self_attn.{ours}" for theirs, ours in _ATTENTION.items()},
    {"linear": "mlp.fc1"},
    {"linear": "mlp.fc2"},
)


def read_dac(files: Sequence[Path], model: nn.Module, tasks: Sequence[str] | None = None) -> Imported:
    """The experts in each file, one file for each task in the order they were trained, for the CLIP they were trained on.

    model: a CLIPModel of transformers; its names and shapes count, so one on the meta device will do. tasks: their names;
    None for those of the files: Aircraft.pt is task Aircraft.

    A file has w_lora_A [r, K], w_lora_B [N, r] and num [r], how often each expert was chosen, for every linear in the
    blocks of both encoders, text first, and r and alpha as metadata. The bank holds A and B0 in the file's dtype, the
    counts in fp32 and, as the released code merges experts unweighted, a weight of 1 for each.

    Raises:
        UserError: a file is unreadable or does not have exactly the tensors that the model has places for, the files
            differ in r or alpha, or there is not a name for each; or the model is no CLIP.
    """
    if getattr(model.config, "model_type", None) != "clip":
        raise UserError(f"dac was released for CLIP and {type(model).__name__} is none; give a CLIP model")
    names = [path.stem for path in files] if tasks is None else list(tasks)
    if not files or len(names) != len(files) or len(set(names)) != len(names):
        raise UserError(f"{len(files)} files hold one task each and the names are {', '.join(names)}; name each once")
    contents = [read_pickle(path) for path in files]
    sizes = [_sizes(path, values) for path, values in zip(files, contents, strict=True)]
    for path, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise UserError(f"{path} has {size} and {files[0]} {sizes[0]}; give the files of one run")
    linears, notes = linears_of(model), ()
    found: dict[str, tuple[Tensors, Tensors]] = {}
    for name, path, values in zip(names, files, contents, strict=True):
        file = Checkpoint(path, values["weights"], lambda raw: bank_name(raw, linears))
        found[name] = {}, _take_task(file, model, linears.values(), sizes[0]["r"])
        notes += file.notes()
    return Imported(found, {"target_modules": target_modules(model.config), **sizes[0]}, notes)


def linears_of(model: nn.Module) -> dict[str, str]:
    """Of every linear in the encoders' blocks the file's name, such as layer_0.q_proj, and the model's."""
    blocks = [
        f"{encoder}.encoder.layers.{block}"
        for encoder in ("text_model", "vision_model")
        for block in range(len(model.get_submodule(f"{encoder}.encoder.layers")))
    ]
    layers = [(block, linears) for block in blocks for linears in _BLOCK]
    return {
        f"layer_{i}.{theirs}": f"{block}.{ours}"
        for i, (block, linears) in enumerate(layers)
        for theirs, ours in linears.items()
    }


def bank_name(raw: str, linears: dict[str, str]) -> str | None:
    """What a bank calls a tensor of the file, None for one that is unknown."""
    linear, _, kind = raw.rpartition(".")
    if linear not in linears:
        return None
    path = linears[linear]
    return {"w_lora_A": f"{path}.experts.A", "w_lora_B": f"{path}.experts.B0", "num": f"state.{path}.counts"}.get(kind)


def _sizes(path: Path, values: Any) -> dict[str, float]:
    if not isinstance(values, dict) or "weights" not in values:
        raise UserError(f"{path} has no weights; give a .pt file as the released code saves it after a task")
    metadata = values.get("metadata")
    return {"r": setting(path, metadata, "r", whole=True), "alpha": setting(path, metadata, "alpha")}


def _take_task(file: Checkpoint, model: nn.Module, linears: Iterable[str], r: int) -> Tensors:
    stored = {}
    for path in linears:
        linear, a, b = model.get_submodule(path), f"{path}.experts.A", f"{path}.experts.B0"
        stored[a] = file.take(a, r, linear.in_features)
        stored[b] = file.take(b, linear.out_features, r)
        stored[f"state.{path}.counts"] = file.take(f"state.{path}.counts", r).float()
        stored[f"state.{path}.weights"] = torch.ones(r)
    return stored
