"""Probes, which are scored and never trained, and scores of all tasks before any training."""

import json

import pytest
import torch
import yaml
from PIL import Image
from support.suite import TEMPLATE
from transformers import AutoModelForImageTextToText, AutoProcessor

from lilora.bank.bank import Bank
from lilora.continual import run as running
from lilora.continual.manifest import load_manifest
from lilora.continual.run_record import train_settings
from lilora.errors import UserError

BRIEF = ["--max-steps", 2, "--save-steps", 9, "--lr", 0.1]


@pytest.fixture
def manifest(suite, tmp_path):
    """The manifest of the suite, in which `name` is a probe."""
    content = yaml.safe_load((suite / "tasks.yaml").read_text())
    content |= {"model": str(suite / "base"), "data": str(suite / "data")}
    content["tasks"][2] |= {"probe": True}
    del content["tasks"][2]["train"]
    path = tmp_path / "tasks.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def answers_in(run, stage, task):
    lines = (run / "predictions" / f"{stage}-{task}.jsonl").read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines]


def answers_of_base(suite, spec):
    """By transformers alone."""
    model = AutoModelForImageTextToText.from_pretrained(suite / "base").eval()
    processor = AutoProcessor.from_pretrained(suite / "base")
    said = []
    for record in json.loads(spec.test.read_text()):
        text = record["conversations"][0]["value"].replace("\n", "") + " :"
        assert TEMPLATE.endswith(" :")
        with Image.open(spec.images / record["image"]) as image:
            inputs = processor(text=[text], images=[image], return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=spec.max_new_tokens, do_sample=False)
        tokens = output[0, inputs["input_ids"].shape[1] :]
        said.append(processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return said


def share_right(run, stage, task):
    lines = [json.loads(line) for line in (run / "predictions" / f"{stage}-{task}.jsonl").read_text().splitlines()]
    return pytest.approx(100 * sum(line["answer"] == line["reference"] for line in lines) / len(lines))


@pytest.mark.parametrize(
    "method", ["lilora", "moelora"]
)  # one that is given the task, one that changes the base at once
def test_a_probe_is_scored_before_and_after_every_task_and_is_part_of_no_metric(
    method, manifest, suite, tmp_path, lilora, train_options, monkeypatch
):
    run, needs_task = tmp_path / "run", method == "lilora"
    command = ["train", manifest, "--out", run, "--method", method, *train_options, *BRIEF]
    command = [part for i, part in enumerate(command) if needs_task or "sub-rank" not in f"{command[i - 1]}{part}"]
    code, out, err = lilora(*command, "--zero-shot", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["matrix"]["tasks"] == ["colour", "count"]
    assert result["zero_shot"].keys() == {"colour", "count", "name"}
    assert {after: set(scores) for after, scores in result["probes"].items()} == {"colour": {"name"}, "count": {"name"}}
    tasks = load_manifest(manifest)
    for spec in (*tasks.tasks, *tasks.probes):
        assert answers_in(run, "before", spec.name) == answers_of_base(suite, spec)
        assert result["zero_shot"][spec.name] == share_right(run, "before", spec.name)
    assert result["probes"]["count"]["name"] == share_right(run, "count", "name")

    assert answers_in(run, "before", "name") != answers_in(run, "count", "name")

    (probe,) = tasks.probes
    prompts = [
        json.dumps({"prompt": "name it ?", "image": str(probe.images / record["image"])})
        for record in json.loads(probe.test.read_text())
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    asked = ["--prompts", tmp_path / "prompts.jsonl", "--task", "count", "--max-new-tokens", 3, "--device", "cpu"]
    code, out, err = lilora("generate", run, *asked)
    assert code == 0, err
    assert [json.loads(line)["answer"] for line in out.splitlines()] == answers_in(run, "count", "name")
    code, out, err = lilora("eval", run, "--tasks", manifest, "--device", "cpu", "--json")
    assert code == 0, err
    assert json.loads(out)["name"] == {
        "score": result["probes"]["count"]["name"],
        "format_share": json.loads(out)["name"]["format_share"],
        "probe": True,
    }

    monkeypatch.setattr(running.ContinualRun, "_reload", pytest.fail)
    monkeypatch.setattr(running, "score_probes", pytest.fail)
    assert lilora(*command, "--zero-shot")[0] == 0, "nothing is left to do"
    code, out, err = lilora("report", run, "--json")
    assert json.loads(out)["runs"][0]["probes"] == result["probes"]
    if needs_task:
        assert lilora("bank", "rm", run, "--task", "count")[0] == 0
        scores = Bank.open(run / "bank").scores
        assert (scores["zero_shot"].keys(), scores["probes"].keys()) == ({"colour", "name"}, {"colour"})


def test_an_interrupted_run_scores_what_is_missing(manifest, suite, tmp_path, lilora, train_options, monkeypatch):
    run = tmp_path / "run"
    command = ["train", manifest, "--out", run, *train_options, *BRIEF, "--method", "lora"]

    def stop(*_):
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(running.ContinualRun, "_train_task", stop)
        assert lilora(*command, "--dtype", "bf16")[0] == 9
    before = Bank.open(run / "bank")
    assert (before.tasks, before.scores["zero_shot"].keys()) == ([], {"name"})
    code, _, err = lilora("report", run)
    assert (code, "holds no scores of a trained task yet" in err) == (2, True), err
    scores = before.scores | {"zero_shot": {"name": 131.0}, "probes": {"colour": {"name": 990.0}}}
    before.set_scores(scores)
    assert train_settings(Bank.open(run / "bank")).dtype == "bf16", "points of CIDEr may be more than 100"
    again = []
    reload = running.ContinualRun._reload
    with monkeypatch.context() as patch:
        patch.setattr(running.ContinualRun, "_reload", lambda *a: (again.append(1), reload(*a)))
        patch.setattr(running.ContinualRun, "_evaluate_probes", stop)
        assert lilora(*command)[0] == 9
    assert again, "the scores of another dtype's model are not this run's"
    bank = Bank.open(run / "bank")
    assert (bank.tasks, bank.scores["probes"]) == (["colour"], {})
    assert lilora(*command)[0] == 0
    assert Bank.open(run / "bank").scores["probes"].keys() == {"colour", "count"}

    content = yaml.safe_load(manifest.read_text())  # one more probe, when the model of the first stage is gone
    content["tasks"].append(content["tasks"][2] | {"name": "later"})
    manifest.write_text(yaml.safe_dump(content))
    code, out, _ = lilora(*command)
    assert code == 0
    assert {after: set(scores) for after, scores in Bank.open(run / "bank").scores["probes"].items()} == {
        "colour": {"name"},
        "count": {"name", "later"},
    }
    (row,) = (line.split() for line in out.splitlines() if line.split()[:1] == ["later"])
    assert row[2] == "n/a"


@pytest.mark.parametrize(
    "edit, sentence",
    [
        (lambda tasks: tasks[2].update(train="name-train.json"), "a probe is never trained; leave out the key train"),
        (lambda tasks: tasks[2].update(learning_rate=0.1), "a probe is never trained; leave out the key learning_rate"),
        (lambda tasks: tasks[2].pop("test"), "a probe wants the key test; add it"),
        (lambda tasks: tasks[0].pop("train"), "a task that is no probe wants the key train; add it"),
        (
            lambda tasks: tasks.__delitem__(slice(2)),
            "all tasks are probes, which are not trained; add one with the key",
        ),
    ],
)
def test_a_wrong_probe_is_one_sentence(edit, sentence, manifest):
    content = yaml.safe_load(manifest.read_text())
    edit(content["tasks"])
    manifest.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=sentence):
        load_manifest(manifest)


def test_an_order_names_tasks_and_no_probes(manifest):
    ordered = load_manifest(manifest, ["count"])
    assert ([task.name for task in ordered.tasks], [task.name for task in ordered.probes]) == (["count"], ["name"])
    with pytest.raises(UserError, match="order: task 'name' is a probe, which is not trained but always scored"):
        load_manifest(manifest, ["count", "name"])
