"""A text encoder of a few thousand weights in a standard folder."""

import torch
from transformers import BertConfig, BertModel

from support.word_tokenizer import word_tokenizer


def make_encoder(folder, texts) -> None:
    """One that knows the words of these texts."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(sorted({word for text in texts for word in text.split()}), "<image>")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)).save_pretrained(folder)
