"""Banks with tensors that a seed makes, and children that are killed while they write."""

import os

import torch

from lilora.bank.index import BaseModelId

BASE = BaseModelId(id="tiny", fingerprint="0123456789abcdef")
MODULES = ("layers.0.up_proj", "layers.1.up_proj")
N, K, R, S = 6, 5, 4, 2


def task_tensors(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = {"U": (N, S), "V": (S, R), "fusion": (1,)}
    return {f"{m}.{k}": torch.randn(shape, generator=g).to(dtype) for m in MODULES for k, shape in shapes.items()}


def shared_tensors(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(1000 + seed)
    shapes = {"A": (R, K), "B0": (N, R)}
    return {f"{m}.{k}": torch.randn(shape, generator=g).to(dtype) for m in MODULES for k, shape in shapes.items()}


def router_tensors(seed):
    g = torch.Generator().manual_seed(2000 + seed)
    return {"mean": torch.randn(7, generator=g), "count": torch.randn(1, generator=g)}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def file_of(bank, which):
    return {
        "index": bank.path / "bank.json",
        "task": bank.path / "tasks" / "one.safetensors",
        "shared": bank.path / f"shared-{bank.shared_fingerprint('one')}.safetensors",
    }[which]


def same(got, want):
    return got.keys() == want.keys() and all(
        got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]) for name in want
    )


def in_child(work):
    """Run `work` in a forked child that never returns; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]
