"""A suite that trains in seconds: a tiny LLaVA with random weights in a standard folder, and three tasks on noise."""

import json
import shlex

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from support.word_tokenizer import word_tokenizer

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} :"
)
WORDS = [
    "which",
    "colour",
    "is",
    "it",
    "how",
    "many",
    "are",
    "there",
    "name",
    "one",
    "two",
    "three",
    "red",
    "green",
    "blue",
    "yes",
    "no",
    ":",
    "?",
]
TASKS = {
    "colour": ("which colour is it ?", ["red", "green", "blue"]),
    "count": ("how many are there ?", ["one", "two", "three"]),
    "name": ("name it ?", ["yes", "no"]),
}


def make_model(folder):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(sorted(set(WORDS)), "<image>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4, vision_feature_layer=-1
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def make_data(folder, samples=12):
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for task, (question, answers) in TASKS.items():
        for split in ("train", "test"):
            records = []
            for i in range(samples):
                name = f"{task}-{split}-{i}.png"
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "images" / name)
                answer = answers[int(rng.integers(len(answers)))]
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                records.append({"id": f"{i}", "image": name, "conversations": turns})
            (folder / f"{task}-{split}.json").write_text(json.dumps(records))


def make_suite(folder):
    """Model, data and the manifest `tasks.yaml`."""
    make_model(folder / "base")
    make_data(folder / "data")
    tasks = [
        {
            "name": task,
            "train": f"{task}-train.json",
            "test": f"{task}-test.json",
            "images": "images",
            "scorer": "exact",
            "answer_format": "|".join(answers),
            "max_new_tokens": 3,
        }
        for task, (_, answers) in TASKS.items()
    ]
    manifest = {"name": "tiny", "data": "data", "model": "./base", "tasks": tasks}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(manifest))


def without_image(record):
    """A record of the suite as text alone."""
    human, gpt = record["conversations"]
    human = human | {"value": human["value"].replace("<image>", "").strip()}
    return {k: v for k, v in record.items() if k != "image"} | {"conversations": [human, gpt]}


def train_options(max_steps: int = 6, save_steps: int = 2, lr: float = 0.01) -> list[str]:
    """Options of `lilora train` that train each task of the suite in a second."""
    return shlex.split(
        f"--r 8 --sub-rank 4 --alpha 16 --dropout 0.1 --lr {lr} --max-steps {max_steps} --batch-size 4 "
        f"--gradient-accumulation 1 --save-steps {save_steps} --device cpu --quiet"
    )


TRAIN_OPTIONS = train_options()
