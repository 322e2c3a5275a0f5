"""Among which classes an image is placed: those of its task, of all tasks, or of the tasks trained so far."""

import json
import math
import shlex
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.labelled_images import CLASSES
from support.tiny_clip import Plain

from lilora.bank.bank import Bank
from lilora.continual import clip
from lilora.continual.classification import LabelledImages
from lilora.continual.manifest import load_manifest
from lilora.continual.run_folder import _changes, run_of


def head_by_hand(model, processor, tasks):
    """([C, D], the (task, class) of each row), one prompt after another."""
    rows, names = [], []
    for task in tasks:
        for name in CLASSES[task.name] if task.classes else sorted(CLASSES[task.name]):
            features = [
                F.normalize(
                    model.get_text_features(
                        **processor.tokenizer(t.replace("{}", name), return_tensors="pt")
                    ).pooler_output[0],
                    dim=-1,
                )
                for t in task.templates
            ]
            rows.append(F.normalize(torch.stack(features).mean(0), dim=-1))
            names.append((task.name, name))
    return torch.stack(rows), names


@pytest.mark.parametrize(
    "space, trained, rivals",
    [
        ("task", ["colour"], None),
        ("all", [], ["colour", "count", "size"]),
        ("seen", ["colour", "size"], ["colour", "size"]),
        ("seen", ["colour"], ["colour"]),
        ("seen", [], []),  # before any training: its own
    ],
)
def test_images_are_placed_among_the_classes_of_the_label_space(space, trained, rivals, images, written):
    manifest = written(lambda content: content.update(label_space=space))
    model, processor = clip.load(str(images / "base"), torch.float32)
    model.eval()
    tasks = manifest.tasks
    scores = clip.evaluate(Plain(model, trained), processor, tasks, 7)
    elsewhere = 0
    for spec, result in zip(tasks, scores, strict=True):
        others = [task for task in tasks if task.name == spec.name or task.name in (rivals or [])]
        with torch.no_grad():
            head, names = head_by_hand(model, processor, others)
            data, right = LabelledImages(spec, "test"), 0
            for sample, answer in zip(data, result.answers, strict=True):
                pixels = processor.image_processor([Image.open(sample.path)], return_tensors="pt")["pixel_values"]
                said = names[int((head @ model.get_image_features(pixels).pooler_output[0]).argmax())]
                right += said == (spec.name, data.classes[sample.label])
                elsewhere += said[0] != spec.name
                assert answer["answer"] == (said[1] if said[0] == spec.name else f"{said[1]} ({said[0]})")
        assert result.score == pytest.approx(100 * right / len(data))
    assert (elsewhere > 0) == bool(rivals), "the other tasks' classes matter"


def test_classes_of_two_tasks_are_one_if_their_prompts_are(images, written):
    """A second task of the same images and classes changes nothing, unless other templates tell its classes apart."""

    def twice(**change):
        def edit(content):
            content["tasks"] = [content["tasks"][0], content["tasks"][0] | {"name": "again", **change}]
            content["label_space"] = "all"

        return written(edit).tasks

    model, processor = clip.load(str(images / "base"), torch.float32)
    method = Plain(model.eval())
    alone = clip.evaluate(method, processor, load_manifest(images / "clip.yaml").tasks[:1], 64)[0]
    assert alone.score > 0
    assert [result.score for result in clip.evaluate(method, processor, twice(), 64)] == [alone.score] * 2
    apart = clip.evaluate(method, processor, twice(templates=["photo {}"]), 64)
    said = {answer["answer"] for result in apart for answer in result.answers}
    assert any(name.endswith((" (again)", " (colour)")) for name in said)
    assert sum(result.score for result in apart) < 2 * alone.score


@pytest.mark.parametrize("method", ["lora", "dirlora"])
def test_a_run_with_the_classes_seen_so_far(method, images, written, tmp_path, lilora):
    """Its stages score the tasks trained by then, all anew, as the head grows."""
    written(lambda content: content.update(label_space="seen"))
    options = shlex.split("--r 4 --alpha 4 --lr 0.01 --max-steps 2 --batch-size 5 --device cpu --quiet --json")
    options = ["--out", tmp_path / "run", "--method", method, *options]
    code, out, err = lilora("train", tmp_path / "clip.yaml", *options)
    assert code == 0, err
    run = json.loads(out)
    assert [len(row) for row in run["matrix"]["scores"]] == [1, 2, 3]
    assert not any(cell for row in run["matrix"]["carried_from"] for cell in row)
    assert "AP" in run["metrics"]
    code, out, err = lilora("eval", tmp_path / "run", "--tasks", tmp_path / "clip.yaml", "--device", "cpu", "--json")
    assert code == 0, err
    assert [cell["score"] for cell in json.loads(out).values()] == run["matrix"]["scores"][-1]
    code, _, err = lilora("train", images / "clip.yaml", *options)
    assert code == 2
    assert "its label_space is 'seen' and this one's is 'task'" in err


def test_a_run_among_the_classes_of_all_tasks_does_not_go_on_with_other_tasks(written, tmp_path, lilora):
    written(lambda content: content.update(label_space="all"))
    options = shlex.split("--method dirlora --r 4 --alpha 4 --max-steps 1 --batch-size 5 --device cpu --quiet --json")
    words = ["train", tmp_path / "clip.yaml", "--out", tmp_path / "run", *options, "--order"]
    assert lilora(*words, "colour")[0] == 0
    written(lambda content: content.update(label_space="all", tasks=content["tasks"][:2]))
    code, _, err = lilora(*words, "colour,count")
    assert code == 2
    assert "its classes_of is ['colour', 'count', 'size'] and this one's is ['colour', 'count']" in err
    config = Bank.open(tmp_path / "run").config
    changes = partial(_changes, {key: value for key, value in config.items() if key != "classes_of"}, splits=False)
    assert changes(config) == {}, "of an earlier version"


@pytest.mark.parametrize("trained", ["colour,count", "colour,count,size"])
def test_scores_among_the_classes_of_a_task_leave_with_it(trained, written, tmp_path, lilora):
    """Where its row's model is still there a stage is scored anew, among the classes that are left."""
    written(lambda content: content.update(label_space="seen"))
    options = shlex.split(
        "--method dirlora --r 4 --alpha 4 --lr 0.01 --max-steps 2 --batch-size 5 --device cpu --quiet"
    )
    command = ["train", tmp_path / "clip.yaml", "--out", tmp_path / "run", *options, "--json", "--order"]
    assert lilora(*command, trained)[0] == 0
    code, _, err = lilora("bank", "rm", tmp_path / "run", "--task", "colour")
    later = trained.removeprefix("colour,").replace(",", ", ")
    assert (code, f"the scores after {later} are taken out too" in err) == (0, True)
    run = run_of(Bank.open(tmp_path / "run"))
    assert all(math.isnan(run.matrix.get(*cell)) for cell in run.matrix.missing())
    assert len(run.matrix.missing()) == {"count": 1, "count, size": 3}[later]

    code, out, err = lilora(*command, "count,size")
    assert code == 0, err
    run = json.loads(out)
    assert not any(cell for row in run["matrix"]["carried_from"] for cell in row)
    first, last = run["matrix"]["scores"]
    assert (first == [None]) == (later == "count, size"), "the model of that stage is gone"
    code, out, _ = lilora("eval", tmp_path / "run", "--tasks", tmp_path / "clip.yaml", "--device", "cpu", "--json")
    assert [cell["score"] for cell in json.loads(out).values()] == last


def test_the_newest_task_leaves_the_scores_before_it(written, tmp_path, lilora):
    written(lambda content: content.update(label_space="seen"))
    options = shlex.split(
        "--method dirlora --r 4 --alpha 4 --lr 0.01 --max-steps 2 --batch-size 5 --device cpu --quiet"
    )
    words = ["train", tmp_path / "clip.yaml", "--out", tmp_path / "run", *options, "--json", "--order", "colour,count"]
    before = json.loads(lilora(*words)[1])["matrix"]["scores"]
    code, _, err = lilora("bank", "rm", tmp_path / "run", "--task", "count")
    assert (code, err) == (0, "")
    assert run_of(Bank.open(tmp_path / "run")).matrix.to_dict()["scores"] == before[:1]
