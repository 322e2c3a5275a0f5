"""Where a layer lies in a model: whose rows it sees follows from that."""

import inspect
import re
from collections.abc import Sequence

from torch import nn

from .context import AHEAD, GATHERED, TEXT
from .vision_tokens import tells_vision_tokens

# Model types of transformers some of whose layers see [L, B, K]: of a batch as long as its samples that is not to be told.
SEQUENCE_FIRST = {"bros", "fsmt", "led", "longformer", "mask2former", "oneformer", "xlnet"}
EXPERT = re.compile(r"(?<!shared_)experts?[._]\d+(\.|$)")  # one of those that a router chooses among


def decoder_of(model: nn.Module) -> nn.Module:
    """The innermost decoder that transformers' `get_decoder` leads to; the model itself where there is none."""
    parts = set(model.modules())
    decoder = model
    while hasattr(decoder, "get_decoder") and (below := decoder.get_decoder()) is not decoder and below in parts:
        decoder = below
    return decoder


def sees_images(model: nn.Module) -> nn.Module | None:
    """The innermost module around the decoder that has transformers' `get_image_features`: tower, projector and decoder."""
    names, decoder = {module: name for name, module in model.named_modules()}, decoder_of(model)
    if decoder not in names or getattr(decoder, "main_input_name", None) != "input_ids":
        return None
    around = [
        m for m in names
        if hasattr(m, "get_image_features") and m is not decoder and _below(names[decoder], names[m])
    ]  # fmt: skip
    return max(around, key=lambda module: len(names[module]), default=None)


def places(model: nn.Module, paths: Sequence[str]) -> dict[str, str | None]:
    """Where these parts of a model lie: TEXT below its decoder, AHEAD of it, GATHERED among experts; None if nothing tells.

    Ahead of it are the siblings that transformers' `get_image_features` or `get_video_features` uses, in the innermost module
    around it that has the first; others may run behind it. The part of that module which holds the decoder is text as a
    whole, for it may have an encoder of its own. Of a family whose vision tokens are told, all that is not text is ahead.
    """
    names = {module: name for name, module in model.named_modules()}

    def holds(part: nn.Module, inner: nn.Module) -> bool:
        return _below(names[inner], names[part])

    decoder = decoder_of(model)
    text, ahead = [], []
    if decoder in names and getattr(decoder, "main_input_name", None) == "input_ids":
        owner = sees_images(model)
        parts = [] if owner is None else list(owner.children())
        seeing = "" if owner is None else _source_of_features(type(owner))
        ahead = [
            part
            for name, part in ({} if owner is None else owner._modules).items()
            if part is not None and not holds(part, decoder) and re.search(rf"\bself\.{name}\b", seeing)
        ]
        text = [part for part in (*parts, decoder) if holds(part, decoder) and _holds_text_alone(part)]
        if not text:  # code outside transformers puts towers and projectors into the decoder
            text = [part for part in decoder.children() if isinstance(part, nn.ModuleList)]
        heads = [m.get_output_embeddings() for m in names if hasattr(m, "get_output_embeddings") and holds(m, decoder)]
        text += [head for head in heads if head in names]

    def place(path: str) -> str | None:
        if EXPERT.search(path):
            return GATHERED
        for where, parts in ((TEXT, text), (AHEAD, ahead)):
            if any(_below(path, names[part]) for part in parts):
                return where
        return AHEAD if text and tells_vision_tokens(model) else None

    return {path: place(path) for path in paths}


def reordered(model: nn.Module) -> str | None:
    """Why rows of some layers are in another order than the batch's samples, which their number would not show."""
    for config in [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]:
        if (kind := getattr(config, "model_type", None)) in SEQUENCE_FIRST:
            return f"{kind} has layers that see its sequences transposed"
        if getattr(config, "sparse_prediction", False):
            return "config.sparse_prediction gathers the rows of masked tokens; set it to False"
    return None


def _source_of_features(owner: type[nn.Module]) -> str:
    methods = (getattr(owner, f"get_{kind}_features", None) for kind in ("image", "video"))
    try:
        return "".join(inspect.getsource(inspect.unwrap(method)) for method in methods if method is not None)
    except OSError:  # made without a file: nothing tells
        return ""


def _below(path: str, part: str) -> bool:
    return f"{path}.".startswith(f"{part}." if part else "")


def _holds_text_alone(part: nn.Module) -> bool:
    """Of transformers' parts: one whose config has none of other parts in it, and nothing that reads something else."""
    config = getattr(part, "config", None)
    others = config is None or config.sub_configs
    reads = {getattr(module, "main_input_name", "input_ids") for module in part.modules()}
    return type(part).__module__.startswith("transformers.") and not others and reads == {"input_ids"}
