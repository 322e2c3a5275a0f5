"""The small LLaVA that the tasks start from: a standard Hugging Face folder, trained on the generic mix alone."""

import itertools
import re

import numpy as np
import torch
from scenes import GENERIC, INKS, SIZE, TASKS, WORDS, CELL, Pool, draw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tqdm import trange
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
PIECES = re.compile(r"\w+|[^\w\s]")


def make_processor(texts: list[str]) -> LlavaProcessor:
    """A processor whose vocabulary is the words of `texts`."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = sorted({piece for text in texts for piece in PIECES.findall(text.lower())})
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=[0.1] * 3, image_std=[0.25] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer, init=0.02, width=128, layers=4, inner=384, vwidth=128, vlayers=2, vinner=256) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=vwidth, intermediate_size=vinner, num_hidden_layers=vlayers, num_attention_heads=4,
        image_size=SIZE, patch_size=CELL, projection_dim=vwidth, initializer_range=init,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, initializer_range=init, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config)
