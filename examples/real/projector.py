"""The base model of the visual suite: SmolLM2 in a LLaVA, whose projector learns to say what a picture shows."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from language import language_model
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from tokenizers import AddedToken
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tower import PATCH, TOKENS, descend, drawn, in_batches, make_image_processor, of_tower
from transformers import (
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from visual import DESCRIBE, SHORT, Kind, mix

PICTURES, ALIGN_STEPS, STEPS = 4000, 500, 120
IMAGE = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def assembled(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tower: CLIPVisionModel
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of language model and tower with a random projector, and its processor."""
    known = llama.config.vocab_size
    tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
    llama.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():  # greedy decoding never chooses the mean
        embedding = llama.get_input_embeddings().weight
        embedding[known:] = embedding[:known].mean(0)
    config = LlavaConfig(
        text_config=llama.config,
        vision_config=tower.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model = tower, llama.model
    model.tie_weights()
    model.generation_config = llama.generation_config
    processor = LlavaProcessor(
        make_image_processor(),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token
        chat_template=CHAT_TEMPLATE,
    )
    return model.eval(), processor


class Mix:
    """Pictures of the kinds as the tower sees them, with what is said of each."""

    def __init__(
        self, kinds: list[Kind], tower: CLIPVisionModel, processor: LlavaProcessor, number: int, seed: int, train: bool
    ):
        self.rng = np.random.default_rng([seed, 13, train])
        images, shown = drawn([kind.make for kind in kinds], number, self.rng, train)
        self.features = in_batches(lambda part: of_tower(tower)(part / 255), images, "features")
        self.said = []  # caption and short answer of each
        for i, name in enumerate(shown):
            kind = kinds[i % len(kinds)]
            self.said.append((kind.caption.format(name), kind.short.format(name)))
        self.processor, self.tokenizer = processor, processor.tokenizer

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, question: str) -> list[int]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self.ids(text.replace(IMAGE, IMAGE * TOKENS))

    def batch(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """(input_ids, labels) [B, L] of these samples, each with a question of its own."""
        ids, labels = [], []
        for i in chosen:
            short = int(self.rng.integers(2))
            prompt = self.prompt(str(self.rng.choice(SHORT if short else DESCRIBE)))
            reply = [*self.ids(self.said[i][short]), self.tokenizer.convert_tokens_to_ids("<|im_end|>")]
            ids.append(torch.tensor(prompt + reply))
            labels.append(torch.tensor([-100] * len(prompt) + reply))
        pad = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        return pad_sequence(ids, True, pad), pad_sequence(labels, True, -100)


def losses(model: LlavaForConditionalGeneration, ids: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    """Negative log-likelihood of each answer token [answers]; features [B, TOKENS, width] of the tower."""
    embedded = model.get_input_embeddings()(ids)
    image = (ids == model.config.image_token_id).unsqueeze(-1)
    embedded = embedded.masked_scatter(image, model.model.multi_modal_projector(features))
    hidden = model.model.language_model(inputs_embeds=embedded).last_hidden_state[:, :-1]
    answers = labels[:, 1:] != -100
    return F.cross_entropy(model.lm_head(hidden[answers]), labels[:, 1:][answers], reduction="none")


def align(model: LlavaForConditionalGeneration, mix: Mix, steps: int) -> None:
    """A start without the language model: what a picture's tokens have in common points to the words of its caption."""
    table = model.get_input_embeddings().weight.detach()
    wanted = [mix.ids(" " + short) for _, short in mix.said]
    vocabulary = sorted({token for tokens in wanted for token in tokens})
    target = torch.zeros(len(wanted), len(vocabulary))
    for row, tokens in zip(target, wanted, strict=True):
        row[[vocabulary.index(token) for token in tokens]] = 1 / len(tokens)
    words, length = F.normalize(table[vocabulary], dim=-1), table[vocabulary].norm(dim=-1).mean()

    def loss_of_batch() -> Tensor:
        chosen = torch.from_numpy(mix.rng.choice(len(wanted), 64, replace=False))
        projected = model.model.multi_modal_projector(mix.features[chosen])
        logits = F.normalize(projected.mean(1), dim=-1) @ words.T / 0.07
        return F.cross_entropy(logits, target[chosen]) + (projected.norm(dim=-1) / length - 1).square().mean()

    descend(list(model.model.multi_modal_projector.parameters()), steps, "projector alone", loss_of_batch)


def teach(model: LlavaForConditionalGeneration, mix: Mix, steps: int, batch: int = 8) -> None:
    """Projector and a LoRA on the language model's attention, which is merged: it learns to look, and to answer in short."""
    adapted = inject_adapter_in_model(
        LoraConfig(r=16, lora_alpha=32, target_modules=r".*self_attn\.(q|k|v|o)_proj"), model.model.language_model
    )
    learned = [p for name, p in model.named_parameters() if "lora_" in name or "multi_modal_projector" in name]

    def loss_of_batch() -> Tensor:
        chosen = mix.rng.choice(len(mix.said), batch, replace=False).tolist()
        return losses(model, *mix.batch(chosen), mix.features[chosen]).mean()

    descend(learned, steps, "projector", loss_of_batch)
    for name, layer in list(adapted.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            adapted.set_submodule(name, layer.get_base_layer())


@torch.inference_mode()
def likelihood(model: LlavaForConditionalGeneration, mix: Mix, kinds: int) -> tuple[float, float]:
    """Nats per token of the answers about the mix's pictures, and about another of the same kind that shows something else."""
    right, wrong, number = [], [], len(mix.said)

    def other(i: int) -> int:
        return next(j for j in ((i + k * kinds) % number for k in range(1, number)) if mix.said[j] != mix.said[i])

    for chosen in (list(range(start, min(start + 8, number))) for start in range(0, number, 8)):
        ids, labels = mix.batch(chosen)
        right.append(losses(model, ids, labels, mix.features[chosen]))
        wrong.append(losses(model, ids, labels, mix.features[[other(i) for i in chosen]]))
    return float(torch.cat(right).mean()), float(torch.cat(wrong).mean())


def build_base(folder: Path, tower: Path, packages: Path | None, seed: int) -> None:
    """The LLaVA, and likelihood.json: nats per token of answers about test pictures, and about wrong ones of the same kind."""
    torch.set_num_threads(1)  # the same weights whatever the number of cores
    torch.manual_seed(seed)
    kinds, vision = mix(packages), CLIPVisionModel.from_pretrained(tower).eval()
    model, processor = assembled(*language_model(), vision)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    learned = Mix(kinds, vision, processor, PICTURES, seed, train=True)
    align(model, learned, ALIGN_STEPS)
    teach(model, learned, STEPS)
    right, wrong = likelihood(model, Mix(kinds, vision, processor, 16 * len(kinds), seed, train=False), len(kinds))
    (folder / "likelihood.json").write_text(json.dumps({"right": right, "wrong": wrong}, indent=1) + "\n")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
