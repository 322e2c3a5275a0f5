"""Which linear layers of a model get adapters: found by its structure, from a table where structure does not tell."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from lilora.errors import UserError
from lilora_kernels.layers.base import AdaptedLinear, is_conv1d, reads_weight
from lilora_kernels.routing.context import TEXT
from lilora_kernels.routing.placement import decoder_of, places

_CLASSES = (
    AutoModelForImageTextToText,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForImageClassification,
)
# Members of a block that mix tokens, and layers that choose among experts.
_ATTENTION = re.compile(
    r"attn|attention|mixer|mamba|lstm|temporal_block|\bconv\b|\bself_att\b|\b([qkvo]|out)_(proj|lin)\b", re.IGNORECASE
)
_ROUTER = re.compile(r"router|\b(gate|shared_expert_gate|weights_proj)\b")
_EXPERT = re.compile(r"(?<!shared_)experts?\.\d+\.")
_TOWER = re.compile(r"vision|visual|image|audio|speech|patch", re.IGNORECASE)


@dataclass(frozen=True)
class Family:
    """Patterns on the names of linear layers; None where structure tells. projector: "" for one without linear layers."""

    mlp: str | None = None
    attention: str | None = None
    projector: str | None = None


_LLAVA = Family(projector=r"multi_modal_projector\.linear_[12]")
_QWEN = Family(projector=r"visual\.merger\.mlp\.[02]")
_QWEN3 = Family(projector=r"visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]")
_GLM = Family(projector=r"visual\.merger\.(proj|(gate|up|down)_proj)")
_IDEFICS = Family(projector=r"connector\.modality_projection\.proj")
_FAMILIES = {  # by config.model_type
    "clip": Family(mlp=r"(text|vision)_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"),
    "gemma3": Family(projector=""),
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "idefics3": _IDEFICS,
    "internvl": _LLAVA,
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "mistral3": Family(projector=r"multi_modal_projector\.(patch_merger\.merging_layer|linear_[12])"),
    "paligemma": Family(projector=r"multi_modal_projector\.linear"),
    "qwen2_5_vl": _QWEN,
    "qwen2_vl": _QWEN,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "smolvlm": _IDEFICS,
}


def register_family(
    model_type: str, *, mlp: str | None = None, attention: str | None = None, projector: str | None = None
) -> None:
    """Say where the linear layers of a family are, for what its structure does not tell or tells wrongly.

    Args:
        model_type: that of its config. A family that is known already is replaced.
        mlp: regular expression that matches the names of the MLPs' linear layers in full, behind any prefix.
        attention: the same for attention; projector: for what lies between a tower and the language model.

    Raises:
        UserError: a pattern is no regular expression.
    """
    for name, pattern in (("mlp", mlp), ("attention", attention), ("projector", projector)):
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise UserError(
                f"register_family({model_type!r}): {name} is {pattern!r}, which is no regular expression ({error})"
            ) from error
    _FAMILIES[model_type] = Family(mlp, attention, projector)


def target_modules(
    model: nn.Module | PreTrainedConfig | str, *, projector: bool | None = False, attention: bool = False
) -> str:
    """Regular expression that fully matches the names of the linear layers to adapt, in PEFT's `target_modules` form.

    Args:
        model: a model; or its config or `model_type`, from which one without memory is built.
        projector: also the linear layers between tower and language model; None: where the family is known to have them.
        attention: also those of the language model's attention.

    The MLPs of the language model always match, of routed experts the linear layers beside them (`linear_layers`). What
    `register_family` was told of the model type comes first.

    Raises:
        UserError: a family that transformers does not build, one without such layers, and a projector that is not known or
            is no linear layer.
    """
    if isinstance(model, str):
        if model not in CONFIG_MAPPING:
            raise UserError(
                f"model type {model!r} is unknown to transformers; pass the model, or target_modules, a regular expression on "
                "its module names"
            )
        model = CONFIG_MAPPING[model]()
    config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    family = _FAMILIES.get(model_type, Family())
    projector = bool(family.projector) if projector is None else projector
    if projector and not family.projector:
        why = (
            "its weight is a raw Parameter and no linear layer"
            if family.projector == ""
            else "nothing tells where it is; lilora.register_family(..., projector=...) does"
        )
        raise UserError(
            f"the projector of model type {model_type!r} cannot be adapted, for {why}; leave it out (projector=False, on the "
            "command line --no-projector)"
        )
    parts = [family.mlp or pattern_of(_found(model, model_type, attention and family.attention is None))]
    parts += [family.attention] * (attention and family.attention is not None)
    parts += [family.projector] * projector
    return rf"(.*\.)?({'|'.join(parts)})"


def _found(model: nn.Module | PreTrainedConfig, model_type: str, attention: bool) -> list[str]:
    if isinstance(model, PreTrainedConfig):
        model = without_memory(model)
    found = linear_layers(model, attention=attention)
    if not found:
        raise UserError(
            f"model type {model_type!r} has no linear layers in the blocks of its language model; pass target_modules, a regular "
            "expression on its module names"
        )
    return found


def without_memory(config: PreTrainedConfig) -> nn.Module:
    """The model of a config on the meta device; UserError where transformers builds none."""
    cls = next((auto for auto in _CLASSES if type(config) in auto._model_mapping), AutoModel)
    try:
        with torch.device("meta"):
            return cls.from_config(config)
    except Exception as error:
        raise UserError(
            f"model type {config.model_type!r} cannot be built from its config ({type(error).__name__}: {error}); pass the "
            "model, or target_modules, a regular expression on its module names"
        ) from error


def linear_layers(model: nn.Module, *, attention: bool = False) -> list[str]:
    """Names of the linear layers in the blocks of a model's text part: of MLPs, and with `attention` of attention too.

    A model without a decoder is taken as a whole. Of routed experts these are the layers beside them, shared experts and
    dense layers; attention alone where there are no MLPs but experts. Routers, and layers whose weight the model's code
    reads past their forward, are left out.
    """
    modules = dict(model.named_modules())
    found = (name for name, module in modules.items() if _is_linear(module))
    names = [name.removesuffix(".base_layer") for name in found if "lora_" not in name]
    names = [name for name in _of_text(model, modules, names) if not _EXPERT.search(name)]
    names = [name for name in names if not reads_weight(type(modules[name.rpartition(".")[0]]), name.split(".")[-1])]
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    member = {}  # of a block, by the layer's name
    for name in names:
        blocks = next((part for part in lists if re.match(rf"{re.escape(part)}\.\d+\.", name)), None)
        if blocks is not None and not _ROUTER.search(path := re.sub(r"^\.\d+\.", "", name[len(blocks) :])):
            member[name] = path
    mixes = {name: bool(_ATTENTION.search(path)) for name, path in member.items()}
    return list(mixes) if attention or all(mixes.values()) else [name for name, mixing in mixes.items() if not mixing]


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module) or isinstance(module, AdaptedLinear)


def _of_text(model: nn.Module, modules: dict[str, nn.Module], names: list[str]) -> list[str]:
    placed = places(model, names)
    if any(hasattr(module, "get_image_features") for module in modules.values()) and TEXT in placed.values():
        return [name for name in names if placed[name] == TEXT]
    decoder, encoder = decoder_of(model), model.get_encoder() if hasattr(model, "get_encoder") else None
    inside = next((name for name, module in modules.items() if module is decoder), "")
    if not inside and getattr(model, "main_input_name", "input_ids") != "input_ids":
        return names  # a model of images alone
    if encoder in set(modules.values()) and getattr(encoder, "main_input_name", None) == "input_ids":
        inside = ""
    return [name for name in names if name.startswith(inside) and not _TOWER.search(name)]


def pattern_of(names: Iterable[str]) -> str:
    """Regular expression for these names, numbers apart."""
    leaves: dict[str, dict[str, None]] = {}
    for name in names:
        *path, leaf = (r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
        leaves.setdefault(r"\.".join(path), {})[leaf] = None
    ends = {where: f"({'|'.join(last)})" if len(last) > 1 else next(iter(last)) for where, last in leaves.items()}
    return "|".join(rf"{where}\.{end}" if where else end for where, end in ends.items())
