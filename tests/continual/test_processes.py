"""`lilora train` in two processes on the tiny suite: DDP and FSDP2 against one process, kill and resume, bad input.

Most processes are forked, which spares their imports. accelerate shards on accelerators alone, so for FSDP2 the members
tell it that CPUs with gloo are one; the rest is the Trainer's and accelerate's own path.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate import DistributedType, PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from support.suite import without_image
from transformers import Trainer

import lilora.cli as cli
import lilora.continual.run as train
from lilora.bank.bank import Bank

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
LIMIT = 60  # seconds that any group of processes may take
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch --config_file fsdp2.yaml` sets."""
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
    return (
        {"ACCELERATE_USE_FSDP": "true"}
        | {key.upper(): str(value).lower() for key, value in config.items()}
        | {
            "FSDP_AUTO_WRAP_POLICY": config["fsdp_auto_wrap_policy"],
            "FSDP_STATE_DICT_TYPE": config["fsdp_state_dict_type"],
        }
    )


def member(rank: int, port: int, folder: Path, arguments: list, engine: str, kill: tuple | None) -> None:
    """In a forked child: the command as one of two processes; its output in folder/<rank>.{out,err}.

    kill: (rank, step) of the process that kills itself after that step, or (rank, "trained"). The losses of all steps go to
    folder/losses.
    """
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    # As under torchrun, whoever started them keeps the store.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    AcceleratorState._reset_state(reset_partial_state=True)
    if engine.startswith("fsdp2"):
        os.environ |= fsdp_environment()
    if engine == "fsdp2":
        os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu"}
        torch.distributed.init_process_group("gloo")
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)

    def log(trainer, logs, *rest):
        Trainer.log(trainer, logs, *rest)
        if "loss" in logs and rank == 0:
            with open(folder / "losses", "a") as file:
                file.write(f"{logs['loss']}\n")
        if kill == (rank, trainer.state.global_step):
            os.kill(os.getpid(), signal.SIGKILL)

    train.TaskTrainer.log = log
    if kill == (rank, "trained"):
        train.digest = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    train.TrainingArguments.logging_steps = property(lambda self: 1, lambda self, value: None)
    cli.output.console.file = sys.stdout
    sys.argv = ["lilora", *map(str, arguments)]
    cli.main()


def two(folder: Path, arguments: list, engine: str = "ddp", kill=None, other: list | None = None) -> list[int]:
    """Exit codes of both processes (minus the signal for killed ones). other: arguments of the second one."""
    folder.mkdir(exist_ok=True)
    store, children = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), []
    for rank in range(2):
        child = os.fork()
        if not child:
            code = 1
            try:
                member(rank, store.port, folder, other if rank and other else arguments, engine, kill)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [ended(child) for child in children]


def ended(child: int) -> int:
    """The exit code of a child, which must end in time."""
    until = time.monotonic() + LIMIT
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(status[1])


def told(folder: Path) -> list[str]:
    """What the processes told the user, all together, but for options that a test gives twice."""
    lines = (line for rank in range(2) for line in (folder / f"{rank}.err").read_text().splitlines())
    return [line for line in lines if "lilora: " in line and " is given " not in line]


def fingerprints(run: Path) -> list[tuple[str, str]]:
    bank = Bank.open(run / "bank")
    return [(bank.task_fingerprint(task), bank.shared_fingerprint(task)) for task in bank.tasks]


@pytest.fixture(scope="module")
def long(suite, train_options):
    """20 steps, ten for each of two tasks, without dropout, with the stability loss and gradient accumulation."""
    options = ["--max-steps", 10, "--dropout", 0, "--preset", "paper", "--gradient-accumulation", 2, "--batch-size", 4]
    return ["train", suite / "tasks.yaml", *train_options, *options, "--order", "colour,count", "--save-steps", 100]


def losses_of_one(command) -> list[float]:
    """The losses of all steps of the command in this process alone."""
    losses = []

    def log(trainer, logs, *rest):
        Trainer.log(trainer, logs, *rest)
        losses.extend([logs["loss"]] if "loss" in logs else [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.TaskTrainer, "log", log, raising=False)
        logging = property(lambda self: 1, lambda self, value: None)
        patch.setattr(train.TrainingArguments, "logging_steps", logging)
        cli.app([str(a) for a in command], standalone_mode=False)
    return losses


def losses_in(folder: Path) -> list[float]:
    return [float(line) for line in (folder / "losses").read_text().split()]


@pytest.fixture(scope="module")
def single(long, tmp_path_factory):
    """(run folder, losses) of the same command in one process."""
    folder = tmp_path_factory.mktemp("single")
    return folder / "run", losses_of_one([*long, "--zero-shot", "--out", folder / "run"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_learns(engine, single, long, tmp_path, reported):
    run, losses = single
    assert two(tmp_path / "log", [*long, "--zero-shot", "--out", tmp_path / "run"], engine) == [0, 0]
    got = losses_in(tmp_path / "log")
    assert len(got) == len(losses) == 20
    assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) < 1e-4
    one, both = Bank.open(run / "bank"), Bank.open(tmp_path / "run" / "bank")
    for task in one.tasks:
        for want, have in zip(one.load_task(task), both.load_task(task), strict=True):
            assert want.keys() == have.keys()
            for name in want:
                torch.testing.assert_close(have[name], want[name], rtol=1e-3, atol=1e-4)
    assert both.scores["matrix"] == one.scores["matrix"]
    assert both.scores["zero_shot"] == one.scores["zero_shot"]
    assert both.scores["zero_shot"].keys() == {"colour", "count"}
    want, have = (b.describe()["tasks"][-1]["info"] for b in (one, both))
    assert {**want, "loss": 0, "losses": 0, "seconds": 0} == {**have, "loss": 0, "losses": 0, "seconds": 0}
    assert want["losses"].keys() == have["losses"].keys()
    for stage, curve in want["losses"].items():
        assert np.allclose(have["losses"][stage], curve, atol=1e-4)
    assert abs(want["loss"] - have["loss"]) < 1e-4
    for predictions in (run / "predictions").iterdir():
        other = tmp_path / "run" / "predictions" / predictions.name
        assert [json.loads(line)["id"] for line in other.open()] == [
            json.loads(line)["id"] for line in predictions.open()
        ]
    assert "report: " in (tmp_path / "log" / "0.out").read_text()
    assert (tmp_path / "log" / "1.out").read_text() == ""


@pytest.mark.parametrize("method", ["ewc", "lwf", "olora", "moelora"])
def test_what_a_method_adds_to_the_loss_is_that_of_one_process(method, suite, train_options, tmp_path):
    """The second of two tasks has the first one's penalty, teacher or subspace."""
    brief = ["--method", method, "--order", "colour,count", "--max-steps", 3, "--dropout", 0, "--save-steps", 100]
    command = ["train", suite / "tasks.yaml", *train_options, *brief]
    losses = losses_of_one([*command, "--out", tmp_path / "one"])
    assert two(tmp_path / "log", [*command, "--out", tmp_path / "two"]) == [0, 0]
    torch.testing.assert_close(losses_in(tmp_path / "log"), losses, atol=1e-4, rtol=0)
    one, both = (Bank.open(tmp_path / name / "bank") for name in ("one", "two"))
    for want, have in zip(one.load_task("count"), both.load_task("count"), strict=True):
        assert want.keys() == have.keys()
        for name in want:
            torch.testing.assert_close(have[name], want[name], rtol=1e-3, atol=1e-4)


def test_one_process_may_have_images_and_the_other_none(suite, long, tmp_path):
    shutil.copytree(suite, tmp_path / "suite")
    path = tmp_path / "suite" / "data" / "colour-train.json"
    records = json.loads(path.read_text())
    records[::2] = map(without_image, records[::2])
    path.write_text(json.dumps(records))
    command = ["train", tmp_path / "suite" / "tasks.yaml", *long[2:], "--order", "colour", "--batch-size", 2]
    losses = losses_of_one([*command, "--out", tmp_path / "one"])
    assert two(tmp_path / "log", [*command, "--out", tmp_path / "two"]) == [0, 0]
    torch.testing.assert_close(losses_in(tmp_path / "log"), losses, atol=1e-4, rtol=0)
    assert two(tmp_path / "fsdp2", [*command, "--out", tmp_path / "three"], "fsdp2") == [2, 2]
    assert "images and without, which FSDP2 cannot train" in told(tmp_path / "fsdp2")[0]


# --- interruption -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(suite, train_options):
    """One task, with dropout: six steps, a checkpoint after every second."""
    return ["train", suite / "tasks.yaml", *train_options, "--order", "colour"]


GONE = "lilora: another process of this run has ended; run the same command again to go on from the last checkpoint"


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_one_killed_process_ends_the_other_and_the_same_command_goes_on_to_the_same_bank(engine, short, tmp_path):
    assert two(tmp_path / "log", [*short, "--out", tmp_path / "whole"], engine) == [0, 0]
    (tmp_path / "log" / "losses").unlink()
    command = [*short, "--out", tmp_path / "run"]
    assert two(tmp_path / "log", command, engine, kill=(1, 3)) == [1, -signal.SIGKILL]
    assert told(tmp_path / "log") == [GONE]
    assert "Traceback" not in (tmp_path / "log" / "0.err").read_text()
    assert [p.name for p in (tmp_path / "run" / "checkpoints" / "colour" / "learn").iterdir()] == ["checkpoint-2"]
    (tmp_path / "log" / "losses").unlink()
    # It goes on with step 3, and ends once more between its last checkpoint and the bank.
    assert two(tmp_path / "log", command, engine, kill=(0, "trained")) == [-signal.SIGKILL, 1]
    assert two(tmp_path / "log", command, engine) == [0, 0]
    assert len((tmp_path / "log" / "losses").read_text().split()) == 4  # of steps 3 to 6, once
    assert fingerprints(tmp_path / "run") == fingerprints(tmp_path / "whole")


def test_a_run_goes_on_with_another_engine_and_unpickles_nothing(short, tmp_path):
    command = [*short, "--out", tmp_path / "run"]
    assert two(tmp_path / "log", command, "ddp", kill=(1, 3)) == [1, -signal.SIGKILL]
    (tmp_path / "log" / "losses").unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):  # where accelerate would read a pickle
        folder = tmp_path / "run" / "checkpoints" / "colour" / "learn" / "checkpoint-2" / name
        folder.mkdir()
        (folder / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "it-ran")))
    assert two(tmp_path / "log", command, "fsdp2") == [0, 0]
    assert told(tmp_path / "log") == []
    assert len(losses_in(tmp_path / "log")) == 4  # of steps 3 to 6
    assert not (tmp_path / "it-ran").exists()


class Runs:
    """A pickle that makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_process_killed_under_accelerate_launch_ends_the_command(short, tmp_path):
    command = [
        "accelerate",
        "launch",
        "--config_file",
        CONFIGS / "ddp.yaml",
        "-m",
        "lilora",
        *short,
        "--out",
        tmp_path / "run",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with open(tmp_path / "output", "w") as output:
        launcher = subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=output)
    try:
        until = time.monotonic() + LIMIT
        while not (tmp_path / "run" / "checkpoints" / "colour" / "learn" / "checkpoint-2").exists():
            assert launcher.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        members = {child.environ()["RANK"]: child for child in psutil.Process(launcher.pid).children()}
        members["1"].kill()
        assert launcher.wait(LIMIT) == 1
        assert not any(child.is_running() for child in members.values())
    finally:
        for process in [*psutil.Process(launcher.pid).children(), launcher] if launcher.poll() is None else []:
            process.kill()
    output = (tmp_path / "output").read_text()
    assert output.count("lilora: ") <= 1
    assert "Signal 9 (SIGKILL) received" in output


# --- bad input: one sentence by one process -----------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """As one of two processes; the launcher keeps the store through which they agree who tells."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    here = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in here.items():
        monkeypatch.setenv(name, str(value))
    yield monkeypatch
    del store


FSDP1 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
REFUSED = {
    "pclr": ({}, ["--method", "pclr"], "one process alone can train, because its integration draws fake queries"),
    "dac": ({}, ["--method", "dac"], "one process alone can train, because it counts how often"),
    "batch": ({}, ["--batch-size", "3"], "--batch-size 3 cannot be divided among 2 processes"),
    "fsdp1": (FSDP1, [], "fsdp_version is 1 and only 2 is supported"),
    "zero3": (ZERO3, [], "ZeRO-3 is not supported; use ZeRO-2"),
    "olora sharded": (FSDP2, ["--method", "olora"], "reads its parameters outside the forward"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_several_processes_cannot_do_is_refused(name, suite, tmp_path, lilora, train_options, launched):
    environment, options, words = REFUSED[name]
    for key, value in environment.items():
        launched.setenv(key, value)
    command = ["train", suite / "tasks.yaml", "--out", tmp_path / "run", *train_options, *options]
    code, _, err = lilora(*command)
    assert code == 2
    assert words in err
    assert err.count("lilora: ") == 1
    assert not (tmp_path / "run").exists()
    code, _, err = lilora(*command)  # the other process has nothing to add
    assert (code, err) == (2, "")


def test_only_training_runs_in_several_processes(lilora, launched, tmp_path):
    code, _, err = lilora("eval", tmp_path, "--tasks", tmp_path / "tasks.yaml")
    assert (code, err) == (
        2,
        "lilora: only lilora train runs in several processes; start this command without a launcher\n",
    )


def test_a_mistake_of_one_process_ends_both_with_its_sentence(short, suite, tmp_path):
    shutil.copytree(suite / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"half")
    command = [*short, "--out", tmp_path / "run"]
    assert two(tmp_path / "log", command, other=[*command, "--model", tmp_path / "base"]) == [1, 2]
    assert len(told(tmp_path / "log")) == 1
    assert "cannot be loaded" in told(tmp_path / "log")[0]


def test_sharding_on_cpus_is_refused(short, tmp_path):
    command = [*short, "--out", tmp_path / "run"]
    assert two(tmp_path / "log", command, "fsdp2 unaided") == [2, 2]
    assert told(tmp_path / "log") == [
        "lilora: accelerate shards nothing on CPUs; use examples/accelerate/ddp.yaml there"
    ]


def test_the_shipped_configs_are_what_accelerate_reads():
    configs = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.iterdir()}
    assert {name: config.distributed_type for name, config in configs.items()} == {
        "ddp": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
        "deepspeed_zero2": DistributedType.DEEPSPEED,
    }
    assert configs["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert configs["deepspeed_zero2"].deepspeed_config["zero_stage"] == 2
