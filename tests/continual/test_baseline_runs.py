"""Runs of methods with one state or one LoRA on the tiny suite: interrupted anywhere they end with the same bank."""

import json

import pytest

from lilora.bank.bank import Bank
from lilora.cli.options import target_pattern
from lilora.continual.base_model import load_bank
from lilora.continual.evaluate import evaluate
from lilora.continual.manifest import load_manifest
from lilora.continual.recorded import TrainSettings
from lilora.continual.run import ContinualRun
from lilora.errors import UserError
from lilora.methods import METHODS

SETTINGS = {
    "ewc": {"r": 8, "lora_alpha": 16.0, "lora_dropout": 0.1, "penalty": 1e4, "fisher_samples": 6},
    "lwf": {"r": 8, "lora_alpha": 16.0, "lora_dropout": 0.1},
    "olora": {"r": 4, "alpha": 8.0, "dropout": 0.1, "orthogonality": 0.01},
    "moelora": {"r": 8, "alpha": 16.0, "dropout": 0.1, "experts": 4},
    "adalora": {"r": 4, "alpha": 8.0, "dropout": 0.1, "target": 1},
    "xgblora": {"r": 3, "alpha": 8.0, "dropout": 0.1},
    "cia": {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "share": 0.3},
}
NO_TERM = ("moelora", "xgblora", "cia")  # beside the cross-entropy
ONE_STATE = ("olora", "moelora", "adalora")  # the newest serves all tasks
TRAIN = TrainSettings(learning_rate=0.01, max_steps=4, batch_size=4, gradient_accumulation=1)


class Stopped(Exception):
    pass


def learn(suite, folder, method):
    manifest = load_manifest(suite / "tasks.yaml", ["colour", "count"])
    pattern = target_pattern(manifest.model, projector=True, attention=False)
    settings = SETTINGS[method] | {"target_modules": pattern}
    run = ContinualRun.open(folder, manifest, manifest.model, method, settings, TRAIN, "cpu")
    run.train(save_steps=2, bars=False, say=lambda line: None)


def content(folder):
    """All that a bank says of its tasks but the time they took."""
    bank = Bank.open(folder / "bank")
    stored = {task: (bank.task_fingerprint(task), bank.shared_fingerprint(task)) for task in bank.tasks}
    return bank.config, bank.ids, stored, bank.scores["matrix"], bank.scores["functions"]


@pytest.mark.usefixtures("resumed")
@pytest.mark.parametrize("method", SETTINGS)
def test_interrupted_twice_a_run_ends_with_the_same_bank(method, suite, tmp_path, monkeypatch):
    loss, add_task, terms = METHODS[method].loss, Bank.add_task, []

    def recorded(self, inputs, cross_entropy, share):
        outputs = cross_entropy()
        value = loss(self, inputs, lambda: outputs, share)
        terms.append((self.tasks[-1], (value - outputs[0]).item()))
        return value

    def stop_in_the_last_step(self, *arguments):
        if len(terms) == 7:
            raise Stopped
        return recorded(self, *arguments)

    def stop_at_the_second_task(self, name, *arguments, **keywords):
        if name == "count":
            raise Stopped
        add_task(self, name, *arguments, **keywords)

    def interrupted(owner, name, stop):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            with pytest.raises(Stopped):
                learn(suite, tmp_path / "stopped", method)
        assert Bank.open(tmp_path / "stopped" / "bank").tasks == ["colour"]

    interrupted(METHODS[method], "loss", stop_in_the_last_step)
    assert [task for task, _ in terms] == ["colour"] * 4 + ["count"] * 3
    # the method's term acts from the second task on; EWC's is zero until the warm-up has left theta*
    acts = [False] * 4 + ([False, False, True] if method == "ewc" else [method not in NO_TERM] * 3)
    assert [term != 0 for _, term in terms] == ([True] * 7 if method == "adalora" else acts)
    interrupted(Bank, "add_task", stop_at_the_second_task)
    learn(suite, tmp_path / "stopped", method)
    learn(suite, tmp_path / "whole", method)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")

    bank, learner, processor = load_bank(tmp_path / "whole", None, "cpu")
    assert len(bank.describe()["shared"]) == (1 if method in ONE_STATE else 2)
    assert learner.fingerprints(bank.tasks) == bank.scores["functions"]["count"]
    manifest = load_manifest(suite / "tasks.yaml", bank.tasks)
    for result in evaluate(learner, processor, manifest.tasks, 64):
        lines = (tmp_path / "whole" / "predictions" / f"count-{result.task}.jsonl").read_text().splitlines()
        assert result.answers == [json.loads(line) for line in lines]


def test_a_method_that_acts_between_steps_refuses_deepspeed(suite, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"--method cia cannot train with DeepSpeed, because it reads gradients"):
        learn(suite, tmp_path / "run", "cia")
    assert not (tmp_path / "run").exists()
