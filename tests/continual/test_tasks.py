import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lilora.continual.tasks import Collator, InstructionDataset, Sample, load_manifest
from lilora.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def suite(tmp_path):
    """A manifest file of two tasks, one with images and one without, and its content."""
    images = tmp_path / "data" / "pictures"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(images / f"{i}.png")
    seen = [
        {"id": i, "image": f"{i}.png", "conversations": turns("<image>\nWhat is it?", f"thing {i}")} for i in range(4)
    ]
    text = [{"id": "t", "conversations": turns("2 + 2?", "four")}]
    for name, records in (("seen", seen), ("text", text)):
        for split in ("train", "test"):
            (tmp_path / "data" / f"{name}-{split}.json").write_text(json.dumps(records))
    content = {
        "name": "small",
        "data": "data",
        "model": "./base",
        "tasks": [
            {
                "name": "seen",
                "train": "seen-train.json",
                "test": "seen-test.json",
                "images": "pictures",
                "scorer": "exact",
                "instruction": "Answer in two words.",
                "answer_format": r"\w+ \w+",
            },
            {"name": "text", "train": "text-train.json", "test": "text-test.json", "scorer": "containment"},
        ],
    }
    path = tmp_path / "tasks.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, content


def edited(suite, edit):
    path, content = suite
    edit(content)
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_manifest_resolves_paths_and_keeps_the_order_asked_for(suite):
    path, _ = suite
    manifest = load_manifest(path)
    assert [t.name for t in manifest.tasks] == ["seen", "text"]
    assert manifest.data == path.parent / "data"
    assert manifest.model == str(path.parent / "base")
    assert manifest.tasks[0].images == path.parent / "data" / "pictures"
    assert [t.name for t in load_manifest(path, order=["text", "seen"]).tasks] == ["text", "seen"]
    assert [t.name for t in load_manifest(path, order=["text"]).tasks] == ["text"]


def test_a_model_id_stays_as_it_is(suite):
    path = edited(suite, lambda m: m.update(model="llava-hf/llava-1.5-7b-hf"))
    assert load_manifest(path).model == "llava-hf/llava-1.5-7b-hf"


def test_data_replaces_the_folder_of_the_manifest(suite, monkeypatch):
    path = edited(suite, lambda m: m.update(data="elsewhere"))
    with pytest.raises(UserError, match=r"elsewhere.seen-train\.json cannot be read .*--data"):
        load_manifest(path)
    monkeypatch.chdir(path.parent)
    assert load_manifest(path, data="data").tasks[0].train == path.parent / "data" / "seen-train.json"


def first(**change):
    return lambda m: m["tasks"][0].update(change)


def misspelt(manifest):
    task = manifest["tasks"][0]
    task["scorrer"] = task.pop("scorer")


@pytest.mark.parametrize(
    "edit, sentence",
    [
        (
            misspelt,
            "key 'scorrer' of task number 1 is unknown; did you mean 'scorer'?",
        ),
        (first(zzz=1), "key 'zzz' of task number 1 is unknown; known keys are name, train"),
        (lambda m: m.update(taskz=[]), "key 'taskz' is unknown; did you mean 'tasks'?"),
        (lambda m: m.pop("name"), "key 'name' is missing; add it."),
        (lambda m: m["tasks"][1].pop("test"), "key 'test' of task number 2 is missing; add it."),
        (lambda m: m.update(tasks=[]), "key 'tasks' is wrong: list should have at least 1 item"),
        (lambda m: m.update(tasks=3), "key 'tasks' is wrong: input should be a valid list"),
        (lambda m: m.update(tasks=[3]), "the manifest of task number 1 is wrong: it must be a mapping"),
        (first(max_new_tokens=0), "key 'max_new_tokens' of task number 1 is wrong: input should be greater than 0"),
        (first(answer_format="("), "'answer_format' of task number 1 is wrong: '(' is not a regular expression"),
        (first(name="text"), "two tasks are called 'text'"),
        (first(name="TEXT"), "two tasks are called 'text' (case is ignored)"),
        (first(name="a.b"), "task name 'a.b' is not allowed"),
        (first(name="keys"), "task name 'keys' is reserved"),
        (first(scorer="bleu"), "task 'seen': scorer 'bleu' is unknown; choose one of exact"),
        (first(train="gone.json"), "gone.json cannot be read (No such file or directory)"),
        (first(images="gone"), "0.png is missing; add it or pass its folder with --data."),
    ],
)
def test_a_wrong_manifest_is_one_sentence(suite, edit, sentence):
    path = edited(suite, edit)
    with pytest.raises(UserError) as error:
        load_manifest(path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "just words", "\x00"])
def test_a_file_that_is_no_manifest_is_named(tmp_path, text):
    (tmp_path / "tasks.yaml").write_text(text)
    with pytest.raises(UserError, match=r"tasks\.yaml: "):
        load_manifest(tmp_path / "tasks.yaml")


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_manifest(tmp_path / "none.yaml")


@pytest.mark.parametrize("order", [["seen", "gone"], ["seen", "seen"], []])
def test_a_wrong_order_is_refused(suite, order):
    with pytest.raises(UserError, match="order: "):
        load_manifest(suite[0], order=order)


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("[]", "has no samples"),
        ("[{", "is not a list of LLaVA instruction records"),
        ("{}", "is not a list of LLaVA instruction records"),
        ('[{"id": 1}]', r"0.conversations: Field required"),
        ('[{"id": 1, "conversations": []}]', "sample '1' has no human turn"),
        (
            '[{"id": 1, "conversations": [{"from": "human", "value": "x"}]}]',
            "sample '1' has no gpt turn and no answers",
        ),
    ],
)
def test_a_broken_data_file_is_named(suite, content, sentence):
    path, _ = suite
    (path.parent / "data" / "text-test.json").write_text(content)
    with pytest.raises(UserError, match=r"task 'text': .*text-test\.json") as error:
        load_manifest(path)
    assert sentence in str(error.value)


@pytest.mark.parametrize("keep", [0, 30, 60])
def test_a_broken_image_is_named(suite, keep):
    path, _ = suite
    image = path.parent / "data" / "pictures" / "2.png"
    image.write_bytes(image.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"image .*2\.png cannot be opened"):
        load_manifest(path)


def test_samples_hold_question_instruction_images_and_references(suite):
    path, _ = suite
    records = [
        {"id": "a", "image": ["0.png", "1.png"], "conversations": turns("<image><image>\nSame?", "no")},
        {"id": 7, "conversations": turns("x", "two"), "answers": ["one", "two", "two"]},
        {"id": 8, "conversations": turns("x", "three"), "answers": ["one"]},
        {"id": 9, "conversations": turns("x", "y")[:1], "answers": ["one", "two"]},
        {"id": 10, "conversations": [*turns("first", "1st"), *turns("second", "2nd")]},
    ]
    (path.parent / "data" / "seen-test.json").write_text(json.dumps(records))
    task = load_manifest(path).tasks[0]
    samples = list(InstructionDataset(task, "test"))
    assert samples[0].images == (task.images / "0.png", task.images / "1.png")
    assert samples[0].question == "Same?\nAnswer in two words."
    assert [s.answers for s in samples] == [("no",), ("two", "one", "two"), ("three", "one"), ("one", "two"), ("1st",)]
    assert samples[4].question.startswith("first\n")
    assert [s.id for s in samples] == ["a", "7", "8", "9", "10"]


@pytest.mark.parametrize("name", ["cvit", "coin", "continual_next", "ucit"])
def test_a_ready_manifest_names_the_first_missing_file(name, tmp_path):
    with pytest.raises(UserError) as error:
        load_manifest(EXAMPLES / f"{name}.yaml", data=tmp_path)
    first_task = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["tasks"][0]
    assert str(tmp_path / first_task["train"]) in str(error.value)
    assert "--data" in str(error.value)


@pytest.mark.parametrize("name, count", [("cvit", 6), ("coin", 8), ("continual_next", 15), ("ucit", 6)])
def test_a_ready_manifest_runs_once_its_data_is_there(name, count, tmp_path):
    content = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    for task in content["tasks"]:
        for split in ("train", "test"):
            file = tmp_path / task[split]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps([{"id": 0, "conversations": turns("?", "!")}]))
    manifest = load_manifest(EXAMPLES / f"{name}.yaml", data=tmp_path)
    assert len(manifest.tasks) == count


@pytest.fixture
def processor(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "digits")
    from base import make_processor
    from scenes import TASKS, pools

    return make_processor(pools()[0], TASKS.values())


@pytest.fixture
def batch(suite):
    """Samples with one image, with none, and with two."""
    images = suite[0].parent / "data" / "pictures"
    return [
        ("b", Sample("0", (images / "0.png",), "list digits", ("seven two", "x"))),
        ("a", Sample("1", (), "spell 7", ("seven",))),
        ("b", Sample("2", (images / "1.png", images / "2.png"), "list inks", ("red",))),
    ]


def test_a_training_batch_teaches_the_answer_alone(processor, batch):
    tokenizer = processor.tokenizer
    inputs = Collator(processor, {"a": 0, "b": 5}, train=True)(batch)
    rows = {key: inputs[key].tolist() for key in ("input_ids", "attention_mask", "labels")}
    for (_, sample), ids, mask, labels in zip(batch, *rows.values(), strict=True):
        length = sum(mask)
        assert mask == [1] * length + [0] * (len(mask) - length)
        assert all(i == tokenizer.pad_token_id for i in ids[length:])
        answer = [*tokenizer(sample.answers[0])["input_ids"], tokenizer.eos_token_id]
        assert labels == [-100] * (length - len(answer)) + answer + [-100] * (len(ids) - length)
        assert ids[length - len(answer) : length] == answer
        assert ids.count(processor.image_token_id) == 16 * len(sample.images)
    assert inputs["task_ids"].tolist() == [5, 0, 5]
    assert inputs["task_ids"].dtype == torch.int32
    assert inputs["pixel_values"].shape == (3, 3, 32, 32)


def test_a_prompt_is_the_same_in_training_and_generation(processor, batch):
    train = Collator(processor, {"a": 0, "b": 1}, train=True)(batch)
    test = Collator(processor, {"a": 0, "b": 1}, train=False)(batch)
    assert "labels" not in test
    assert torch.equal(train["pixel_values"], test["pixel_values"])
    for i in range(len(batch)):
        prompt = test["input_ids"][i][test["attention_mask"][i].bool()]
        assert test["attention_mask"][i, -1] == 1  # padded on the left
        assert train["input_ids"][i, : len(prompt)].tolist() == prompt.tolist()
        assert (train["labels"][i, : len(prompt)] == -100).all()
        text = processor.tokenizer.decode(prompt)
        assert text.endswith(f"{batch[i][1].question} assistant :")


def test_text_alone_makes_a_batch_without_pixels(processor, batch):
    inputs = Collator(processor, {"a": 0}, train=True)([batch[1]])
    assert set(inputs) == {"input_ids", "attention_mask", "labels", "task_ids"}


def test_marks_of_the_modality_grow_with_the_answers(processor, batch, monkeypatch):
    class Marked(type(processor)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, return_mm_token_type_ids=True, **kwargs)

    monkeypatch.setattr(processor, "__class__", Marked)
    inputs = Collator(processor, {"a": 0, "b": 1}, train=True)(batch)
    expected = (inputs["input_ids"] == processor.image_token_id).long()
    assert torch.equal(inputs["mm_token_type_ids"], expected)


def test_a_processor_without_a_chat_template_is_refused(processor):
    processor.chat_template = None
    with pytest.raises(UserError, match="LlavaProcessor has no chat template"):
        Collator(processor, {}, train=True)


def test_an_image_that_broke_later_is_named(processor, batch):
    batch[0][1].images[0].write_bytes(b"")
    with pytest.raises(UserError, match=r"image .*0\.png cannot be opened"):
        Collator(processor, {"a": 0, "b": 1}, train=True)(batch)
