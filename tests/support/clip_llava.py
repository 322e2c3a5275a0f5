"""A LLaVA whose tower has a class token, and batches of it with so many images for each sample."""

import torch
import transformers

IMAGE, PATCHES, TARGETS = 39, 4, r".*(language_model\.layers\.\d+\.mlp\.\w+_proj|projector\.linear_[12])"


def llava():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"num_key_value_heads": 2, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", "initializer_range": 0.3, **sizes, **text},
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **sizes},
        image_token_id=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def batch(images=(1, 1, 1), length=12, answer=2):
    """Samples with so many images each; the last tokens are the answer."""
    ids = torch.randint(3, IMAGE, (len(images), length))
    for row, count in zip(ids, images, strict=True):
        row[1 : 1 + PATCHES * count] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[:, length - answer :] = ids[:, length - answer :]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if sum(images):
        inputs["pixel_values"] = torch.randn(sum(images), 3, 8, 8)
    return inputs
