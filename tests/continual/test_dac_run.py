"""`lilora train --method dac` on the tiny LLaVA."""

import json

import pytest

from lilora.bank.bank import Bank
from lilora.continual.base_model import load_bank
from lilora.continual.trainer import TaskTrainer


@pytest.mark.usefixtures("resumed")
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_stopped_in_a_task_the_run_ends_with_the_same_bank(preset, suite, tmp_path, lilora, train_options, monkeypatch):
    step, calls = TaskTrainer.training_step, []

    def stopping(*args, **kwargs):
        calls.append(None)
        if len(calls) == 5:  # the second step of the second task
            raise SystemExit(9)
        return step(*args, **kwargs)

    def train(folder):
        place = ["--out", tmp_path / folder, "--order", "colour,name", "--gradient-checkpointing"]
        dac = ["--method", "dac", "--preset", preset, "--set", "active=5", "--max-steps", "3", "--save-steps", "1"]
        return lilora("train", suite / "tasks.yaml", *place, *train_options, *dac)

    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "training_step", stopping)
        assert train("stopped")[0] == 9
    for folder in ("stopped", "whole"):
        code, _, err = train(folder)
        assert code == 0, err
    whole, stopped = (Bank.open(tmp_path / folder / "bank") for folder in ("whole", "stopped"))
    assert stopped.scores["matrix"] == whole.scores["matrix"]
    for task in ("colour", "name"):
        assert stopped.shared_fingerprint(task) == whole.shared_fingerprint(task)
        for name, counts in whole.load_task(task)[1].items():
            if name.endswith(".counts"):
                assert counts.sum() == 3 * 4 * 5, name  # steps, samples, active experts

    _, method, _ = load_bank(tmp_path / "whole", None, "cpu")
    assert {layer.rank for layer in method.layers.values()} == {0}
    assert method.parameters() == method.ranks() == 0
    code, out, err = lilora(
        "eval", tmp_path / "whole", "--tasks", suite / "tasks.yaml", "--batch-size", 5, "--device", "cpu", "--json"
    )
    assert code == 0, err
    assert [cell["score"] for cell in json.loads(out).values()] == whole.scores["matrix"]["scores"][-1]
