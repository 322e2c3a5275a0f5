"""What a run's scores depend on: a stage that trains, the manifest they were made with, and nothing that nobody asked for."""

import json
import shutil

import pytest
import yaml
from support.suite import make_suite, train_options, without_image

from lilora.bank.bank import Bank
from lilora.continual.run import ContinualRun


@pytest.fixture
def edited(suite, tmp_path):
    """edited(change): a copy of the suite whose manifest `change` has changed."""

    def edit(change):
        if not (tmp_path / "suite").exists():
            shutil.copytree(suite, tmp_path / "suite")
        path = tmp_path / "suite" / "tasks.yaml"
        content = yaml.safe_load(path.read_text())
        change(content)
        path.write_text(yaml.safe_dump(content))
        return path

    return edit


@pytest.mark.parametrize("method", ["lilora", "lora"])
def test_a_stage_of_one_step_trains(method, suite, tmp_path, lilora):
    options = ["--method", method, *train_options(max_steps=1), "--order", "colour"]
    code, _, err = lilora("train", suite / "tasks.yaml", "--out", tmp_path / "run", *options)
    assert code == 0, err
    own, shared = Bank.open(tmp_path / "run").load_task("colour")
    started_at_zero = {k: t for k, t in (own | shared).items() if k.endswith((".U", ".B0", ".B"))}
    assert started_at_zero
    assert all(t.any() for t in started_at_zero.values())


EDITS = {
    "scorer": lambda task: task.update(scorer="containment"),
    "instruction": lambda task: task.update(instruction="say it"),
    "format": lambda task: task.update(answer_format="red"),
    "limit": lambda task: task.update(max_new_tokens=1),
    "samples": lambda task: task.update(test="count-test.json"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A suite, and a run of its first task."""
    from lilora.cli import app

    folder = tmp_path_factory.mktemp("begun")
    make_suite(folder)
    options = [*train_options(max_steps=1), "--order", "colour"]
    app(["train", str(folder / "tasks.yaml"), "--out", str(folder / "run"), *options], standalone_mode=False)
    return folder


@pytest.mark.parametrize("edit", [None, *EDITS])
def test_a_run_does_not_go_on_with_scores_of_another_manifest(edit, begun, tmp_path, lilora):
    shutil.copytree(begun, tmp_path / "suite")
    path = tmp_path / "suite" / "tasks.yaml"
    content = yaml.safe_load(path.read_text())
    if edit is not None:
        EDITS[edit](content["tasks"][0])
    content["tasks"][1]["max_new_tokens"] = 2  # of a task that is not scored yet
    path.write_text(yaml.safe_dump(content))
    before = Bank.open(tmp_path / "suite" / "run").scores
    options = [*train_options(max_steps=1), "--model", begun / "base", "--order", "colour,count", "--json"]
    code, out, err = lilora("train", path, "--out", tmp_path / "suite" / "run", *options)
    if edit is None:
        assert code == 0, err
        assert len(json.loads(out)["matrix"]["scores"]) == 2
    else:
        assert code == 2
        assert "has scores of task 'colour' by other test samples, another scorer, instruction" in err
        assert Bank.open(tmp_path / "suite" / "run").scores == before


def test_what_has_no_score_yet_may_change(suite, tmp_path, lilora, monkeypatch):
    shutil.copytree(suite, tmp_path / "suite")
    path, train = tmp_path / "suite" / "tasks.yaml", ContinualRun._train_task

    def stopped(self, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return train(self, index, *rest)

    command = ["train", path, "--out", tmp_path / "run", *train_options(max_steps=1)]
    with monkeypatch.context() as patch:
        patch.setattr(ContinualRun, "_train_task", stopped)
        assert lilora(*command)[0] != 0
    content = yaml.safe_load(path.read_text())
    content["tasks"][2]["max_new_tokens"] = 2
    path.write_text(yaml.safe_dump(content))
    code, _, err = lilora(*command)
    assert code == 0, err


TASTES = {
    "repetition_penalty": 1.5,
    "min_new_tokens": 3,
    "sequence_bias": [[[7], 10.0]],
    "return_dict_in_generate": True,
    "bad_words_ids": [[5], [6], [7]],
}


@pytest.mark.parametrize("taste", TASTES)
def test_a_model_s_generation_config_changes_no_answer(taste, begun, tmp_path, lilora):
    model = tmp_path / "base"
    shutil.copytree(begun / "base", model)
    path = model / "generation_config.json"
    given = (
        json.loads(path.read_text()) if path.is_file() else {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    )
    path.write_text(json.dumps(given | {taste: TASTES[taste]}))
    answers = []
    for base in (begun / "base", model):
        out = tmp_path / f"answers-{base.parent.name}"
        words = ["eval", begun / "run", "--tasks", begun / "tasks.yaml", "--model", base, "--device", "cpu"]
        code, _, err = lilora(*words, "--predictions", out)
        assert code == 0, err
        answers.append({file.name: file.read_text() for file in out.iterdir()})
    assert answers[0] == answers[1]


@pytest.mark.filterwarnings("ignore:.*No images:UserWarning")
def test_a_task_without_images_may_be_learned_by_experts_ahead_of_the_text(edited, tmp_path, lilora):
    def text_alone(content):
        for split in ("train", "test"):
            path = tmp_path / "suite" / "data" / f"colour-{split}.json"
            records = json.loads(path.read_text())
            path.write_text(json.dumps([without_image(record) for record in records]))

    path = edited(text_alone)
    options = train_options(max_steps=2)[4:]  # without sizes
    code, out, err = lilora("train", path, "--method", "dac", "--out", tmp_path / "run", *options, "--json")
    assert code == 0, err
    bank = Bank.open(tmp_path / "run")
    assert all(t.isfinite().all() for task in bank.tasks for part in bank.load_task(task) for t in part.values())
    assert len(json.loads(out)["matrix"]["scores"]) == 3


@pytest.mark.usefixtures("drawn")
def test_an_unfinished_run_has_a_report(begun, tmp_path, lilora, monkeypatch):
    shutil.copytree(begun / "run", tmp_path / "run")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ContinualRun, "_train_task", interrupted)
    options = [*train_options(max_steps=1), "--model", begun / "base", "--order", "colour,count,name"]
    assert lilora("train", begun / "tasks.yaml", "--out", tmp_path / "run", *options)[0] != 0
    code, _, err = lilora("report", tmp_path / "run", "--out", tmp_path / "report")
    assert code == 0, err
    assert (tmp_path / "report" / "report.html").is_file()


def test_numbers_that_yaml_takes_for_text_are_numbers():
    from lilora.cli.method_options import method_settings
    from lilora.methods import METHODS

    assert method_settings(METHODS.find("ewc"), None, {}, {"target_modules": "x", "penalty": "1e4"})["penalty"] == 1e4
