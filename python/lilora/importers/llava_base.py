"""The base that papers on LLaVA train, of its parts: a language model, a vision tower and LLaVA's first-stage projector."""

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from lilora.bank.atomic import new_folder
from lilora.errors import UserError

from .checkpoint import Checkpoint, read_pickle

IMAGE = "<image>"
EMBEDDINGS = 64  # their number is a multiple of it, as in the converted checkpoints of LLaVA-1.5
FEATURE_LAYER = -2

# A conversation as LLaVA-1.5 is trained on it, Vicuna's form of version 1; contents are texts or lists of parts.
CHAT_TEMPLATE = """\
{%- macro said(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] != 'system' -%}
{{ "A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ said(message['content']) + ' ' }}
{%- elif message['role'] == 'user' -%}{{ 'USER: ' + said(message['content']) + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + said(message['content']) + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def assemble_llava(language: str, vision: str, projector: Path, out: Path) -> None:
    """Write the LLaVA-1.5 (arXiv 2310.03744) of these parts, with its processor, into the new or empty folder `out`.

    language: Vicuna or another Llama, a folder or a hub id; its dtype is that of the model. vision: a CLIP with a vision
    tower, whose layer before the last is projected, without the class token. projector: LLaVA's `mm_projector.bin`, two
    linear layers with a GELU between, read as plain tensors. What the vocabulary gains, `<image>` and what fills it up to a
    multiple of EMBEDDINGS, has the mean of the other tokens' embeddings: greedy decoding never chooses it.

    Raises:
        UserError: a part cannot be read, is of another type or does not fit the others; or the folder is in use.
    """
    _require_type("--language", language, ("llama",))
    _require_type("--vision", vision, ("clip", "clip_vision_model"))
    tensors = read_pickle(projector)
    with new_folder(out) as folder:
        tokenizer, images, llama, tower = _load(language, vision)
        parts = _projector(projector, tensors, tower.config.hidden_size, llama.config.hidden_size)
        tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        _embed(llama, len(tokenizer))
        patches = (tower.config.image_size // tower.config.patch_size) ** 2
        config = LlavaConfig(
            text_config=llama.config,
            vision_config=tower.config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=patches,
            vision_feature_layer=FEATURE_LAYER,
            dtype=llama.dtype,
        )
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(config)
        model.model.language_model, model.lm_head = llama.model, llama.lm_head
        model.model.vision_tower = tower.to(llama.dtype)
        model.model.multi_modal_projector.load_state_dict(
            {name: tensor.to(llama.dtype) for name, tensor in parts.items()}, assign=True
        )
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        model.generation_config = GenerationConfig(**ids)  # Vicuna's own samples by settings that contradict each other
        model.save_pretrained(folder)
        LlavaProcessor(
            images,
            tokenizer,
            patch_size=tower.config.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,  # the class token
            chat_template=CHAT_TEMPLATE,
        ).save_pretrained(folder)


def _require_type(option: str, model: str, types: tuple[str, ...]) -> None:
    try:
        found = AutoConfig.from_pretrained(model).model_type
    except (OSError, ValueError) as error:
        raise _unreadable(option, model, error) from error
    if found not in types:
        raise UserError(f"{option} {model} is of type {found!r}; give a model of type {' or '.join(types)}")


def _unreadable(option: str, model: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"{option} {model}: cannot be loaded ({reason}); give a model folder or a hub id")


def _load(language: str, vision: str) -> tuple[Any, Any, LlamaForCausalLM, CLIPVisionModel]:
    """(tokenizer, image processor, language model, vision tower)"""
    option, model = "--language", language
    try:
        llama = LlamaForCausalLM.from_pretrained(language, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(language)
        option, model = "--vision", vision
        return tokenizer, AutoImageProcessor.from_pretrained(vision), llama, CLIPVisionModel.from_pretrained(vision)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of several libraries; a damaged file can raise anything
        raise _unreadable(option, model, error) from error


def _projector(path: Path, tensors: Any, vision: int, hidden: int) -> dict[str, torch.Tensor]:
    """linear_1 [hidden, vision] and linear_2 [hidden, hidden] with their biases, by name."""

    def rename(raw: str) -> str | None:
        found = re.fullmatch(r"(?:.+\.)?mm_projector\.([02])\.(weight|bias)", raw)
        return found and f"linear_{1 if found[1] == '0' else 2}.{found[2]}"

    checkpoint = Checkpoint(path, tensors, rename)
    parts = {}
    for name, width in (("linear_1", vision), ("linear_2", hidden)):
        parts[f"{name}.weight"] = checkpoint.take(f"{name}.weight", hidden, width)
        parts[f"{name}.bias"] = checkpoint.take(f"{name}.bias", hidden)
    checkpoint.finish()
    return parts


@torch.no_grad()
def _embed(llama: LlamaForCausalLM, tokens: int) -> None:
    """Make room for so many tokens; the new ones get the mean of the others' embeddings."""
    known = llama.config.vocab_size
    if tokens <= known:
        return
    llama.resize_token_embeddings(tokens, pad_to_multiple_of=EMBEDDINGS, mean_resizing=False)
    layers: tuple[nn.Module, ...] = (llama.get_input_embeddings(), llama.get_output_embeddings())
    for layer in layers:
        layer.weight[known:] = layer.weight[:known].float().mean(0).to(layer.weight.dtype)
