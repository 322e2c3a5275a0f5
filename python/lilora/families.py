"""Which linear layers of a model get adapters: found by its structure, from a table where structure does not tell."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
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

from lilora.errors import UserError, shortened
from lilora_kernels.layers.base import AdaptedLinear, is_conv1d, reads_weight
from lilora_kernels.layers.experts import ExpertLinear, LiLoRAExperts, expert_parameters
from lilora_kernels.routing.context import AHEAD, TEXT
from lilora_kernels.routing.placement import decoder_of, places
from lilora_kernels.routing.vision_tokens import VisionTokens, tell_vision_tokens

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
_NOT_BETWEEN = re.compile(
    r"patch_?embed|\bembeddings\.|\bhead\."
)  # of a tower: what lies ahead of its blocks, or pools
_TOWER = re.compile(r"vision|visual|image|audio|speech|patch", re.IGNORECASE)


@dataclass(frozen=True)
class Family:
    """Patterns on the names of linear layers; None where structure tells. projector: "" for one without linear layers."""

    mlp: str | None = None
    attention: str | None = None
    projector: str | None = None


_FAMILIES = {  # by config.model_type
    "clip": Family(mlp=r"(text|vision)_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"),
    "gemma3": Family(projector=""),
    "t5gemma2": Family(projector=""),
}


def register_family(
    model_type: str,
    *,
    mlp: str | None = None,
    attention: str | None = None,
    projector: str | None = None,
    vision_tokens: Callable[[Tensor, Mapping], VisionTokens | Sequence[int]] | None = None,
) -> None:
    """Say of a family what its structure does not tell, or tells wrongly: where its linear layers are, and whose images are.

    Call it before adapters are put into a model. `lilora train`, `lilora params`, `LiLoRAConfig` without target_modules, and
    mixed batches follow it; `examples/outside_model.py` shows it with a model class that transformers does not have.

    Args:
        model_type: that of its config. A family that is known already is replaced.
        mlp: regular expression that matches the names of the MLPs' linear layers in full, behind any prefix.
        attention: the same for attention; projector: for what lies between a tower and the language model.
        vision_tokens: (input_ids [B, L], inputs) -> the numbers of image tokens of the B samples, where all images or tiles
            have the same number of tokens; else a `lilora_kernels.routing.vision_tokens.VisionTokens`. `inputs` are the other
            arguments of the model's forward by name. Images lie in the order of the samples. All layers beside the decoder
            then count as ahead of it, and mixed batches may reach them: rows that these numbers do not explain raise.

    Raises:
        UserError: a pattern is no regular expression.
    """
    for name, pattern in (("mlp", mlp), ("attention", attention), ("projector", projector)):
        if reason := pattern_error(pattern or ""):
            raise UserError(
                f"register_family({model_type!r}): {name} is {shortened(pattern)}, which is no regular expression ({reason})"
            )
    _FAMILIES[model_type] = Family(mlp, attention, projector)
    tell_vision_tokens(model_type, vision_tokens)


def target_modules(
    model: nn.Module | PreTrainedConfig | str, *, projector: bool | None = False, attention: bool = False
) -> str:
    """Regular expression that fully matches the names of the linear layers to adapt, in PEFT's `target_modules` form.

    Args:
        model: a model; or its config or `model_type`, from which one without memory is built.
        projector: also the linear layers between tower and language model; None: where there are some.
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
    searched = family.mlp is None or (family.projector is None and projector is not False)
    if searched and isinstance(model, PreTrainedConfig):
        model = without_memory(model)
    parts = [family.mlp or pattern_of(_found(model, model_type, attention and family.attention is None))]
    if attention and family.attention is not None:
        parts.append(family.attention)
    if projector is not False:
        parts.append(_projector(model, model_type, family.projector, needed=projector is not None))
    return rf"(.*\.)?({'|'.join(filter(None, parts))})"


def _found(model: nn.Module, model_type: str, attention: bool) -> list[str]:
    found = linear_layers(model, attention=attention)
    if not found:
        raise UserError(
            f"model type {model_type!r} has no linear layers in the blocks of its language model; pass target_modules, a regular "
            "expression on its module names"
        )
    return found


def _projector(model: nn.Module, model_type: str, given: str | None, needed: bool) -> str:
    pattern = pattern_of(projector_layers(model)) if given is None else given
    if needed and not pattern:
        why = (
            "its weight is a raw Parameter and no linear layer"
            if given == ""
            else "nothing tells where it is; lilora.register_family(..., projector=...) does"
        )
        raise UserError(
            f"the projector of model type {model_type!r} cannot be adapted, for {why}; leave it out (projector=False, on the "
            "command line --no-projector)"
        )
    return pattern


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


def pattern_error(pattern: str) -> str | None:
    """Why it is no regular expression, None if it is one."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


def require_matched(model: nn.Module, targets: str | Sequence[str] | None) -> None:
    """UserError unless target_modules match a module: a regular expression its whole name, a list of names its end."""
    if targets is None or targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        matched = any(re.fullmatch(targets, name) for name in names)
    else:
        matched = any(name == target or name.endswith(f".{target}") for name in names for target in targets)
    if not matched:
        ends = isinstance(targets, str) and any(name.endswith(f".{targets}") for name in names)
        advice = f"did you mean '.*{targets}'?" if ends else "give another pattern"
        raise UserError(
            f"target_modules {shortened(targets)} matches no layer of this model by its whole name; {advice}"
        )


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
    names = [name for name in names if not reads_weight(type(modules[name.rpartition(".")[0]]), name.split(".")[-1])]  # type: ignore[arg-type]
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    member = {}  # of a block, by the layer's name
    for name in names:
        path = next(filter(None, (_block_member(part, name) for part in lists)), "")
        if path and not _ROUTER.search(path):
            member[name] = path
    mixes = {name: bool(_ATTENTION.search(path)) for name, path in member.items()}
    return list(mixes) if attention or all(mixes.values()) else [name for name, mixing in mixes.items() if not mixing]


def routed_experts(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Modules of routed experts in a model's text part by name, adapted or not, with the names of their linears.

    They are those that transformers runs through its experts interface, with one Parameter for each linear of all experts.
    """
    modules = dict(model.named_modules())
    found = {}
    for name, module in modules.items():
        names = module.names if isinstance(module, LiLoRAExperts) else expert_parameters(module)
        if names and not name.endswith(".base_layer"):
            found[name] = names
    return {name: found[name] for name in _of_text(model, modules, list(found))}


def projector_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers between the towers of a model and its language model.

    These lie ahead of its decoder, in no block with attention, and neither in a tower's embeddings nor in its pooling head.
    """
    modules = dict(model.named_modules())
    names = [name.removesuffix(".base_layer") for name, module in modules.items() if _is_linear(module)]
    ahead = [name for name, place in places(model, names).items() if place == AHEAD and "lora_" not in name]
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    blocks = {
        part
        for part in lists
        for name in ahead
        if _block_member(part, name) and _ATTENTION.search(_block_member(part, name))
    }
    return [
        name
        for name in ahead
        if not _NOT_BETWEEN.search(name) and not any(_block_member(part, name) for part in blocks)
    ]


def vision_tower(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None, nn.ModuleList | None]:
    """(what has `get_image_features`, the first of its parts that is a vision tower, that tower's blocks); None without one.

    The blocks are a list of at least two with attention, ahead of the model's decoder; None of a tower in stages of blocks.
    """
    modules = dict(model.named_modules())
    owner = next((name for name in reversed(modules) if hasattr(type(modules[name]), "get_image_features")), None)
    try:
        seeing = inspect.getsource(inspect.unwrap(type(modules[owner]).get_image_features)) if owner is not None else ""
    except OSError:  # made without a file: nothing tells
        seeing = ""
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    ahead = [name for name, place in places(model, lists).items() if place == AHEAD]
    for name in ahead:
        tower = name.removeprefix(f"{owner}." if owner else "").partition(".")[0]
        staged = any(name in (one, other) for one in ahead for other in ahead if other.rpartition(".")[0] == one)
        if not (staged or len(modules[name]) > 1) or not re.search(rf"\bself\.{tower}\b", seeing):
            continue
        if any(_is_linear(inner) and _ATTENTION.search(_block_member(name, path)) for path, inner in modules.items()):
            return modules[owner], modules[owner].get_submodule(tower), None if staged else modules[name]
    return None, None, None


def _block_member(blocks: str, name: str) -> str:
    """Path of a layer in its block, of this ModuleList of blocks; empty for a layer elsewhere."""
    index, _, path = name.removeprefix(f"{blocks}.").partition(".")
    return path if name.startswith(f"{blocks}.") and index.isdigit() else ""


def _is_linear(module: nn.Module) -> bool:
    adapted = isinstance(module, AdaptedLinear) and not isinstance(module, ExpertLinear)
    return type(module) is nn.Linear or is_conv1d(module) or adapted


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


def same_layers(config: PreTrainedConfig, one: str, other: str) -> bool:
    """Whether two patterns match the same modules of a config's model."""
    names = [name for name, _ in without_memory(config).named_modules()]
    return all(bool(re.fullmatch(one, name)) == bool(re.fullmatch(other, name)) for name in names)


def pattern_of(names: Iterable[str]) -> str:
    """Regular expression for these names, whatever the numbers of blocks."""
    leaves: dict[str, dict[str, None]] = {}
    for name in names:
        *path, leaf = name.split(".")
        where = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in path)
        leaves.setdefault(where, {})[re.escape(leaf)] = None
    ends = {where: f"({'|'.join(last)})" if len(last) > 1 else next(iter(last)) for where, last in leaves.items()}
    return "|".join(rf"{where}\.{end}" if where else end for where, end in ends.items())
