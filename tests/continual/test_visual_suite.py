"""The visual suite of a real language model, on small pictures made here: its tasks, its manifest, its base model's parts."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.word_tokenizer import word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lilora.cli import app
from lilora.continual.collator import Collator
from lilora.continual.instructions import Sample, instruction_data
from lilora.continual.manifest import load_manifest
from lilora.continual.scorers import scorer

EXAMPLES = Path(__file__).parents[2] / "examples" / "real"
MODULES = ("visual", "pictures", "tower", "projector", "tasks", "language")
SIZES = {"train": 12, "test": 12}


@pytest.fixture(scope="module")
def example():
    """The example's modules by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield {name: __import__(name) for name in MODULES}
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def packages(example, tmp_path_factory):
    """What the Debian packages unpack to, with few and small pictures."""
    folder, rng, pictures = tmp_path_factory.mktemp("packages"), np.random.default_rng(0), example["pictures"]
    share = folder / "usr" / "share"
    clothes = share / "datasets" / "fashion-mnist"
    clothes.mkdir(parents=True)
    for split in ("train", "t10k"):
        images, labels = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8), np.arange(20, dtype=np.uint8) % 10
        for name, header, content in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            (clothes / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + content.tobytes()))
    flags = share / "iso-flags-png-320x240"
    flags.mkdir()
    for code in (*pictures.FLAGS, *pictures.OTHER_FLAGS):
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(flags / f"{code}.png")
    stamps = share / "tuxpaint" / "stamps"
    for i in range(40):
        file = stamps / pictures.KINDS[i % len(pictures.KINDS)] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 5, 4), dtype=np.uint8)).save(file)
        if i % 10:  # others have no caption, or a long one
            said = f"A thing{chr(97 + i % 26)}{'s' * (i // 26)}." if i % 9 else "A thing with a long name."
            file.with_suffix(".txt").write_text(f"{said}\nde.utf8=Ein Ding.\n")
    return folder


@pytest.fixture(scope="module")
def data(example, packages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    example["visual"].write_data(folder, packages, 0, SIZES)
    return folder


def test_the_manifest_loads_with_references_that_score_and_match(data, example):
    manifest = load_manifest(EXAMPLES / "visual.yaml", data=data)
    assert {task.name for task in manifest.tasks} == {folder.name for folder in data.iterdir()}
    for task in manifest.tasks:
        for split, size in SIZES.items():
            samples = instruction_data(task, split)
            assert len(samples) == size
            for sample in samples:
                assert scorer(task.scorer)(sample.answers[0], list(sample.answers)) == 1
                assert task.in_format(sample.answers[0], sample.answers), sample.answers
                assert len(sample.images) == (task.name not in example["visual"].TEXT)
                for image in sample.images:
                    assert Image.open(image).size == (example["pictures"].SIZE,) * 2


def test_data_check_finds_nothing_amiss(data):
    result = CliRunner().invoke(app, ["data", "check", str(EXAMPLES / "visual.yaml"), "--data", str(data)])
    assert result.exit_code == 0, result.output


def test_the_same_seed_writes_the_same_samples_with_and_without_packages(data, example, tmp_path):
    example["visual"].write_data(tmp_path, None, 0, SIZES)
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parts[0] for path in written} == {"count", "digit", "word", "capital", "backwards"}
    for path in written:
        assert (tmp_path / path).read_bytes() == (data / path).read_bytes()


def test_the_base_model_is_taught_other_flags_stamps_and_words(example, packages):
    pictures, visual = example["pictures"], example["visual"]
    rng = np.random.default_rng(1)

    def shown(make):
        return {make(rng, True)[1] for _ in range(300)}

    tasks = visual.visual_tasks(packages)
    taught = set().union(*(shown(kind.make) for kind in visual.mix(packages)))
    assert len(shown(tasks["stamp"].make)) == pictures.STAMPS
    for name in ("flag", "stamp", "word"):
        assert not shown(tasks[name].make) & taught
    stamps = {packages / "usr/share/tuxpaint/stamps" / file for file in shown(pictures.any_stamp(packages))}
    assert len(stamps) == 40 - pictures.STAMPS


def test_discs_are_as_many_as_the_answer_says(example):
    pictures, rng = example["pictures"], np.random.default_rng(2)
    for _ in range(40):
        picture, shown = pictures.discs(rng, True)
        number, colour = shown.split()
        area = (np.asarray(picture) == pictures.COLOURS[colour]).all(-1).sum()
        assert 100 < area / pictures.NUMBERS.index(number) < 240


def test_a_probe_finds_what_features_tell_and_nothing_else(example):
    tower, visual, pictures = (example[name] for name in ("tower", "visual", "pictures"))
    task = visual.VisualTask(pictures.discs, "", lambda shown: shown.split()[1])

    def hues(images):  # the mean colour, less the ground's
        return (images - images.amax((2, 3), keepdim=True)).mean((2, 3)).unsqueeze(1)

    def nothing(images):
        return torch.randn(len(images), 1, 4, generator=torch.Generator().manual_seed(0))

    assert tower.probe(hues, task, 0, 120, 60) > 90
    assert tower.probe(nothing, task, 0, 120, 60) < 50


def test_losses_are_those_of_the_assembled_llava(example, tmp_path):
    """As transformers computes them, with the pictures themselves and the collator's prompts."""
    tower, projector, visual = (example[name] for name in ("tower", "projector", "visual"))
    torch.manual_seed(0)
    words = [
        "<|im_start|>",
        "<|im_end|>",
        "user",
        "assistant",
        "Name",
        "it",
        "Describe",
        "the",
        "picture",
        "digit",
        ".",
    ]
    tokenizer = word_tokenizer([*words, *example["pictures"].NUMBERS, "\n"])
    tokenizer.add_special_tokens({"additional_special_tokens": words[:2], "eos_token": "<|im_end|>"})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    vision = tower.make_tower().eval()
    model, processor = projector.assembled(llama, tokenizer, vision)
    mix = projector.Mix(visual.mix(None)[:1], vision, processor, 6, 0, train=True)
    ids, labels = mix.batch([0, 1, 2])
    own = projector.losses(model, ids, labels, mix.features[:3])

    images, names = tower.drawn([visual.mix(None)[0].make], 6, np.random.default_rng([0, 13, True]))
    pixels = processor.image_processor(
        [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images[:3]], return_tensors="pt"
    )
    theirs = model(
        input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids), pixel_values=pixels["pixel_values"]
    )
    torch.testing.assert_close(own.mean(), theirs.loss)
    assert mix.said[0] == (f"the digit {names[0]}", names[0])

    file = tmp_path / "picture.png"
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(file)
    asked = Collator(processor, {"task": 0}, train=False)([("task", Sample("0", (file,), "Name it.", ("",)))])
    assert asked["input_ids"][0].tolist() == mix.prompt("Name it.")

    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    projector.teach(model, mix, 3, batch=2)
    after = model.state_dict()
    assert after.keys() == before.keys()  # what was learned is merged
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("self_attn" in name or "projector" in name for name in changed)
