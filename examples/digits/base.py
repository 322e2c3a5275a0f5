"""The small LLaVA that the tasks start from: a standard Hugging Face folder, trained on the generic mix alone."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scenes import CELL, CELLS, GENERIC, GRID, INKS, SIZE, WORDS, Digit, Example, Pool, Rng, Task, draw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
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

PATCHES = GRID * GRID
PIXEL_MEAN, PIXEL_STD = 0.1, 0.25
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def make_processor(pool: Pool, tasks: Iterable[Task]) -> LlavaProcessor:
    """A LLaVA processor whose vocabulary is every word that questions and answers of the tasks and the mix use."""
    rng = np.random.default_rng(0)
    examples = [make(pool, rng) for make in (*tasks, *GENERIC) for _ in range(200)]
    text = " ".join(f"{question} {answer}" for _, question, answer in examples)
    text += f" user assistant : {' '.join([*WORDS, *INKS, *CELLS, *map(str, range(SIZE + 1))])}"
    words = sorted(set(re.findall(r"\w+|[^\w\s]", text.lower())))
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>"))
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
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, width: int) -> LlavaForConditionalGeneration:
    """An untrained LLaVA, of 0.54 million parameters at width 96."""
    init = 0.06 * (96 / width) ** 0.5
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=CELL,
        initializer_range=init,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=init,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
        )
    )


def pixels(scenes: list[list[Digit]]) -> Tensor:
    """What the image processor makes of the pictures: [B, 3, 32, 32] fp32."""
    images = torch.from_numpy(np.stack([draw(scene) for scene in scenes])).permute(0, 3, 1, 2)
    return (images / 255 - PIXEL_MEAN) / PIXEL_STD


def descend(parameters: list[nn.Parameter], steps: int, title: str, loss_of_batch, rate: float = 2e-3) -> None:
    """Minimise `loss_of_batch()` with AdamW and a one-cycle schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in (bar := trange(steps, desc=title)):
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def rate_at(width: int) -> float:
    return 2e-3 * 96 / width


def train_tower(tower: nn.Module, pool: Pool, rng: Rng, steps: int) -> None:
    """Teach the vision tower to tell value, ink and cell of every patch, as linear functions of its output."""
    inks = list(INKS)
    empty = 10
    heads = nn.Linear(tower.config.hidden_size, empty + 1 + len(inks) + PATCHES)
    cells = torch.arange(PATCHES).expand(64, PATCHES)

    def loss_of_batch() -> Tensor:
        scenes = [pool.scene(rng, rng.integers(0, 10, 8).tolist()) for _ in range(64)]
        value = torch.full((64, PATCHES), empty)
        ink = torch.full((64, PATCHES), -100)
        for i, scene in enumerate(scenes):
            for d in scene:
                value[i, d.row * GRID + d.column] = d.value
                ink[i, d.row * GRID + d.column] = inks.index(d.ink)
        said = heads(tower(pixels(scenes)).last_hidden_state[:, 1:])  # without the class token
        said = said.transpose(1, 2).split([empty + 1, len(inks), PATCHES], dim=1)
        value_loss, ink_loss, cell_loss = map(nn.functional.cross_entropy, said, (value, ink, cells))
        # Digits are the hardest to read: without a larger share, their part of the features stays small.
        return 3 * value_loss + ink_loss + cell_loss

    descend(
        [*tower.parameters(), *heads.parameters()],
        steps,
        "vision tower",
        loss_of_batch,
        rate_at(tower.config.hidden_size),
    )


def train_language(model: LlavaForConditionalGeneration, processor: LlavaProcessor, pool: Pool, rng: Rng, steps: int):
    """Teach projector and language model the generic mix; the tower stays as it is."""
    tokenizer = processor.tokenizer
    model.model.vision_tower.requires_grad_(False)
    kinds = list(GENERIC)
    shares = np.array([GENERIC[kind] for kind in kinds])

    @cache
    def prompt_ids(question: str, pictures: int) -> list[int]:
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return tokenizer(text.replace("<image>", "<image>" * PATCHES), add_special_tokens=False)["input_ids"]

    def loss_of_batch() -> Tensor:
        examples: list[Example] = [kinds[k](pool, rng) for k in rng.choice(len(kinds), 32, p=shares / shares.sum())]
        ids, labels = [], []
        for scene, question, answer in examples:
            prompt = prompt_ids(question, int(bool(scene)))
            reply = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            ids.append(torch.tensor(prompt + reply))
            labels.append(torch.tensor([-100] * len(prompt) + reply))
        input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        return model(
            input_ids=input_ids,
            attention_mask=(input_ids != tokenizer.pad_token_id).long(),
            labels=nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
            pixel_values=pixels([scene for scene, _, _ in examples if scene]),
        ).loss

    parameters = [p for p in model.parameters() if p.requires_grad]
    descend(parameters, steps, "language model", loss_of_batch, rate_at(model.config.text_config.hidden_size))


def build_base(folder: Path, pool: Pool, tasks: Iterable[Task], seed: int, steps: int, width: int = 96) -> None:
    """Train the base model on digits of `pool` and save it with its processor, which knows the tasks' words."""
    # For so small a model a second thread gains little; one gives the same weights whatever the number of cores.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    processor = make_processor(pool, tasks)
    model = make_model(processor.tokenizer, width)
    train_tower(model.model.vision_tower, pool, rng, steps=max(1, steps // 7))
    train_language(model, processor, pool, rng, steps)
    model.requires_grad_(True).save_pretrained(folder)
    processor.save_pretrained(folder)
