"""Samples held out of the training, or given as validation samples: which they are, and runs that leave the test splits alone."""

import json

import pytest
import yaml

from lilora.bank.bank import Bank
from lilora.continual.classification import LabelledImages
from lilora.continual.instructions import instruction_data
from lilora.continual.kinds import KINDS
from lilora.continual.manifest import load_manifest
from lilora.continual.task_sequence import held_out
from lilora.errors import UserError


@pytest.mark.parametrize("samples, held", [(2, 1), (5, 1), (6, 2), (2400, 480), (2501, 500), (100_000, 500)])
def test_a_fifth_is_held_out_and_at_most_500(samples, held):
    numbers = held_out(samples)
    assert numbers == held_out(samples)
    assert len(set(numbers)) == held
    assert 0 <= min(numbers) <= max(numbers) < samples
    assert held < 400 or abs(sum(numbers) / held / samples - 0.5) < 0.1, "spread over the file"


@pytest.fixture
def changed(suite, tmp_path):
    """Write the manifest of the suite, whose test files are missing, with other changes of its first task."""

    def write(**change):
        content = yaml.safe_load((suite / "tasks.yaml").read_text())
        content |= {"data": str(suite / "data"), "model": str(suite / "base")}
        for task in content["tasks"]:
            task["test"] = "missing.json"
        content["tasks"][0] |= change
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path / "tasks.yaml"

    return write


def test_instructions_are_trained_on_or_scored_and_never_both(changed, suite):
    manifest = load_manifest(changed(), validate=True)
    assert manifest.scored_on == "validation"
    for task in manifest.tasks:
        ids = {split: [sample.id for sample in instruction_data(task, split)] for split in ("train", "test")}
        assert (len(ids["train"]), len(ids["test"])) == (9, 3)
        assert sorted(ids["train"] + ids["test"], key=int) == [str(i) for i in range(12)]
        assert ids["test"] == [instruction_data(task, "test")[i].id for i in range(3)] == list(map(str, held_out(12)))
        samples, _ = KINDS["instruction"].training_data([task], _processor(suite))
        assert [samples[i][1].id for i in range(len(samples))] == ids["train"]


def _processor(suite):
    return KINDS["instruction"].load(str(suite / "base"), "auto")[1]


def test_samples_of_the_key_validation_are_scored_instead(changed):
    manifest = load_manifest(changed(validation="colour-test.json", test_images="elsewhere"), validate=True)
    first = manifest.tasks[0]
    assert len(instruction_data(first, "train")) == len(instruction_data(first, "test")) == 12
    assert "colour-test-0.png" in str(instruction_data(first, "test")[0].images[0])
    with pytest.raises(UserError, match="a task with validation wants the key scorer"):
        load_manifest(changed(validation="colour-test.json", scorer=None, test=None))


def test_probes_are_left_out_unless_they_have_validation_samples(changed):
    change = {"probe": True, "train": None, "test": "missing.json"}
    assert not load_manifest(changed(**change), validate=True).probes
    (probe,) = load_manifest(changed(**change, validation="colour-test.json"), validate=True).probes
    assert len(instruction_data(probe, "test")) == 12


def test_one_sample_cannot_be_held_out(changed, suite, tmp_path):
    (record, *_) = json.loads((suite / "data" / "colour-train.json").read_text())
    (tmp_path / "one.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match="has 1 sample, and one to train on and one to score are wanted"):
        load_manifest(changed(train=str(tmp_path / "one.json")), validate=True)


def test_classes_are_trained_on_or_scored(images, written, tmp_path):
    """In folders, in lists, and in CoOp's files of splits; of few shots those that are left are trained on."""
    data = images / "data"
    files = [f"colour/train/{name}/{i}.png" for i, name in ((0, "red"), (1, "green"), (2, "blue"), (3, "red"))]
    rows = [[file, 0, file.split("/")[2]] for file in files]
    coop = {"train": rows[:3], "val": rows[3:], "test": []}
    (tmp_path / "coop.json").write_text(json.dumps(coop))
    for validation in (None, str(tmp_path / "coop.json")):

        def change(content, validation=validation):
            content["label_space"] = "all"
            content["tasks"][0]["test"] = content["tasks"][1]["test"] = "missing.json"
            content["tasks"][1]["shots"] = 3
            coop_task = {"name": "coop", "test": "missing.json", "train": str(tmp_path / "coop.json")}
            content["tasks"][2] = coop_task | ({"validation": validation} if validation else {})

        manifest = written(change, validate=True)
        found = {}
        for task in manifest.tasks:
            parts = {split: LabelledImages(task, split) for split in ("train", "test")}
            found[task.name] = [[s.path.relative_to(data) for s in part.samples] for part in parts.values()]
            assert not set.intersection(*map(set, found[task.name]))
            assert [s.index for s in parts["test"].samples] == list(range(len(parts["test"])))
            assert task.class_names() == next(r for r in task.rivals([]) if r.name == task.name).class_names()
        assert [len(part) for part in found["colour"]] == [8, 2]
        assert [len(part) for part in found["count"]] == [4, 2], "of three shots of two classes"
        wanted = [files[:3], files[3:]] if validation else None
        assert wanted is None or [list(map(str, part)) for part in found["coop"]] == wanted
        assert validation or [len(part) for part in found["coop"]] == [2, 1]


def test_a_run_that_leaves_the_test_splits_alone(changed, suite, tmp_path, lilora, train_options, reported):
    out = tmp_path / "run"
    words = ["train", changed(), "--order", "colour", "--method", "lora", *train_options, "--max-steps", "1"]
    code, said, err = lilora(*words, "--out", out, "--validate")
    assert code == 0, err
    assert "scored on validation samples, not on the test splits" in said
    assert "scored on validation samples" in (out / "report.html").read_text()
    assert "They are scored on validation samples" in (out / "bank" / "README.md").read_text()
    assert "validate: true" in (out / "run.yaml").read_text()
    answers = [json.loads(line) for line in (out / "predictions" / "colour-colour.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == list(map(str, held_out(12)))
    assert Bank.open(out).config["scored_on"] == "validation"

    content = ["train", suite / "tasks.yaml", *words[2:]]
    code, _, err = lilora(*content, "--out", out)
    assert code == 2
    assert "its scored_on is 'validation' and this one's is 'test'" in err
    code, _, err = lilora(*content, "--out", tmp_path / "other", "--seed", "1")
    assert code == 0, err
    code, _, err = lilora("report", out, tmp_path / "other", "--out", tmp_path / "both")
    assert code == 2
    assert "one was scored on validation samples (--validate) and one on the test splits" in err
