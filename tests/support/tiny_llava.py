"""A LLaVA of a few thousand weights with LiLoRALinear layers put in by hand, and batches for it."""

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lilora_kernels import LiLoRALinear, attach

IMAGE, PATCHES, VOCABULARY = 39, 4, 40
TASKS = ("read", "count", "where")


def randomise(model: nn.Module) -> None:
    """Give every adapter tensor O(1) random values: fresh tasks are all alike."""
    for module in model.modules():
        if isinstance(module, LiLoRALinear):
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if name.startswith("lilora_"):
                        parameter.normal_(std=1 if "fusion" in name else parameter.shape[-1] ** -0.5)


def tiny_llava(dropout: float = 0.0, layers: int = 2, **options) -> LlavaForConditionalGeneration:
    """Adapted in the language model's MLPs and in both projector linears; attached, in eval mode."""
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
            ),
            text_config=LlamaConfig(
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=layers,
                num_attention_heads=2,
                num_key_value_heads=2,
                vocab_size=VOCABULARY,
                max_position_embeddings=128,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=None,
                initializer_range=0.3,
            ),
            image_token_index=IMAGE,
        )
    )
    model.requires_grad_(False)
    for path, linear in list(model.named_modules()):
        if (
            "language_model" in path and ".mlp." in path and isinstance(linear, nn.Linear)
        ) or "projector.linear" in path:
            parent, _, leaf = path.rpartition(".")
            layer = LiLoRALinear(linear, r=8, sub_rank=4, alpha=8, dropout=dropout, **options)
            setattr(model.get_submodule(parent), leaf, layer)
    for module in model.modules():
        if isinstance(module, LiLoRALinear):
            for task in TASKS:
                module.add_task(task)
    randomise(model)
    attach(model)
    return model.eval()


def batch(images: list[int], length: int = 12) -> dict[str, Tensor]:
    """input_ids [B, length] with PATCHES image tokens per image of each sample, and the images packed in order."""
    ids = torch.randint(3, IMAGE, (len(images), length))
    for row, count in zip(ids, images, strict=True):
        row[1 : 1 + PATCHES * count] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if sum(images):
        inputs["pixel_values"] = torch.randn(sum(images), 3, 8, 8)
    return inputs


def sample(inputs: dict[str, Tensor], images: list[int], i: int) -> dict[str, Tensor]:
    """Sample i of a batch as a batch of its own."""
    one = {key: inputs[key][i : i + 1] for key in ("input_ids", "attention_mask")}
    if images[i]:
        one["pixel_values"] = inputs["pixel_values"][sum(images[:i]) : sum(images[: i + 1])]
    return one
