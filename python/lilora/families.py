"""Where adapters go in each family of multimodal models: patterns on module names, anchored on the language model.

Bare suffixes such as `gate_proj` would also hit the vision towers of some families (Qwen2.5-VL).
"""

from dataclasses import dataclass
from typing import Any

from lilora.errors import UserError


@dataclass(frozen=True)
class _Family:
    """projector: the linears between vision tower and language model, as a pattern; None if there are none."""

    projector: str | None
    language_model: str = "language_model"
    mlp: str = "gate|up|down"


_LLAVA = _Family(r"multi_modal_projector\.linear_[12]")
_QWEN = _Family(r"visual\.merger\.mlp\.[02]")
_IDEFICS = _Family(r"connector\.modality_projection\.proj", language_model="text_model")
_FAMILIES = {  # by config.model_type
    "gemma3": _Family(None),
    "glm4v": _Family(r"visual\.merger\.(proj|(gate|up|down)_proj)", mlp="gate_up|down"),
    "idefics3": _IDEFICS,
    "internvl": _LLAVA,
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "mistral3": _Family(r"multi_modal_projector\.(patch_merger\.merging_layer|linear_[12])"),
    "paligemma": _Family(r"multi_modal_projector\.linear"),
    "qwen2_5_vl": _QWEN,
    "qwen2_vl": _QWEN,
    "qwen3_vl": _Family(r"visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"),
    "smolvlm": _IDEFICS,
}
_ROUTED_EXPERTS = ("glm4v_moe", "qwen3_vl_moe")
_BESIDE_EXPERTS = (
    r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(shared_experts\.)?(gate|up|down)_proj)"
)
_CLIP = r"(text|vision)_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"


def target_modules(config: Any, *, projector: bool = False, attention: bool = False) -> str:
    """Regular expression that fully matches the names of the linears to adapt, in PEFT's `target_modules` form.

    `config` is a transformers config or its `model_type`. The MLPs of the language model (gate, up and down) always
    match; `projector` adds the linears between vision tower and language model, `attention` the language model's
    q, k, v and o. Of CLIP all linears of both encoders' blocks match. UserError for a family that is not known here,
    for routed experts, and for a projector that is no linear layer.
    """
    model_type = config if isinstance(config, str) else config.model_type
    if model_type == "clip":
        return rf"(.*\.)?{_CLIP}"
    if model_type in _ROUTED_EXPERTS:
        raise UserError(
            f"model type {model_type!r} has no adapter preset, for its MLPs are routed experts, whose weights are 3-D "
            "Parameters and no linear layers; the language model's attention, dense layers and shared experts can be "
            f"adapted: pass LiLoRAConfig(target_modules={_BESIDE_EXPERTS!r}), on the command line --set target_modules=..."
        )
    if model_type not in _FAMILIES:
        raise UserError(
            f"model type {model_type!r} has no adapter preset; known are {', '.join(sorted((*_FAMILIES, 'clip')))}; "
            "for any other model pass target_modules, a regular expression on its module names"
        )
    family = _FAMILIES[model_type]
    if projector and family.projector is None:
        raise UserError(
            f"the projector of model type {model_type!r} cannot be adapted, for its weight is a raw Parameter and no "
            "linear layer; leave it out (projector=False, on the command line --no-projector)"
        )
    layers = rf"{family.language_model}\.layers\.\d+"
    parts = [rf"{layers}\.mlp\.({family.mlp})_proj"]
    parts += [family.projector] * projector + [rf"{layers}\.self_attn\.[qkvo]_proj"] * attention
    return rf"(.*\.)?({'|'.join(parts)})"
