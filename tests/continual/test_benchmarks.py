"""The manifests of examples/ on tiny files in the published layouts, and `lilora data check`."""

import json
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.benchmark_files import (
    INSTRUCTIONS,
    ONE_WORD,
    image_files,
    instruction_files,
    next_files,
    write,
)
from support.text_encoder import make_encoder

from lilora.bank.bank import Bank
from lilora.continual.classification import LabelledImages
from lilora.continual.data_check import check_data
from lilora.continual.instructions import instruction_data
from lilora.continual.manifest import load_manifest, read_manifest
from lilora.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"
NEXT = {
    **dict.fromkeys(["ArxivQA", "MathQA", "ScienceQA"], "letter"),
    "Grounding": "box",
    **dict.fromkeys(
        ["GeoChat", "IconQA", "ClevrMath", "CodeQA", "ImageNet", "Flickr30k", "DocVQA", "TextVQA", "ChartQA"], "words"
    ),
    **dict.fromkeys(["PathVQA", "WikiQA"], "words"),
}


def script(name, *arguments):
    """Run a script of examples/ as a user does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name, count", [("cvit", 6), ("coin", 8), ("ucit", 6), ("mllm_dcl", 5), ("mllm_acl", 4)])
def test_instructions_are_read_as_they_are_published(name, count, tmp_path):
    instruction_files(tmp_path, name)
    if name == "ucit":
        script("captions_of_coco.py", *(tmp_path / "instructions" / task for task in ("VizWiz", "Flickr30k")))
    manifest = load_manifest(EXAMPLES / f"{name}.yaml", data=tmp_path)
    assert len(manifest.tasks) == count
    assert manifest.image_aspect == "pad"
    assert all(report.problem is None for report in check_data(manifest))
    for spec, (_, _, image, question, answers) in zip(manifest.tasks, INSTRUCTIONS[name], strict=True):
        for split in spec.splits:
            samples = list(instruction_data(spec, split))
            assert [sample.question for sample in samples] == [question] * 2
            assert all(path.is_file() and path.match(image.removeprefix("./")) for s in samples for path in s.images)
            wanted = [
                tuple(a) if isinstance(a, list) and split == "test" else (a if isinstance(a, str) else a[0],)
                for a in answers
            ]
            assert [sample.answers for sample in samples] == wanted
    if name == "mllm_acl":
        assert manifest.tasks[-1].splits == ("train",)
        assert {path.parent.parent.name for s in instruction_data(manifest.tasks[0], "test") for path in s.images} == {
            "OCR_test"
        }


def test_continual_next_is_read(tmp_path):
    next_files(tmp_path, NEXT)
    with pytest.raises(UserError, match=r"task 'CodeQA': scorer_model .*MiniLM-L12-v2 is no folder"):
        load_manifest(EXAMPLES / "continual_next.yaml", data=tmp_path)
    make_encoder(tmp_path / "paraphrase-multilingual-MiniLM-L12-v2", ["forest", "a river"])
    manifest = load_manifest(EXAMPLES / "continual_next.yaml", data=tmp_path)
    assert [task.name for task in manifest.tasks if task.name not in NEXT] == []
    assert len(manifest.tasks) == 15
    for spec in manifest.tasks:
        assert len(instruction_data(spec, "train")) == len(instruction_data(spec, "test")) == 2
        assert spec.judge()(["forest"], [["forest"]]) == (spec.scorer not in ("option_letter", "iou_50"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    image_files(folder)
    script("unpack_images.py", folder)
    return folder


def test_sets_of_images_are_read_as_they_are_published(sets):
    order = "StanfordCars,Food,MNIST,OxfordPet,Flowers,SUN397,Aircraft,Caltech101,DTD,EuroSAT,CIFAR100"
    assert f"--order {order}" in (EXAMPLES / "mtil.yaml").read_text()
    first, second = (load_manifest(EXAMPLES / "mtil.yaml", o, sets).tasks for o in (None, order.split(",")))
    assert len(first) == 11
    assert [task.name for task in first] == sorted((task.name for task in second), key=str.casefold)
    assert {task.shots for task in first} == {5}
    xtail = load_manifest(EXAMPLES / "xtail.yaml", data=sets)
    assert [task.name for task in xtail.tasks] == [task.name for task in first if task.name != "CIFAR100"]
    assert [rival.name for rival in xtail.tasks[3].rivals([])] == [task.name for task in xtail.tasks]
    assert {(task.shots, task.templates) for task in xtail.tasks} == {(16, ("a photo of a {}.",))}
    for manifest in (EXAMPLES / "mtil.yaml", EXAMPLES / "xtail.yaml"):
        assert all(report.problem is None for report in check_data(read_manifest(manifest, data=sets)))
    by_name = {task.name: {split: LabelledImages(task, split) for split in task.splits} for task in first}
    assert by_name["Food"]["train"].classes == ["great white", "other"]
    for split in ("train", "test"):
        food = by_name["Food"][split].samples
        assert [(s.path.parent.name, s.path.name, s.label) for s in food] == [
            ("great_white", f"{split}.jpg", 0),
            ("other", f"{split}.jpg", 1),
        ]
    assert by_name["Aircraft"]["test"].classes == ["707-320"]
    mnist, cifar = by_name["MNIST"]["test"], by_name["CIFAR100"]["test"]
    assert sorted(mnist.classes[sample.label] for sample in mnist) == ["seven", "seven", "zero"]
    digit = np.asarray(Image.open(next(s.path for s in mnist if s.path.stem == "00001")))
    np.testing.assert_array_equal(digit, np.arange(784, 2 * 784).astype(np.uint8).reshape(28, 28))
    assert cifar.classes == ["apple", "aquarium fish"]
    colours = {cifar.classes[s.label]: Image.open(s.path).getpixel((0, 0)) for s in cifar}
    assert colours == {"apple": (0, 0, 0), "aquarium fish": (255, 0, 0)}


def test_captions_and_questions_of_other_splits_are_refused():
    joined = runpy.run_path(str(EXAMPLES / "captions_of_coco.py"))["joined"]
    coco = {"annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]}
    assert joined([{"question_id": 9, "text": "?"}], coco) == [{"question_id": 9, "text": "?", "answers": ["a", "b"]}]
    with pytest.raises(ValueError, match="2 samples and captions of 1 images"):
        joined([{}, {}], coco)


@pytest.mark.parametrize(
    "content, sentence",
    [
        ('{"train": [["a.jpg", 0]], "test": []}', r"is not CoOp's file of splits"),
        ('{"train": [["a.jpg", 0, "a"]]}', r"split.json has no images"),
        (b"\xff\xfe 0", r"cannot be read"),
    ],
)
def test_a_broken_list_of_images_is_named(content, sentence, tmp_path):
    name = "split.json" if isinstance(content, str) else "split.txt"
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    manifest = {"name": "m", "kind": "classification", "tasks": [{"name": "a", "train": name, "test": name}]}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(manifest))
    with pytest.raises(UserError, match=sentence):
        load_manifest(tmp_path / "m.yaml")


# --- lilora data check ---------------------------------------------------------------------------------------------------


@pytest.fixture
def coin(tmp_path):
    instruction_files(tmp_path, "coin")
    return tmp_path


def check(lilora, folder, name="coin"):
    code, out, err = lilora("data", "check", EXAMPLES / f"{name}.yaml", "--data", folder, "--json")
    assert not err
    return code, json.loads(out)


def test_a_complete_folder_is_counted(coin, lilora):
    code, report = check(lilora, coin)
    assert (code, report["complete"], len(report["splits"])) == (0, True, 16)
    for split in report["splits"]:
        assert (split["samples"], split["images"], split["missing_images"], split["problem"]) == (2, 1, 0, None)
    code, out, err = lilora("data", "check", EXAMPLES / "coin.yaml", "--data", coin)
    assert (code, err) == (0, "")
    assert sum(" ok " in line for line in out.splitlines()) == 16


def test_what_is_missing_or_wrong_is_told_task_by_task(coin, lilora):
    tasks = coin / "Instructions_Original"
    (tasks / "VQAv2" / "val.json").unlink()
    (coin / "cl_dataset" / "GQA" / "images" / "1.png").unlink()
    (coin / "cl_dataset" / "OCR-VQA" / "images" / "1.png").write_bytes(b"\x89PNG")
    records = json.loads((tasks / "VizWiz" / "train.json").read_text())
    del records[1]["conversations"][1]
    write(tasks / "VizWiz" / "train.json", records)
    write(tasks / "Grounding" / "test.json", [{"question_id": 1, "text": f"Where?\n{ONE_WORD}", "answer": "left"}])
    code, report = check(lilora, coin)
    problems = {(s["task"], s["split"]): s["problem"] for s in report["splits"] if s["problem"]}
    assert (code, report["complete"]) == (1, False)
    assert problems.keys() == {
        ("VQAv2", "test"),
        ("GQA", "train"),
        ("GQA", "test"),
        ("OCRVQA", "train"),
        ("OCRVQA", "test"),
        ("VizWiz", "train"),
        ("Grounding", "test"),
    }
    states = {(s["task"], s["split"]): s["state"] for s in report["splits"]}
    assert {key for key, state in states.items() if state == "missing"} == {
        ("VQAv2", "test"),
        ("GQA", "train"),
        ("GQA", "test"),
    }
    assert {key for key, state in states.items() if state != "ok"} == problems.keys()
    put = (
        "val.json is missing; put records {id, image, conversations} in JSON or JSON lines there, and its images under"
    )
    assert put in problems["VQAv2", "test"]
    assert "1 of 1 images are missing, the first is" in problems["GQA", "train"]
    assert "1.png cannot be opened" in problems["OCRVQA", "test"]
    assert "record 2, line 1: sample '1' has no answer" in problems["VizWiz", "train"]
    assert "scorer 'iou_50' gives 0 even to the references" in problems["Grounding", "test"]
    code, out, _ = lilora("data", "check", EXAMPLES / "coin.yaml", "--data", coin)
    assert code == 1
    for problem in problems.values():
        assert problem in out
    assert (
        f"7 of 16 splits are not complete under {coin}, which holds Instructions_Original, cl_dataset; how they" in out
    )


def test_class_names_and_the_model_of_a_scorer_may_be_missing(tmp_path, lilora):
    (tmp_path / "images" / "red").mkdir(parents=True)
    (tmp_path / "records.json").write_text('[{"image": "1.png", "conversations": []}]')
    split = {"train": "images", "test": "images"}
    tasks = [{"name": "a", **split, "classes": "names.txt"}, {"name": "b", "train": "c", "test": "d.json"}]
    files = {"train": "records.json", "test": "records.json", "scorer": "similarity", "scorer_model": "model"}
    manifests = {"classification": tasks, "instruction": [{"name": "c", **files}]}
    said = {}
    for kind, content in manifests.items():
        manifest = {"name": "x", "kind": kind, "tasks": content}
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(manifest))
        code, out, err = lilora("data", "check", tmp_path / "tasks.yaml", "--json")
        assert (code, err) == (1, "")
        said |= {(s["task"], s["split"]): (s["state"], s["problem"]) for s in json.loads(out)["splits"]}
    assert [state for state, _ in said.values()] == ["missing"] * 4 + ["wrong", "missing"]
    assert said["a", "train"][1].endswith("names.txt is missing; put its class names there")
    assert "/c is missing; put a folder of images for each class there" in said["b", "train"][1]
    assert "d.json is missing; put a list of {image, label} in JSON" in said["b", "test"][1]
    assert said["c", "test"][1].endswith("/model is missing; put the folder of the scorer's model there")


def test_all_images_are_counted_whatever_the_shots(written):
    assert [report.samples for report in check_data(written(lambda content: content.update(shots=1)))] == [10] * 6


def test_a_folder_that_is_missing_is_said(tmp_path, lilora):
    code, out, _ = lilora("data", "check", EXAMPLES / "xtail.yaml", "--data", tmp_path / "gone")
    assert code == 1
    assert f"20 of 20 splits are not complete under {tmp_path / 'gone'}, which is missing" in out
    code, _, err = lilora("data", "check", tmp_path / "gone.yaml")
    assert (code, "gone.yaml: cannot be read" in err) == (2, True)


def test_a_run_on_published_files_ends_with_the_scores_of_its_scorers(suite, tmp_path, lilora, train_options):
    """A letter, and CIDEr of a whole split; as a user runs it."""
    instruction_files(tmp_path, "cvit")
    options = ["--data", tmp_path, "--model", suite / "base", "--order", "ScienceQA,Flickr30k", "--max-steps", "1"]
    run = tmp_path / "run"
    code, _, err = lilora("train", EXAMPLES / "cvit.yaml", *options, "--out", run, *train_options, "--max-steps", "1")
    assert code == 0, err
    bank = Bank.open(run)
    assert bank.tasks == ["ScienceQA", "Flickr30k"]
    predictions = [json.loads(line) for line in (run / "predictions" / "Flickr30k-Flickr30k.jsonl").open()]
    spec = load_manifest(EXAMPLES / "cvit.yaml", ["Flickr30k"], tmp_path).tasks[0]
    references = [sample.answers for sample in instruction_data(spec, "test")]
    score = 100 * spec.judge()([prediction["answer"] for prediction in predictions], references)
    assert bank.scores["matrix"]["scores"][1][1] == pytest.approx(score)
    shares = bank.scores["matrix"]["format_shares"][1]
    assert all(share is not None for share in shares)


def test_a_run_of_x_tail_takes_images_for_classes_of_all_sets(sets, images, tmp_path, lilora):
    """Of two of its tasks, for whose images the classes of the other eight count too."""
    options = shlex.split(
        "--r 4 --alpha 4 --max-steps 1 --batch-size 2 --gradient-accumulation 1 --device cpu --quiet --json"
    )
    options += ["--data", sets, "--model", images / "base", "--method", "lora", "--out", tmp_path / "run"]
    code, out, err = lilora("train", EXAMPLES / "xtail.yaml", "--order", "MNIST,DTD", *options)
    assert code == 0, err
    assert "Transfer" in json.loads(out)["metrics"]
    assert Bank.open(tmp_path / "run").config["label_space"] == "all"
    (spec,) = load_manifest(EXAMPLES / "xtail.yaml", ["DTD"], sets).tasks
    classes = {name for task in spec.rivals([]) for name in task.class_names()}
    assert {"great white", "707-320", "seven"} <= classes
    said = [json.loads(line)["answer"] for line in (tmp_path / "run" / "predictions" / "MNIST-DTD.jsonl").open()]
    assert len(said) == 2
    assert all(answer.split(" (")[0] in classes for answer in said)
