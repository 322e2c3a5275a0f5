"""`lilora` as one of several processes on CPUs, with what only tests want, told by the environment:

LILORA_TEST_LOG=FILE: the first process writes the loss of every step there. LILORA_TEST_KILL=RANK:STEP: that process kills
itself after that step.
"""

import json
import os
import signal

import torch
from accelerate import DistributedType, PartialState
from transformers import Trainer

from lilora.cli import main
from lilora.continual import train

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    # accelerate shards on accelerators alone: let it take CPUs with gloo for one
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def log(trainer, logs, *args, **kwargs):
    Trainer.log(trainer, logs, *args, **kwargs)
    if "loss" in logs and "LILORA_TEST_LOG" in os.environ and trainer.args.process_index == 0:
        with open(os.environ["LILORA_TEST_LOG"], "a") as file:
            file.write(json.dumps(logs["loss"]) + "\n")
    rank, step = map(int, os.environ.get("LILORA_TEST_KILL", "-1:0").split(":"))
    if (trainer.args.process_index, trainer.state.global_step) == (rank, step):
        os.kill(os.getpid(), signal.SIGKILL)


train.TaskTrainer.log = log
train.TrainingArguments.logging_steps = property(lambda self: 1, lambda self, value: None)
main()
