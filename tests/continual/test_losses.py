"""The training loss of every task: kept in the bank, whole after an interruption, reported to trackers, ended at NaN."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from lilora.bank.bank import Bank
from lilora.continual.run import ContinualRun
from lilora.continual.run_folder import run_of
from lilora.methods import METHODS


def curves_of(folder):
    return {task["name"]: task["info"]["losses"] for task in Bank.open(folder / "bank").describe()["tasks"]}


@pytest.fixture
def command(suite, tmp_path, train_options):
    """A command of two tasks, 7 steps each."""
    brief = ["--order", "colour,count", *train_options, "--max-steps", 7]
    return ["train", suite / "tasks.yaml", "--out", tmp_path / "run", *brief]


def test_a_run_keeps_the_loss_of_every_step_and_a_resumed_one_all_of_it(command, tmp_path, lilora, monkeypatch):
    assert lilora(*command)[0] == 0
    whole = curves_of(tmp_path / "run")
    assert list(whole) == ["colour", "count"]
    for (curve,) in (stages.values() for stages in whole.values()):
        assert [step for step, _ in curve] == list(range(1, 8))
        assert all(loss > 0 for _, loss in curve)
    bank = Bank.open(tmp_path / "run" / "bank")
    (curve,) = whole["count"].values()
    assert bank.describe()["tasks"][1]["info"]["loss"] == pytest.approx(np.mean([loss for _, loss in curve]))
    assert run_of(bank).losses == whole
    shutil.rmtree(tmp_path / "run")

    with monkeypatch.context() as patch:  # as for a longer training
        patch.setattr(TrainingArguments, "logging_steps", property(lambda self: 3, lambda self, value: None))
        assert lilora(*command)[0] == 0
    (rare,), losses = curves_of(tmp_path / "run")["count"].values(), np.array([loss for _, loss in curve])
    assert [step for step, _ in rare] == [3, 6, 7]
    assert [loss for _, loss in rare] == pytest.approx([losses[:3].mean(), losses[3:6].mean(), losses[6]], rel=1e-4)
    info = Bank.open(tmp_path / "run" / "bank").describe()["tasks"][1]["info"]
    assert info["loss"] == pytest.approx(losses.mean(), rel=1e-4)
    shutil.rmtree(tmp_path / "run")

    steps = 0

    def stop(*arguments):
        nonlocal steps
        steps += 1
        if steps == 12:  # the fifth of count; a checkpoint is after the fourth
            raise SystemExit(9)
        return loss(*arguments)

    loss = METHODS["lilora"].loss
    with monkeypatch.context() as patch:
        patch.setattr(METHODS["lilora"], "loss", stop)
        assert lilora(*command)[0] == 9
    assert lilora(*command)[0] == 0
    assert curves_of(tmp_path / "run") == whole


def test_an_infinite_loss_ends_the_run_when_it_is_logged(command, lilora, monkeypatch):
    loss, steps = METHODS["lilora"].loss, 0

    def diverging(*arguments):
        nonlocal steps
        steps += 1
        return loss(*arguments) * (float("nan") if steps >= 3 else 1)

    monkeypatch.setattr(METHODS["lilora"], "loss", diverging)
    code, _, err = lilora(*command)
    assert (code, steps) == (2, 3)
    assert "training run/colour/" in err
    assert "diverged: its loss is not finite at step 3 of 7; run the same command with a lower --lr" in err


def test_a_tracker_gets_each_stage_as_a_run_of_its_own(command, lilora, monkeypatch):
    said, closed = [], []

    class StandIn(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                said.append((args.run_name.split("/")[1], state.global_step))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", StandIn)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run="", finish=lambda: closed.append(len(said))))
    code, _, err = lilora(*command, "--report-to", "wandb")
    assert code == 0, err
    assert said == [(task, step) for task in ("colour", "count") for step in range(1, 8)]
    assert closed == [7, 14]


def test_tensorboard_gets_the_losses(command, tmp_path, lilora):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, _, err = lilora(*command, "--report-to", "tensorboard")
    assert code == 0, err
    for task, stages in curves_of(tmp_path / "run").items():
        for stage, curve in stages.items():
            events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / task / stage)).Reload()
            points = [(event.step, event.value) for event in events.Scalars("train/loss")]
            assert np.allclose(points, curve, rtol=1e-4)


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("notebook", "--report-to notebook is unknown; choose of "),
        ("none,wandb", "--report-to none is unknown"),
        ("swanlab", "--report-to swanlab: its package is not installed; install it, or leave the option out"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_sentence(name, sentence, command, tmp_path, lilora, monkeypatch):
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: [])
    monkeypatch.setattr(ContinualRun, "open", pytest.fail)
    code, _, err = lilora(*command, "--report-to", name)
    assert (code, sentence in err) == (2, True), err
    assert not (tmp_path / "run").exists()
