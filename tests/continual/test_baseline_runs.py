"""Runs of methods with one state or one LoRA on the tiny suite: interrupted anywhere they end with the same bank."""

import json
from collections import Counter
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import yaml

from lilora.bank.bank import Bank
from lilora.cli.options import target_pattern
from lilora.continual.base_model import load_bank
from lilora.continual.evaluate import evaluate
from lilora.continual.manifest import load_manifest
from lilora.continual.run import ContinualRun
from lilora.continual.run_folder import remove_task
from lilora.continual.run_record import TrainSettings
from lilora.continual.trainer import StageData
from lilora.errors import UserError
from lilora.methods import METHODS

LORA = {"r": 8, "lora_alpha": 16.0, "lora_dropout": 0.1}
SETTINGS = {
    "ewc": LORA | {"penalty": 1e4, "fisher_samples": 6},
    "lwf": LORA,
    "olora": {"r": 4, "alpha": 8.0, "dropout": 0.1, "orthogonality": 0.01},
    "moelora": {"r": 8, "alpha": 16.0, "dropout": 0.1, "experts": 4},
    "sefe": {"r": 4, "alpha": 8.0, "dropout": 0.1},
    "slao": LORA,
    "clora": LORA,
    "replay": LORA | {"memory": 5, "share": 0.5},
    "joint": LORA,
    "sdlora": {"r": 4, "alpha": 8.0, "dropout": 0.1},
    "loda": {"r": 2, "alpha": 4.0, "dropout": 0.1, "samples": 6, "lookahead": 0.0},
    "adalora": {"r": 4, "alpha": 8.0, "dropout": 0.1, "target": 1},
    "xgblora": {"r": 3, "alpha": 8.0, "dropout": 0.1},
    "cia": {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "share": 0.3},
    "ortholora": LORA,
}
RESUMED = [method for method in SETTINGS if method not in ("joint", "ortholora")]
TRAIN = TrainSettings(learning_rate=0.01, max_steps=4, batch_size=4, gradient_accumulation=1)


class Stopped(Exception):
    pass


@cache
def pattern_for(model):
    return target_pattern(model, projector=True, attention=False)


def learn(suite, folder, method, tasks=("colour", "count")):
    manifest = load_manifest(suite / "tasks.yaml", list(tasks))
    settings = SETTINGS[method] | {"target_modules": pattern_for(manifest.model)}
    run = ContinualRun.open(folder, manifest, manifest.model, method, settings, TRAIN, "cpu")
    run.train(save_steps=2, bars=False, say=lambda line: None)


def content(folder):
    """All that a bank says of its tasks but the time they took."""
    bank = Bank.open(folder / "bank")
    stored = {task: (bank.task_fingerprint(task), bank.shared_fingerprint(task)) for task in bank.tasks}
    return bank.config, bank.ids, stored, bank.scores["matrix"], bank.scores["functions"]


@pytest.mark.usefixtures("resumed")
@pytest.mark.parametrize("method", RESUMED)
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
    # the method's term acts from the second task on; of some it is zero until the warm-up has left the task's start
    first = {"lwf": 0, "olora": 0, "ewc": 2, "sefe": 2, "clora": 2}.get(method, 3)
    acts = [False] * 4 + [step >= first for step in range(3)]
    assert [term != 0 for _, term in terms] == ([True] * 7 if method == "adalora" else acts)
    interrupted(Bank, "add_task", stop_at_the_second_task)
    learn(suite, tmp_path / "stopped", method)
    learn(suite, tmp_path / "whole", method)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")

    bank, learner, processor = load_bank(tmp_path / "whole", None, "cpu")
    assert len(bank.describe()["shared"]) == (1 if METHODS[method].one_state else 2)  # the newest serves all
    assert learner.fingerprints(bank.tasks) == bank.scores["functions"]["count"]
    manifest = load_manifest(suite / "tasks.yaml", bank.tasks)
    for result in evaluate(learner, processor, manifest.tasks, 64):
        lines = (tmp_path / "whole" / "predictions" / f"count-{result.task}.jsonl").read_text().splitlines()
        assert result.answers == [json.loads(line) for line in lines]


def batches_of(suite, folder, method, monkeypatch, stop=None, **options):
    """The samples of each batch of a run as ({task: count}, images), in order; the run ends before batch `stop`.

    A stage of four steps makes five batches: one is made ahead.
    """
    batches, collate = [], StageData.collate

    def counted(self, batch, **more):
        if len(batches) == stop:
            raise Stopped
        counts = Counter(self.samples.parts[number].spec.name for number, _ in batch)
        batches.append((dict(counts), sorted(str(sample.images[0].name) for _, sample in batch)))
        return collate(self, batch, **more)

    with monkeypatch.context() as patch:
        patch.setattr(StageData, "collate", counted)
        if method == "replay":
            patch.setattr(ContinualRun, "_evaluate", lambda *_: False)
        with pytest.raises(Stopped) if stop else nullcontext():
            learn(suite, folder, method, **options)
    return batches


@pytest.mark.usefixtures("resumed")
def test_replay_draws_half_of_every_batch_from_what_it_stored_of_earlier_tasks(suite, tmp_path, monkeypatch):
    whole = batches_of(suite, tmp_path / "whole", "replay", monkeypatch, tasks=("colour", "count", "name"))
    assert [counts for counts, _ in whole[:10]] == [{"colour": 4}] * 5 + [{"count": 2, "colour": 2}] * 5
    assert all(counts["name"] == 2 and sum(counts.values()) == 4 for counts, _ in whole[10:])
    again = {name for _, names in whole[5:] for name in names if name.startswith("colour")}
    assert len(again) == 5
    fresh = [name for _, names in whole[5:10] for name in names if name.startswith("count")]
    assert len(set(fresh)) == 10  # an epoch takes each sample once
    assert batches_of(suite, tmp_path / "run", "replay", monkeypatch, stop=8) == whole[:8]
    rest = batches_of(suite, tmp_path / "run", "replay", monkeypatch)
    assert rest == whole[7:10]  # after the checkpoint of two steps


def test_joint_trains_once_on_the_shuffled_union_and_every_task_is_that_state(suite, tmp_path, monkeypatch):
    seen = batches_of(suite, tmp_path / "run", "joint", monkeypatch)
    assert len(seen) == 9  # 4 steps for each task, and the one ahead
    assert sum((Counter(counts) for counts, _ in seen[:6]), Counter()) == {"colour": 12, "count": 12}
    assert any(len(counts) == 2 for counts, _ in seen)
    bank = Bank.open(tmp_path / "run" / "bank")
    assert (bank.tasks, len(bank.describe()["shared"])) == (["colour", "count"], 1)
    assert [task["info"].get("steps") for task in bank.describe()["tasks"]] == [8, None]
    assert bank.scores["matrix"]["carried_from"] == [[None], ["colour", None]]
    for tasks in (("colour", "count", "name"), ("colour",)):
        with pytest.raises(UserError, match=r"holds another run: its tasks is \['colour', 'count'\] and this one's is"):
            learn(suite, tmp_path / "run", "joint", tasks)
    with pytest.raises(UserError, match="joint keeps all tasks in one state"):
        remove_task(bank, "count")


def test_ortholora_is_told_the_task_of_every_sample_that_it_trains_on(suite, tmp_path, monkeypatch):
    told, loss = [], METHODS["ortholora"].loss

    def recorded(self, inputs, *more):
        told.append(inputs["task_ids"].tolist())
        return loss(self, inputs, *more)

    monkeypatch.setattr(METHODS["ortholora"], "loss", recorded)
    seen = batches_of(suite, tmp_path / "run", "ortholora", monkeypatch)[:8]
    assert [Counter(("colour", "count")[i] for i in ids) for ids in told] == [Counter(counts) for counts, _ in seen]
    assert any(len(counts) == 2 for counts, _ in seen)
    assert Bank.open(tmp_path / "run" / "bank").tasks == ["colour", "count"]


def test_joint_refuses_learning_rates_that_differ_between_tasks(suite, tmp_path, lilora):
    manifest = yaml.safe_load((suite / "tasks.yaml").read_text())
    manifest |= {"model": str(suite / "base"), "data": str(suite / "data"), "learning_rate": 2e-4}
    manifest["tasks"][1]["learning_rate"] = {"joint": 1e-3}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(manifest))
    code, _, err = lilora("train", tmp_path / "tasks.yaml", "--method", "joint", "--out", tmp_path / "run")
    assert (code, "has learning rates from 0.0002 to 0.001 for them; give one with --lr" in err) == (2, True), err
    assert not (tmp_path / "run").exists()


def test_zero_shot_trains_nothing_and_evaluates_every_task_once(suite, tmp_path, lilora, train_options):
    command = ["train", suite / "tasks.yaml", "--out", tmp_path / "run", "--method", "zero-shot", *train_options]
    code, out, error = lilora(*command, "--json")
    assert code == 0, error
    run = json.loads(out)
    assert run["matrix"]["carried_from"] == [[None], ["colour", None], ["colour", "count", None]]
    assert len(list((tmp_path / "run" / "predictions").iterdir())) == 3
    assert run["params_per_task"] == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    code, out, error = lilora("eval", tmp_path / "run", "--tasks", suite / "tasks.yaml", "--device", "cpu", "--json")
    assert code == 0, error
    assert [cell["score"] for cell in json.loads(out).values()] == run["matrix"]["scores"][-1]
    code, _, error = lilora("bank", "merge", tmp_path / "run", "--out", tmp_path / "merged")
    assert (code, "nothing is trained; use the base model itself" in error) == (2, True)


def test_a_method_acts_after_every_step_while_its_gradients_are_there(suite, tmp_path, monkeypatch):
    seen, after_step = [], METHODS["cia"].after_step

    def recorded(self, step, steps, optimizer):
        graded = all(p.grad is not None and p.grad.isfinite().all() for p in self.lora().values())
        seen.append((self.tasks[-1], step, steps, graded, torch.is_grad_enabled()))
        assert {id(p) for p in optimizer.param_groups[0]["params"]} <= {id(p) for p in self.lora().values()}
        after_step(self, step, steps, optimizer)

    monkeypatch.setattr(METHODS["cia"], "after_step", recorded)
    learn(suite, tmp_path / "run", "cia")
    assert seen == [(task, step, 4, True, False) for task in ("colour", "count") for step in (1, 2, 3, 4)]


def test_a_method_that_acts_between_steps_refuses_deepspeed(suite, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"--method cia cannot train with DeepSpeed, because it reads gradients"):
        learn(suite, tmp_path / "run", "cia")
    assert not (tmp_path / "run").exists()
