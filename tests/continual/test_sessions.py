"""What may change between the sessions of one run: memory settings always, the others until the first task is trained."""

import re
import shutil

import pytest
import torch
import yaml
from transformers import trainer

from lilora.bank.bank import Bank
from lilora.continual import evaluate
from lilora.continual.memory import InParts, ran_out
from lilora.continual.run import ContinualRun
from lilora.errors import UserError
from lilora.methods import METHODS


@pytest.fixture
def command(suite, tmp_path, train_options):
    """A command of two tasks, 6 steps each, with a checkpoint after every second."""
    options = ["--order", "colour,count", *train_options, "--dropout", "0"]
    return ["train", suite / "tasks.yaml", "--out", tmp_path / "run", *options]


@pytest.fixture
def losses(monkeypatch):
    """losses(change): the n-th loss of a training batch from now on is change(n, inputs, loss)."""
    own = METHODS["lilora"].loss

    def patched(change):
        number = 0

        def loss(self, inputs, cross_entropy, weight):
            nonlocal number
            number += 1
            return change(number, inputs, lambda: own(self, inputs, cross_entropy, weight))

        monkeypatch.setattr(METHODS["lilora"], "loss", loss)

    return patched


def stopping(at):
    def change(number, inputs, loss):
        if number == at:
            raise SystemExit(9)
        return loss()

    return change


def unchanged(number, inputs, loss):
    return loss()


def test_a_run_that_goes_on_as_it_was_gets_no_warning_of_changed_settings(command, lilora, losses, monkeypatch):
    seen, own = [], trainer.compare_trainer_and_checkpoint_args

    def compare(given, state):
        seen.append((given.logging_steps, given.save_steps) == (state.logging_steps, state.save_steps))
        return own(given, state)

    monkeypatch.setattr(trainer, "compare_trainer_and_checkpoint_args", compare)
    losses(stopping(4))
    assert lilora(*command)[0] == 9
    losses(unchanged)
    assert lilora(*command)[0] == 0
    assert seen == [True]


def tensors(folder):
    return {
        name: t
        for task in Bank.open(folder / "bank").load_tasks().values()
        for part in task
        for name, t in part.items()
    }


def sentence(err):
    (line,) = [line for line in err.splitlines() if line.startswith("lilora: ")]
    return line


@pytest.mark.parametrize("at", [4, 10], ids=["first-task", "second-task"])
def test_memory_settings_change_in_the_middle_of_a_task(at, command, tmp_path, lilora, losses, resumed):
    assert lilora(*command)[0] == 0
    wanted = tensors(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    losses(stopping(at))
    assert lilora(*command)[0] == 9
    losses(unchanged)
    less = ["--batch-size", 2, "--gradient-accumulation", 2, "--gradient-checkpointing", "--label", "mine"]
    code, out, err = lilora(*command, *less, "--eval-batch-size", 3)
    assert code == 0, err
    assert "mine: task 2 of 2" in out
    got = tensors(tmp_path / "run")
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-3)
    train = Bank.open(tmp_path / "run" / "bank").config["train"]
    assert (train["batch_size"], train["gradient_accumulation"], train["gradient_checkpointing"]) == (2, 2, True)
    code, _, err = lilora(*command, "--batch-size", 2)
    assert (code, "its train.batch_size is 2" in sentence(err)) == (2, False), "4 x 1 samples are a step as well"
    assert "its train.gradient_accumulation is 2 and this one's is 1" in sentence(err)


def test_other_settings_change_until_the_first_task_is_trained(command, tmp_path, lilora, losses):
    fresh = [*command, "--lr", "0.002", "--epochs", "2"]
    fresh[3] = tmp_path / "fresh"
    assert lilora(*fresh)[0] == 0
    losses(stopping(5))
    assert lilora(*command)[0] == 9
    assert (tmp_path / "run/checkpoints/colour/learn/checkpoint-4").is_dir()
    losses(unchanged)
    code, _, err = lilora(*command, "--lr", "0.002", "--epochs", "2")
    assert code == 0, err
    assert (
        "starts anew, as its first task is not trained yet: train.epochs is 2.0 and was 1.0, train.learning_rate" in err
    )
    assert f"the checkpoints made before are in {tmp_path / 'run/checkpoints-1'}" in err
    assert (tmp_path / "run/checkpoints-1/colour/learn/checkpoint-4").is_dir()
    wanted = tensors(tmp_path / "fresh")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(tmp_path / "run").items())
    code, _, err = lilora(*command)
    assert code == 2
    assert "its train.epochs is 2.0 and this one's is 1.0; give another folder" in sentence(err)
    code, _, err = lilora(*command, "--epochs", "2")
    assert "train.learning_rate is 0.002 and this one's is" in sentence(err)
    assert sentence(err).endswith("where a task to come may have a learning_rate of its own in the manifest")


@pytest.mark.parametrize("at", [2, 8], ids=["first-task", "second-task"])
def test_divergence_is_noticed_before_a_checkpoint_and_its_advice_holds(at, command, tmp_path, lilora, losses):
    losses(lambda number, inputs, loss: loss() * (float("nan") if number >= at else 1))
    code, _, err = lilora(*command)
    assert code == 2
    assert "diverged: its loss is not finite at step 2 of 6" in sentence(err)
    assert not list((tmp_path / "run").glob("checkpoints/*/*/checkpoint-*"))
    losses(unchanged)
    again = [*command, "--lr", "0.002"]
    if at == 2:
        assert sentence(err).endswith("; run the same command with a lower --lr")
    else:
        assert "give another folder (--out) and a lower --lr" in sentence(err)
        again[3] = tmp_path / "other"
    assert lilora(*again)[0] == 0


@pytest.fixture
def rated(command, suite, tmp_path):
    """(the command without --lr, write): write(a rate of the manifest, rates of tasks) makes its manifest."""
    content = yaml.safe_load((suite / "tasks.yaml").read_text())
    content |= {"data": str(suite / "data"), "model": str(suite / "base")}
    at = command.index("--lr")
    without = command[:at] + command[at + 2 :]
    without[1] = tmp_path / "rated.yaml"

    def write(rate, **rates):
        tasks = [t | ({"learning_rate": rates[t["name"]]} if t["name"] in rates else {}) for t in content["tasks"]]
        manifest = content | {"tasks": tasks} | ({} if rate is None else {"learning_rate": rate})
        without[1].write_text(yaml.safe_dump(manifest))

    return without, write


def test_each_task_trains_with_its_learning_rate(rated, tmp_path, lilora, monkeypatch):
    command, write = rated
    seen, arguments = [], ContinualRun._arguments
    monkeypatch.setattr(ContinualRun, "_arguments", lambda *a: seen.append(arguments(*a)) or seen[-1])
    write({"lilora": "1e-2", "pclr": 0.5}, count={"lilora": 2e-3, "lora": 0.1})
    code, _, err = lilora(*command, "--max-grad-norm", 0)
    assert code == 0, err
    assert [(a.learning_rate, a.max_grad_norm) for a in seen] == [(1e-2, 0), (2e-3, 0)]
    train = Bank.open(tmp_path / "run" / "bank").config["train"]
    assert (train["learning_rate"], train["learning_rates"], train["max_grad_norm"]) == (1e-2, {"count": 2e-3}, 0)
    again = ["train", "--config", tmp_path / "run/run.yaml"]
    code, _, err = lilora(*again)  # goes on: there is nothing left to do
    assert code == 0, err
    code, _, err = lilora(*again, "--lr", "0.01")
    assert (code, "its train.learning_rates.count is 0.002 and this one's is 0.01" in sentence(err)) == (2, True)
    assert len(seen) == 2


def test_a_task_that_is_not_trained_may_get_another_learning_rate(rated, tmp_path, lilora, losses):
    command, write = rated
    write(0.01)
    losses(lambda number, inputs, loss: loss() * (float("nan") if number >= 11 else 1))
    code, _, err = lilora(*command)
    assert code == 2
    assert sentence(err).endswith("; give this task a lower learning_rate in the manifest and run the same command")
    assert (tmp_path / "run/checkpoints/count/learn/checkpoint-4").is_dir()
    losses(unchanged)
    write(0.01, count=0.002, colour=0.002)
    code, _, err = lilora(*command)
    assert (code, "its train.learning_rates.colour is 0.01 and this one's is 0.002" in sentence(err)) == (2, True)
    write(0.01, count=0.002)
    code, _, err = lilora(*command)
    assert code == 0, err
    assert (
        "count starts anew: train.learning_rates.count is 0.002 and was 0.01; the checkpoints made before are in" in err
    )
    assert (tmp_path / "run/checkpoints-1/count/learn/checkpoint-4").is_dir()
    got = tensors(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert lilora(*command)[0] == 0
    assert all(torch.equal(tensor, got[name]) for name, tensor in tensors(tmp_path / "run").items())


def test_training_that_memory_does_not_hold_says_what_goes_on(command, lilora, losses):
    def change(number, inputs, loss):
        if number > 3 and len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return loss()

    losses(change)
    code, _, err = lilora(*command)
    assert code == 2
    wanted = r"task 'colour': memory does not hold a training batch of 4 samples \(step 4\); run the same command with (.*) or "
    advice = re.search(wanted + "--gradient-checkpointing, which goes on from the last checkpoint", sentence(err))[1]
    assert advice == "--batch-size 2 --gradient-accumulation 2"
    losses(change)
    code, _, err = lilora(*command, *advice.split())
    assert code == 0, err


def test_an_evaluation_that_memory_does_not_hold_goes_on_with_smaller_batches(
    command, suite, tmp_path, lilora, monkeypatch
):
    assert lilora(*command)[0] == 0
    whole, sizes, generate = Bank.open(tmp_path / "run" / "bank"), [], evaluate.generate

    def limited(method, processor, collator, batch, limits):
        sizes.append(len(batch))
        if len(batch) > 7:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"
            )
        return generate(method, processor, collator, batch, limits)

    monkeypatch.setattr(evaluate, "generate", limited)
    shutil.rmtree(tmp_path / "run")
    code, _, err = lilora(*command, "--batch-size", 2, "--gradient-accumulation", 2)
    assert code == 0, err
    assert "evaluating: memory does not hold 12 samples at once; going on with 6" in err
    assert sizes[:3] == [12, 6, 6], "16 by default, and there are 12"
    assert Bank.open(tmp_path / "run" / "bank").scores["matrix"] == whole.scores["matrix"]
    code, _, err = lilora("eval", tmp_path / "run", "--tasks", suite / "tasks.yaml", "--device", "cpu", "--routed")
    assert code == 0, err


def test_parts_are_in_order_and_one_sample_too_much_is_a_sentence(capsys):
    sizes = []

    def run(batch):
        sizes.append(len(batch))
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [-i for i in batch]

    limit = 2
    call = InParts(run, "trying")
    assert call(range(9)) == [-i for i in range(9)]
    assert call(range(4)) == [-i for i in range(4)]
    assert sizes == [9, 5, 3, 2, 2, 2, 2, 1, 2, 2]
    assert capsys.readouterr().err.count("\n") == 3
    limit = 0
    with pytest.raises(UserError, match="trying: memory does not hold one sample"):
        call([1])
    with pytest.raises(ZeroDivisionError):
        InParts(lambda batch: 1 / 0, "trying")([1])
    assert ran_out(MemoryError())


def test_memory_that_does_not_hold_the_adapters_is_a_sentence(command, lilora):
    code, _, err = lilora(*command, "--r", 10**9)
    assert code == 2
    assert "memory does not hold what this command needs" in sentence(err)
