"""Which checkpoint an interrupted training goes on from: damaged ones are passed over with a sentence, none is half read."""

import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import WANTED, latest, write

from lilora.bank.bank import Bank
from lilora.bank.lock import locked
from lilora.continual import checkpoints
from lilora.continual.checkpoints import TENSORS
from lilora.continual.trainer import TaskTrainer
from lilora.errors import UserError


@pytest.fixture
def stage(tmp_path):
    """A stage's folder with whole checkpoints of the steps 2 and 10."""
    for step in (2, 10):
        write(tmp_path / "stage" / f"checkpoint-{step}", step)
    return tmp_path / "stage"


def emptied(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


FILES = ("trainable.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def test_the_newest_whole_checkpoint_is_taken(stage, tmp_path):
    (stage / "checkpoint-notes").mkdir()
    assert latest(stage) == ("checkpoint-10", [])
    assert latest(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("damage", [emptied, cut, zeroed, os.remove])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_lost_or_damaged_file_is_passed_over(name, damage, stage):
    damage(stage / "checkpoint-10" / name)
    found, said = latest(stage)
    assert (found, len(said)) == ("checkpoint-2", 1)
    assert f"{stage / 'checkpoint-10'} is passed over and deleted: it" in said[0]
    assert name in said[0]
    assert [path.name for path in stage.iterdir()] == ["checkpoint-2"]


def reshaped(checkpoint):
    tensors = load_file(checkpoint / "trainable.safetensors")
    save_file(tensors | {"a": torch.ones(1, 3)}, checkpoint / "trainable.safetensors")


def renamed(checkpoint):
    tensors = load_file(checkpoint / "trainable.safetensors")
    save_file({{"a": "c"}.get(name, name): t for name, t in tensors.items()}, checkpoint / "trainable.safetensors")


def other_optimizer(checkpoint):
    write(checkpoint.parent / "other", 1, WANTED | {"a": torch.ones(2, 2)})
    shutil.move(checkpoint.parent / "other" / "optimizer.pt", checkpoint / "optimizer.pt")
    shutil.rmtree(checkpoint.parent / "other")


def empty_state(checkpoint):
    (checkpoint / "trainer_state.json").write_text("{}")  # which reads as "finished, after no step"


def other_step(checkpoint):
    (checkpoint / "trainer_state.json").write_text('{"global_step": 9, "max_steps": 10}')


def list_for_state(checkpoint):
    (checkpoint / "trainer_state.json").write_text("[1]")


def other_content(checkpoint):
    torch.save({"python": 1}, checkpoint / "rng_state.pth")


@pytest.mark.parametrize(
    "change", [reshaped, renamed, other_optimizer, empty_state, other_step, list_for_state, other_content]
)
def test_a_checkpoint_of_another_training_is_passed_over(change, stage):
    change(stage / "checkpoint-10")
    found, said = latest(stage)
    assert (found, len(said)) == ("checkpoint-2", 1)


def test_without_a_whole_checkpoint_it_is_said_that_training_starts_anew(stage):
    for step in (2, 10):
        emptied(stage / f"checkpoint-{step}" / "optimizer.pt")
    found, said = latest(stage)
    assert (found, len(said)) == (None, 3)
    assert "starts anew" in said[-1]
    assert latest(stage) == (None, [])


def test_another_number_of_processes_goes_on_and_says_so(stage):
    found, said = latest(stage, processes=2)
    assert (found, len(said)) == ("checkpoint-10", 1)
    assert "another number of processes" in said[0]


def test_a_file_that_may_not_be_read_is_no_damage(stage, monkeypatch):
    def refused(path, *rest):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints, "open", refused, raising=False)
    with pytest.raises(UserError, match="Permission denied"):
        latest(stage)
    assert (stage / "checkpoint-10").exists()


def one_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("method, damage, name", [("lilora", one_bit, TENSORS), ("lora", emptied, "optimizer.pt")])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    method, damage, name, suite, tmp_path, lilora, train_options, monkeypatch
):
    options = ["--method", method, "--order", "colour", *train_options]
    step, calls = TaskTrainer.training_step, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # after the checkpoints of steps 2 and 4
            raise SystemExit(9)
        return step(*args, **kwargs)

    assert lilora("train", suite / "tasks.yaml", "--out", tmp_path / "whole", *options)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "training_step", stopping)
        assert lilora("train", suite / "tasks.yaml", "--out", tmp_path / "run", *options)[0] == 9
    newest = tmp_path / "run" / "checkpoints" / "colour" / "learn" / "checkpoint-4"
    damage(newest / name)
    code, _, err = lilora("train", suite / "tasks.yaml", "--out", tmp_path / "run", *options)
    assert code == 0, err
    assert err.count("lilora: ") == err.count(f"lilora: {newest} is passed over") == 1
    whole, run = (Bank.open(tmp_path / name / "bank") for name in ("whole", "run"))
    assert run.task_fingerprint("colour") == whole.task_fingerprint("colour")
    assert run.shared_fingerprint("colour") == whole.shared_fingerprint("colour")


def test_a_checkpoint_is_on_the_disk_before_it_says_that_it_is_complete(
    suite, tmp_path, lilora, train_options, monkeypatch
):
    synced, fsync = [], os.fsync

    def recorded(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "checkpoint-2" in path and "checksums.json" not in path:
            assert not os.path.exists(os.path.join(os.path.dirname(path), "trainer_state.json"))
            synced.append(os.path.basename(path))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    brief = ["--order", "colour", *train_options, "--max-steps", "2"]
    assert lilora("train", suite / "tasks.yaml", "--out", tmp_path / "run", *brief)[0] == 0
    assert {"trainable.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(synced)


def test_two_processes_cannot_write_to_one_run(suite, tmp_path, lilora, train_options):
    command = ["train", suite / "tasks.yaml", "--out", tmp_path / "run", "--order", "colour", *train_options]
    code, _, err = lilora(*command)
    assert code == 0, err
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path / "run" / "bank"):
            os.write(writer, b".")
            time.sleep(60)
    os.close(writer)  # a child that dies ends the read
    assert os.read(reader, 1) == b"."
    os.close(reader)
    try:
        for refused in (command, ["bank", "rm", tmp_path / "run", "--task", "colour"]):
            code, _, err = lilora(*refused)
            assert (code, err.count("lilora: ")) == (2, 1)
            assert f"run/bank is being written by process {child};" in err
        assert lilora("bank", "ls", tmp_path / "run")[0] == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert lilora(*command)[0] == 0
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(before)


def test_a_run_holds_its_lock_until_it_ends(suite, tmp_path, lilora, train_options, monkeypatch):
    step, held = TaskTrainer.training_step, []

    def looking(*args, **kwargs):
        held.append((tmp_path / "run" / "bank" / ".lock").read_text())
        return step(*args, **kwargs)

    monkeypatch.setattr(TaskTrainer, "training_step", looking)
    brief = ["--order", "colour,name", *train_options, "--max-steps", "1"]
    assert lilora("train", suite / "tasks.yaml", "--out", tmp_path / "run", *brief)[0] == 0
    assert held == [str(os.getpid())] * 2
    assert not (tmp_path / "run" / "bank" / ".lock").exists()
