"""A bank of two tasks, and tiny LLaVA and CLIP with random weights in standard folders."""

import pytest
import torch
from support.banks import BASE, R, shared_tensors, task_tensors
from support.word_tokenizer import word_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from lilora.bank.bank import Bank

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)


@pytest.fixture
def bank(tmp_path):
    """Two tasks on one shared set."""
    bank = Bank.create(tmp_path / "bank", config={"r": R}, base_model=BASE)
    bank.add_task("one", task_tensors(1), shared_tensors(0))
    bank.add_task("two", task_tensors(2), shared_tensors(0))
    return bank


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory):
    """Two decoder layers, widths 24 (text) and 16 (vision), keys and values narrower than queries."""
    torch.manual_seed(0)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_key_value_heads": 1,
        "vocab_size": 40,
        "eos_token_id": None,
    }
    vision = {"hidden_size": 16, "intermediate_size": 20, "image_size": 8, "patch_size": 4}
    config = LlavaConfig(
        text_config={"model_type": "llama", "initializer_range": 0.3, **heads, **text},
        vision_config={"model_type": "clip_vision_model", **heads, **vision},
        image_token_id=39,
    )
    folder = tmp_path_factory.mktemp("llava")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8),
        word_tokenizer(["what"], "<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """Encoders of two layers of width 16 (text) and three of width 24 (vision)."""
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"vocab_size": 40, "max_position_embeddings": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(
        text_config=text | ids,
        vision_config=vision | {"image_size": 8, "patch_size": 4},
        projection_dim=12,
        initializer_factor=4.0,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8), word_tokenizer(["what"], "<image>")
    ).save_pretrained(folder)
    return folder
