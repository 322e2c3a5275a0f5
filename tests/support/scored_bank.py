"""A bank with two tasks of LiLoRA and their scores, in the folder of a run."""

import torch

from lilora.bank.bank import Bank
from lilora.bank.index import BaseModelId
from lilora.reports.scores import ScoreMatrix

PATH = "model.language_model.layers.0.mlp.up_proj"
SETTINGS = {"target_modules": PATH, "r": 2, "sub_rank": 1, "alpha": 4.0, "dropout": 0.0}
TRAIN = {"learning_rate": 0.01, "epochs": 1.0, "max_steps": -1, "dtype": "auto", "seed": 0}


def scored_bank(folder):
    """Two tasks of LiLoRA with scores, in the folder of a run."""
    config = {"method": "lilora", "settings": SETTINGS, "train": TRAIN, "model": "owner/base", "label": "mine"}
    config |= {"kind": "instruction", "manifest": "tiny"}
    bank = Bank.create(folder / "run" / "bank", config=config, base_model=BaseModelId(id="base", fingerprint="0" * 16))
    shared = {f"{PATH}.A": torch.randn(2, 3), f"{PATH}.B0": torch.randn(4, 2)}
    matrix = ScoreMatrix(["one", "two"])
    for task in ("one", "two"):
        own = {f"{PATH}.U": torch.randn(4, 1), f"{PATH}.V": torch.randn(1, 2), f"{PATH}.fusion": torch.randn(1)}
        info = {"parameters": 20, "ranks": 3, "seconds": 1.5, "steps": 3, "loss": 0.5}
        bank.add_task(task, own, shared, info=info)
    bank.set_router("one", {"mean": torch.randn(3)})
    for after, task in (("one", "one"), ("two", "one"), ("two", "two")):
        matrix.set(after, task, 50.0)
    functions = {after: {"one": "f"} for after in ("one", "two")}
    bank.set_scores({"matrix": matrix.to_dict(), "functions": functions, "seconds": {"one": 1.5, "two": 1.5}})
    return bank
