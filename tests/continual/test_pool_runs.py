"""Runs of DAC and of methods that choose by the prompt: interrupted anywhere they end with the same bank, and load from it."""

import json

import pytest
import torch

from lilora.bank.bank import Bank
from lilora.cli.options import target_pattern
from lilora.continual.base_model import load_bank
from lilora.continual.evaluate import evaluate
from lilora.continual.manifest import load_manifest
from lilora.continual.run import ContinualRun
from lilora.continual.run_record import TrainSettings
from lilora.methods import METHODS

POOL = {"r": 4, "alpha": 8.0, "cap": 8, "shared": 2}
RUNS = {
    "pclr, paper": ("pclr", POOL, 16),
    "pclr, released": (
        "pclr",
        METHODS["pclr"].presets["released"] | POOL | {"schedule": [(4, 1.0), (4, 1.0), (2, 0.75)], "vocabulary": 9},
        16,
    ),
    "pclr, lwf": ("pclr", POOL | {"groups": [1, 2], "pools": "global", "cap": 4}, 16),
    "dac, paper": ("dac", {"guide": "mean"}, 12),
    "dac, released": ("dac", METHODS["dac"].presets["released"], 12),
    "proglora": ("proglora", {"r": 4, "alpha": 8.0, "dropout": 0.1}, 12),
    "eproj": ("eproj", {"r": 4, "alpha": 8.0, "threshold": 0.5}, 12),
}
TRAIN = TrainSettings(learning_rate=0.01, max_steps=4, batch_size=4, gradient_accumulation=1)


class Stopped(Exception):
    pass


def learn(suite, folder, name):
    method, settings, _ = RUNS[name]
    manifest = load_manifest(suite / "tasks.yaml")
    pattern = target_pattern(manifest.model, projector=True, attention=False)
    run = ContinualRun.open(
        folder, manifest, manifest.model, method, settings | {"target_modules": pattern}, TRAIN, "cpu"
    )
    run.train(save_steps=2, bars=False, say=lambda line: None)


def content(folder):
    bank = Bank.open(folder / "bank")
    stored = {task: bank.shared_fingerprint(task) for task in bank.tasks}
    return bank.config, bank.ids, stored, bank.scores["matrix"], bank.scores["functions"]


@pytest.mark.usefixtures("resumed")
@pytest.mark.parametrize("name", RUNS)
def test_interrupted_in_every_stage_a_run_ends_with_the_same_bank(name, suite, tmp_path, monkeypatch):
    method, _, steps = RUNS[name]
    loss, calls = METHODS[method].loss, []

    def stop_in(step):
        def counted(self, *arguments):
            calls.append(1)
            if len(calls) == step:
                raise Stopped
            return loss(self, *arguments)

        return counted

    # In the second step of a stage there is no checkpoint yet, in the fourth there is one of two steps.
    for step in range(6, steps + 1, 4):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(METHODS[method], "loss", stop_in(4 if step > 6 else 6))
            with pytest.raises(Stopped):
                learn(suite, tmp_path / "stopped", name)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(METHODS[method], "loss", stop_in(-1))
        learn(suite, tmp_path / "whole", name)
    assert len(calls) == steps
    learn(suite, tmp_path / "stopped", name)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")

    bank, learner, processor = load_bank(tmp_path / "whole", None, "cpu")
    assert learner.fingerprints(bank.tasks) == bank.scores["functions"]["name"]
    assert len(bank.describe()["shared"]) == (3 if method == "dac" else 1)
    for result in evaluate(learner, processor, load_manifest(suite / "tasks.yaml").tasks, 5):
        lines = (tmp_path / "whole" / "predictions" / f"name-{result.task}.jsonl").read_text().splitlines()
        assert result.answers == [json.loads(line) for line in lines]


def test_the_memory_of_a_pool_is_flat_and_that_of_lora_per_task_grows(suite, tmp_path, lilora, train_options, drawn):
    """By what a report shows; the pool's only growth is a query per task."""
    sizes = {}
    pool = ["--r", "4", "--set", "cap=8", "--set", "shared=2", "--set", "shared_learns=always"]
    for method, more in (("pclr", pool), ("dirlora", []), ("dac", [])):
        out = tmp_path / method
        lilora("train", suite / "tasks.yaml", "--method", method, "--out", out, *train_options, *more)
        (run,) = json.loads((out / "metrics.json").read_text())["runs"]
        sizes[method] = run["extra"]["sizes"]
        assert (out / "memory.png").stat().st_size > 5000
    _, second, third = sizes["pclr"]["parameters"]
    assert third - second == 32 + 16  # one text and one vision query
    assert sizes["pclr"]["ranks"][1:] == [10, 10]
    one, two, three = sizes["dirlora"]["parameters"]
    assert (two, three) == (2 * one, 3 * one)
    assert sizes["dac"] == {"parameters": [0, 0, 0], "ranks": [0, 0, 0]}


def test_frozen_experts_cost_no_gradient(suite, monkeypatch):
    """While a task is learned the operation is asked for the gradients of its new ranks alone."""
    from lilora.continual.base_model import load_base
    from lilora.continual.kinds import KINDS
    from lilora_kernels import functional

    base, _ = load_base(str(suite / "base"), "fp32", "cpu", KINDS["instruction"])
    pattern = target_pattern(str(suite / "base"), projector=True, attention=False)
    method = METHODS["pclr"](base, {"r": 4, "cap": 12, "shared": 2, "target_modules": pattern})
    ids = torch.tensor([[5, 4, 4, 4, 4, 6, 7], [8, 4, 4, 4, 4, 7, 9]])
    inputs = {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    seen, of_rows = [], functional.of_rows
    for task in ("one", "two"):
        (stage,) = method.stages(task)
        method.begin(stage, lambda samples: iter([inputs]))
        if task == "one":
            method.end(stage, lambda samples: iter([]))
    method.model.train()
    monkeypatch.setattr(functional, "of_rows", lambda *a, **k: seen.append((a[4].shape[0], a[-1])) or of_rows(*a, **k))
    method.model(**inputs)
    assert set(seen) == {(4 + 4, (4, 8))}  # old and new ranks; shared ones come with the first integration
    assert len(seen) == len(method.layers)
