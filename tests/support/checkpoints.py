"""Checkpoints as the Trainer leaves them, and which of them a run would go on from."""

import json
import random

import numpy as np
import torch
from safetensors.torch import save_file

from lilora.continual.checkpoints import latest_checkpoint

WANTED = {"a": torch.ones(2, 3), "b": torch.ones(3), "progress.seen": torch.ones(4)}


def write(checkpoint, step, wanted=WANTED):
    """A checkpoint as the Trainer leaves it."""
    checkpoint.mkdir(parents=True)
    save_file(wanted, checkpoint / "trainable.safetensors")
    parameters = [torch.nn.Parameter(t) for name, t in wanted.items() if not name.startswith("progress.")]
    optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    torch.save(scheduler.state_dict(), checkpoint / "scheduler.pt")
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(states, checkpoint / "rng_state.pth")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 10}))


def latest(folder, processes=1, wanted=WANTED, deepspeed=False):
    said = []
    found = latest_checkpoint(folder, wanted, processes, deepspeed, said.append)
    return found and found.rpartition("/")[2], said
