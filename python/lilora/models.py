"""Where adapters go in each family of multimodal models: patterns on module names, anchored on the language model.

Bare suffixes such as `gate_proj` would also hit the vision towers of some families (Qwen2.5-VL).
"""

from typing import Any

from torch import nn

from lilora.errors import UserError
from lilora_kernels.queries import QuerySource

_MLP = r"language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj"
_ATTENTION = r"language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"
_PROJECTOR = {  # config.model_type -> the linears between the vision tower and the language model
    "internvl": r"multi_modal_projector\.linear_[12]",
    "llava": r"multi_modal_projector\.linear_[12]",
    "llava_next": r"multi_modal_projector\.linear_[12]",
    "llava_onevision": r"multi_modal_projector\.linear_[12]",
    "qwen2_5_vl": r"visual\.merger\.mlp\.[02]",
    "qwen2_vl": r"visual\.merger\.mlp\.[02]",
}
_CLIP = r"(text|vision)_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"


def target_modules(config: Any, *, projector: bool = False, attention: bool = False) -> str:
    """Regular expression that fully matches the names of the linears to adapt, in PEFT's `target_modules` form.

    `config` is a transformers config or its `model_type`. The MLPs of the language model (gate, up and down) always
    match; `projector` adds the linears between vision tower and language model, `attention` the language model's
    q, k, v and o. Of CLIP all linears of both encoders' blocks match. UserError for a family that is not known here.
    """
    model_type = config if isinstance(config, str) else config.model_type
    if model_type == "clip":
        return rf"(.*\.)?{_CLIP}"
    if model_type not in _PROJECTOR:
        raise UserError(
            f"model type {model_type!r} has no adapter preset; known are {', '.join(sorted((*_PROJECTOR, 'clip')))}; "
            "for any other model pass target_modules, a regular expression on its module names"
        )
    parts = [_MLP] + [_PROJECTOR[model_type]] * projector + [_ATTENTION] * attention
    return rf"(.*\.)?({'|'.join(parts)})"


def query_source(model: nn.Module) -> QuerySource:
    """Where the queries of a rank pool come from: input embeddings, and [CLS] after the last but one layer of the tower.

    UserError for a model without such a vision tower.
    """
    tower = next((module for name, module in model.named_modules() if name.split(".")[-1] == "vision_tower"), None)
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    has_class = hasattr(getattr(tower, "embeddings", None), "class_embedding")
    if layers is None or len(layers) < 2 or not has_class or model.config.model_type != "llava":
        raise UserError(
            f"{type(model).__name__} has no vision tower with a class token that queries could come from; use a LLaVA "
            "with a CLIP tower"
        )
    embedding = model.get_input_embeddings()
    return QuerySource(embedding, tower, layers[-2], tower.config.hidden_size, model.config.image_token_id)
