"""Batches as the families' own processors make them, token by token."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.word_tokenizer import word_tokenizer
from transformers.processing_utils import ProcessorMixin

from lilora.continual.collator import Collator
from lilora.continual.instructions import Sample
from lilora.errors import UserError

WORDS = ["which", "name", "it", "?", "red", "green", "yes", "no", ":", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
SQUARE = {"height": 16, "width": 16}
PATCHES = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 4096},
}
TILES = [[16, 32], [32, 16], [32, 32]]


def tokenizer(**named):
    made = word_tokenizer(WORDS, *named.values())
    for name, token in named.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


def qwen(processor, **more):
    images = transformers.Qwen2VLImageProcessorPil(**PATCHES)
    return processor(images, tokenizer(image_token="<image>", video_token="<video>", **more), None)


def paligemma():
    images = transformers.SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 4
    return transformers.PaliGemmaProcessor(images, tokenizer(image_token="<image>"))


PROCESSORS = {
    "llava": lambda: transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16),
        tokenizer(image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ),
    "llava_next": lambda: transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=16, image_grid_pinpoints=TILES),
        tokenizer(image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ),
    "idefics3": lambda: transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
        tokenizer(
            image_token="<image>",
            fake_image_token="<fake_token_around_image>",
            global_image_token="<global-img>",
            end_of_utterance_token="<end_of_utterance>",
            **{f"tile_{i}_{j}": f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)},
        ),
        image_seq_len=1,
    ),
    "llava_onevision": lambda: transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=TILES),
        tokenizer(image_token="<image>", video_token="<video>"),
        None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    ),
    "qwen2_vl": lambda: qwen(transformers.Qwen2VLProcessor),
    "qwen2_5_vl": lambda: qwen(transformers.Qwen2_5_VLProcessor),
    "qwen3_vl": lambda: qwen(
        transformers.Qwen3VLProcessor, vision_start_token="<vision>", vision_end_token="</vision>"
    ),
    "internvl": lambda: transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessorPil(size=SQUARE),
        tokenizer(
            context_image_token="<image>", start_image_token="<img>", end_image_token="</img>", video_token="<video>"
        ),
        None,
        image_seq_length=4,
    ),
    "glm4v": lambda: transformers.Glm4vProcessor(
        transformers.Glm4vImageProcessorPil(**PATCHES), tokenizer(image_token="<image>", video_token="<video>"), None
    ),
    "gemma3": lambda: transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessorPil(size=SQUARE),
        tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>"),
        image_seq_length=4,
    ),
    "paligemma": paligemma,
}


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch):
    # Processors of videos want torchvision; pictures alone do without.
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    made = PROCESSORS[request.param]()
    made.chat_template = TEMPLATE.replace("IMAGE", "<boi>" if request.param == "gemma3" else "<image>")
    return made


@pytest.fixture
def samples(tmp_path):
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(16, 16), (16, 40), (40, 16)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{i}.png")
    images = [tmp_path / f"{i}.png" for i in range(3)]
    return [
        Sample("one", (images[0],), "name it ?", ("yes",)),
        Sample("two", (images[1], images[2]), "which ?", ("red green",)),
        Sample("spelt", (images[1],), "name </s> <image> ?", ("no",)),
    ]


def batch_of(processor, samples, train):
    return Collator(processor, {"a": 0}, train)([("a", sample) for sample in samples])


def by_hand(processor, sample):
    """The prompt as a user of the processor makes it."""
    content = [{"type": "image"}] * len(sample.images) + [{"type": "text", "text": sample.question}]
    text = processor.apply_chat_template([[{"role": "user", "content": content}]], add_generation_prompt=True)
    images = [[Image.open(path) for path in sample.images]]
    return processor(text=text, images=images, return_tensors="pt")


def test_prompts_are_those_of_the_processor_with_the_answer_behind(processor, samples):
    own = processor.tokenizer
    for sample in samples[:2]:
        wanted = by_hand(processor, sample)
        asked, learned = (batch_of(processor, [sample], train) for train in (False, True))
        answer = torch.tensor([own(sample.answers[0])["input_ids"] + [own.eos_token_id]])
        length = wanted["input_ids"].shape[1]
        assert torch.equal(learned["input_ids"], torch.cat([wanted["input_ids"], answer], 1))
        assert torch.equal(learned["labels"][:, length:], answer)
        assert (learned["labels"][:, :length] == -100).all()
        assert "labels" not in asked
        for key in wanted.keys() - {"labels"}:
            assert torch.equal(asked[key], wanted[key]), key
            if key not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
                assert torch.equal(learned[key], wanted[key]), key


def test_types_of_tokens_are_those_that_the_model_is_trained_with(processor, samples):
    inputs = batch_of(processor, samples, train=True)
    image = inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")
    answered = inputs["labels"] != -100
    assert image.any(1).all()
    if "suffix" in type(processor).__call__.__code__.co_varnames:
        assert torch.equal(inputs["token_type_ids"].bool(), answered)  # causal there alone
    elif kinds := {"token_type_ids", "mm_token_type_ids"} & inputs.keys():
        assert torch.equal(inputs[kinds.pop()].bool(), image)


@pytest.mark.parametrize("train", [True, False])
def test_a_sample_is_the_same_in_a_batch_and_text_stays_text(processor, samples, train):
    together = batch_of(processor, samples, train)
    for i, sample in enumerate(samples):
        alone = batch_of(processor, [sample], train)
        kept = together["attention_mask"][i].bool()
        for key in alone.keys() & {"input_ids", "labels", "token_type_ids", "mm_token_type_ids"}:
            assert torch.equal(together[key][i][kept], alone[key][0]), (sample.id, key)
    plain = batch_of(processor, [Sample("plain", samples[2].images, "name ?", ("no",))], train)
    for token in set(processor.tokenizer.all_special_ids) - {processor.tokenizer.unk_token_id}:
        assert (alone["input_ids"] == token).sum() == (plain["input_ids"] == token).sum(), token


def test_several_turns_are_refused_where_only_a_suffix_can_be_learned(processor, samples):
    turns = Sample("turns", samples[0].images, "which ?", ("red",), (("name it ?", "yes"),))
    if "suffix" in type(processor).__call__.__code__.co_varnames:
        with pytest.raises(UserError, match="sample 'turns': PaliGemmaProcessor takes one question and one answer"):
            batch_of(processor, [turns], True)
    else:
        labels = batch_of(processor, [turns], True)["labels"][0]
        assert processor.tokenizer.decode(labels[labels != -100]) == "yes red </s>"
