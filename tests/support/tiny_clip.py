"""A CLIP of a few thousand weights in a standard folder, three tasks on noise, and a method that changes nothing."""

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from support.labelled_images import CLASSES, make_images, manifest_tasks

SPECIAL = ["<pad>", "<s>", "<unk>", "</s>"]


def make_model(folder):
    torch.manual_seed(0)
    words = sorted(
        {word for names in CLASSES.values() for name in names for word in name.split()} | {"a", "photo", "of"}
    )
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=12, **tokens)
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16), tokenizer).save_pretrained(folder)
    encoder = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {
        f"{name}_token_id": SPECIAL.index(token) for name, token in (("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>"))
    }
    config = CLIPConfig(
        text_config=encoder | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 12},
        vision_config=encoder | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
        initializer_factor=4.0,
    )
    CLIPModel(config).save_pretrained(folder)


def make_suite(folder):
    """Model, data and the manifest `clip.yaml`."""
    make_model(folder / "base")
    make_images(folder / "data")
    manifest = {
        "name": "tiny-clip",
        "kind": "classification",
        "data": "data",
        "model": "./base",
        "templates": ["a {}", "a photo of a {}"],
        "tasks": manifest_tasks(),
    }
    (folder / "clip.yaml").write_text(yaml.safe_dump(manifest))


class Plain:
    """A method with one state for all tasks: the model as it is."""

    needs_task = False

    def __init__(self, model, tasks=()):
        self.model, self.tasks = model, list(tasks)

    def activate(self, task, train):
        assert not train
