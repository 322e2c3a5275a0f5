"""The `lilora` command on other families than LLaVA, whose processors give other tensors with each batch."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.word_tokenizer import word_tokenizer
from torch import nn
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from lilora.bank.bank import Bank
from lilora.continual.collator import Collator
from lilora.continual.instructions import Sample

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} :"
)
QUESTIONS = {"colour": ("which colour is it ?", ["red", "green"]), "name": ("name it ?", ["yes", "no"])}
SIZES = [(16, 16), (16, 40), (40, 16)]  # of pictures: width, height; several tiles where a family makes tiles
PLAIN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = PLAIN | {"image_size": 16, "patch_size": 8}


def make_tokenizer(*extra):
    words = sorted({word for question, answers in QUESTIONS.values() for word in (*question.split(), *answers)} | {":"})
    return word_tokenizer(words, "<image>", *extra)


def text_config(tokenizer):
    return PLAIN | {
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def llava_next():
    tokenizer = make_tokenizer()
    grid = [[16, 32], [32, 16], [32, 32]]
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=16, image_grid_pinpoints=grid)
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**text_config(tokenizer)),
        image_token_id=4,
        image_grid_pinpoints=grid,
        vision_feature_layer=-1,
    )
    return LlavaNextForConditionalGeneration(config), processor


def idefics3():
    names = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer = make_tokenizer(*names, *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)))
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=TEMPLATE)
    config = Idefics3Config(
        vision_config=VISION,
        text_config=text_config(tokenizer) | {"model_type": "llama"},
        image_token_id=4,
        scale_factor=2,
    )
    return Idefics3ForConditionalGeneration(config), processor


class QwenProcessor:
    """What Qwen2_5_VLProcessor does with pictures, without the video processor, which wants torchvision."""

    chat_template = TEMPLATE

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.images = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
        )

    def apply_chat_template(self, conversations, **options):
        return self.tokenizer.apply_chat_template(conversations, chat_template=TEMPLATE, tokenize=False, **options)

    def __call__(self, text, images, padding_side, add_special_tokens=True, **options):
        pictures, grids = {}, []
        if images is not None:
            pictures = dict(self.images([image for own in images for image in own], return_tensors="pt"))
            grids = (pictures["image_grid_thw"].prod(1) // 4).tolist()
        tokens = iter(grids)
        text = [re.sub("<image>", lambda _: f"<vision>{'<image>' * next(tokens)}</vision>", line) for line in text]
        inputs = self.tokenizer(
            text, padding=True, padding_side=padding_side, add_special_tokens=add_special_tokens, return_tensors="pt"
        )
        kind = (inputs["input_ids"] == 4).long()
        return {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "mm_token_type_ids": kind,
        } | pictures


def qwen2_5_vl():
    tokenizer = make_tokenizer("<video>", "<vision>", "</vision>")
    config = Qwen2_5_VLConfig(
        text_config=text_config(tokenizer) | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=4,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    return Qwen2_5_VLForConditionalGeneration(config), QwenProcessor(tokenizer)


FAMILIES = {made.__name__: made for made in (llava_next, idefics3, qwen2_5_vl)}


def make_data(folder):
    """Samples of both tasks with one picture, in turn of another shape, with two and with none."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for task, (question, answers) in QUESTIONS.items():
        for split in ("train", "test"):
            records = []
            for i in range(8):
                names = [f"{task}-{split}-{i}-{k}.png" for k in range((1, 2, 0, 1)[i % 4])]
                for k, name in enumerate(names):
                    width, height = SIZES[(i + k) % 3]
                    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / "images" / name)
                turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answers[i % 2]}]
                records.append({"id": f"{i}", "image": names, "conversations": turns})
            (folder / f"{task}-{split}.json").write_text(json.dumps(records))
    tasks = [
        {
            "name": task,
            "train": f"{task}-train.json",
            "test": f"{task}-test.json",
            "images": "images",
            "scorer": "exact",
            "max_new_tokens": 3,
        }
        for task in QUESTIONS
    ]
    return {"name": "families", "data": ".", "model": "./base", "tasks": tasks}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path, monkeypatch):
    """A folder with a manifest, its data and a base model of the family."""
    torch.manual_seed(0)
    model, processor = FAMILIES[request.param]()
    for _, parameter in model.named_parameters():
        if parameter.dim() > 1:  # default values are too small for tasks and pictures to show in the answers
            nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path / "base")
    if isinstance(processor, QwenProcessor):
        monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    else:
        processor.save_pretrained(tmp_path / "base")
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(make_data(tmp_path)))
    return SimpleNamespace(name=request.param, folder=tmp_path, model=model, processor=processor)


def test_two_tasks_are_learned_and_answered_in_mixed_batches(family, lilora):
    folder = family.folder
    options = (
        "--r 8 --sub-rank 4 --alpha 16 --dropout 0 --lr 0.02 --max-steps 20 --batch-size 4 --gradient-accumulation 1"
    )
    run = folder / "run"
    code, out, err = lilora("train", folder / "tasks.yaml", "--out", run, "--json", "--device", "cpu", *options.split())
    assert code == 0, err
    trained = json.loads(out)["matrix"]["scores"][1]
    scores = {}
    for size in (1, 5):
        code, out, err = lilora("eval", run, "--tasks", folder / "tasks.yaml", "--batch-size", size, "--json")
        assert code == 0, err
        scores[size] = [entry["score"] for entry in json.loads(out).values()]
    assert scores[1] == scores[5] == trained
    # The adapters have learned what the base model cannot know: each task has its own words.
    lines = [json.loads(line) for line in (run / "predictions" / "colour-colour.jsonl").read_text().splitlines()]
    assert {line["answer"] for line in lines} <= {"red", "green"}, lines
    picture = next((folder / "images").glob("name-test-0-*.png"))
    code, out, err = lilora("generate", run, "--task", "name", "--image", picture, "--prompt", "name it ?")
    assert code == 0, err
    assert out.strip().split()[0] in ("yes", "no")


def test_a_pool_of_ranks_is_trained_and_chooses_for_each_sample(family, lilora):
    folder, run = family.folder, family.folder / "pclr"
    sizes = (
        "--method pclr --r 4 --alpha 64 --set cap=6 --set shared=2 --set integration_epochs=0.5 --lr 0.05 --max-steps 4"
    )
    options = f"{sizes} --batch-size 4 --gradient-accumulation 1 --device cpu --quiet"
    code, _, err = lilora("train", folder / "tasks.yaml", "--out", run, *options.split())
    assert code == 0, err
    assert Bank.open(run / "bank").describe()["tasks"][1]["info"]["losses"].keys() == {"integrate", "learn"}
    answers = {}
    for size in (1, 5):
        command = (
            "eval",
            run,
            "--tasks",
            folder / "tasks.yaml",
            "--batch-size",
            size,
            "--predictions",
            folder / f"{size}",
        )
        code, _, err = lilora(*command, "--json")
        assert code == 0, err
        answers[size] = [file.read_text() for file in sorted((folder / f"{size}").iterdir())]
    assert answers[1] == answers[5]
    assert len(answers[1]) == 2


def test_a_training_batch_is_its_samples_one_by_one(family):
    """Padding, packed pictures and tiles of other samples do not reach a sample's loss."""
    model = family.model.double().eval()
    collator = Collator(family.processor, {"colour": 0}, train=True)
    images = sorted((family.folder / "images").glob("colour-train-*.png"))
    shapes = [(), (images[0],), (images[1], images[2])]
    samples = [Sample(str(i), own, "which colour is it ?", ("red",)) for i, own in enumerate(shapes)]

    def loss(batch):
        inputs = collator([("colour", sample) for sample in batch])
        inputs.pop("task_ids")
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        return model(**inputs).loss

    with torch.no_grad():
        together, alone = loss(samples), torch.stack([loss([sample]) for sample in samples])
    torch.testing.assert_close(together, alone.mean(), rtol=1e-6, atol=0)
    assert (alone - alone[0]).abs()[1:].min() > 1e-4  # the pictures show
