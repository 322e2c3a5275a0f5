"""Language models without images: loading them, and their tokenizer as the processor that the collator asks."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, BatchEncoding

from lilora.errors import UserError


class TextProcessor:
    """A tokenizer with the interface of a multimodal processor; it takes no images."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> str | None:
        return self.tokenizer.chat_template

    def apply_chat_template(self, conversations: list, add_generation_prompt: bool = False) -> list[str]:
        """Each conversation, a list of {role, content}, as text."""
        return self.tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def __call__(self, text: list[str], images: None = None, **options) -> BatchEncoding:
        return self.tokenizer(text, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)


def is_text_model(model: str) -> bool:
    """Whether the config of a model folder or hub id is of a language model that sees no images."""
    config = type(AutoConfig.from_pretrained(model))
    return config in AutoModelForCausalLM._model_mapping and config not in AutoModelForImageTextToText._model_mapping


def load(model: str, dtype: torch.dtype | str) -> tuple[nn.Module, Any]:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    processor = TextProcessor(AutoTokenizer.from_pretrained(model))
    if not processor.chat_template:
        raise UserError(
            f"--model {model}: its tokenizer has no chat template; use the instruction-tuned checkpoint of the model, or set "
            "chat_template in its tokenizer_config.json"
        )
    return base, processor
