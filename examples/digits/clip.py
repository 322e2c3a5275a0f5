"""The CLIP suite: image classification over pictures of digits, and the small CLIP that its tasks start from."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from base import PIXEL_MEAN, PIXEL_STD, descend, pixels
from scenes import CELL, INKS, SIZE, WORDS, Digit, Example, Pool, Rng, Task, compare, count, name, parity
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast


def saying(task: Task, said: dict[str, str]) -> Task:
    """A task whose answers are class names, said[answer]."""

    def make(pool: Pool, rng: Rng) -> Example:
        scene, question, answer = task(pool, rng)
        return scene, question, said[answer]

    return make


def large(pool: Pool, rng: Rng) -> Example:
    scene = name(pool, rng)[0]
    return scene, "", "yes" if scene[0].value > 4 else "no"


def ink(pool: Pool, rng: Rng) -> Example:
    ink, values = str(rng.choice(list(INKS))), rng.integers(0, 10, int(rng.integers(1, 4)))
    return pool.scene(rng, values.tolist(), [ink] * len(values)), "", ink


def digits(n: int) -> str:
    return f"{WORDS[n]} digit" + "s" * (n > 1)


TASKS: dict[str, Task] = {
    "parity": saying(parity, {"yes": "an even number", "no": "an odd number"}),
    "compare": saying(compare, {ink: f"{ink} as the greater digit" for ink in INKS}),
    "large": saying(large, {"yes": "a large number", "no": "a small number"}),
    "name": saying(name, {word: f"the number {word}" for word in WORDS}),
    "count": saying(count, {WORDS[n]: digits(n) for n in range(1, 7)}),
    "ink": saying(ink, {ink: f"a {ink} digit" for ink in INKS}),
}
TEMPLATES = ("{}", "a picture of {}", "an image that shows {}")


def caption(pool: Pool, rng: Rng) -> tuple[list[Digit], str]:
    """A scene and what is said of it, by which the base model learns."""
    values = rng.integers(0, 10, int(rng.integers(1, 4)))
    scene = pool.scene(rng, values.tolist())
    kind = rng.choice(4, p=(0.45, 0.25, 0.2, 0.1))
    if kind == 0:
        said = " and ".join(f"a {scene[i].ink} {scene[i].word}" for i in rng.permutation(len(scene)))
    elif kind == 1:
        scene = scene[:1]
        said = f"the number {scene[0].word}"
    elif kind == 2:
        scene = scene[:1]
        said = f"a {scene[0].ink} digit"
    else:
        scene = pool.scene(rng, rng.integers(0, 10, int(rng.integers(1, 7))).tolist())
        said = digits(len(scene))
    return scene, TEMPLATES[rng.integers(len(TEMPLATES))].replace("{}", said)


def record(id: str, image: str, question: str, answer: str) -> dict[str, str]:
    """A sample in a task's list."""
    return {"image": image, "label": answer}


def make_processor(pool: Pool, tasks: Iterable[Task]) -> CLIPProcessor:
    """A CLIP processor whose vocabulary is every word of captions, class names and templates."""
    rng = np.random.default_rng(0)
    classes = {make(pool, rng)[2] for make in tasks for _ in range(200)}
    text = " ".join([*classes, *TEMPLATES, *WORDS, *INKS, "and digit digits"])
    special = ["<pad>", "<s>", "<unk>", "</s>"]
    words = sorted(set(re.findall(r"\w+", text)))
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, special.index(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=24,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    )
    return CLIPProcessor(images, tokenizer)


def make_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """An untrained CLIP of 0.34 million parameters."""
    encoder = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {f"{which}_token_id": getattr(tokenizer, f"{which}_token_id") for which in ("pad", "bos", "eos")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    vision = {"image_size": SIZE, "patch_size": CELL}
    return CLIPModel(CLIPConfig(text_config=encoder | ids | text, vision_config=encoder | vision, projection_dim=64))


def build_base(folder: Path, pool: Pool, tasks: Iterable[Task], seed: int, steps: int) -> None:
    """Train the base model on captions of digits of `pool` and save it with its processor, which knows the tasks' words."""
    torch.set_num_threads(1)  # the same weights whatever the number of cores
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 3])
    processor = make_processor(pool, tasks)
    model = make_model(processor.tokenizer)

    def loss_of_batch() -> Tensor:
        scenes, captions = zip(*(caption(pool, rng) for _ in range(128)), strict=True)
        texts = processor.tokenizer(list(captions), padding=True, return_tensors="pt")
        logits = model(**texts, pixel_values=pixels(scenes).float()).logits_per_image
        number = {said: i for i, said in enumerate(captions)}
        said = torch.tensor([number[said] for said in captions])
        same = (said[:, None] == said).float()
        target = same / same.sum(1, keepdim=True)  # equal captions all match
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    descend(list(model.parameters()), max(1, 2 * steps // 3), "clip", loss_of_batch)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
