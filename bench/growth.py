"""How costs grow: with the tasks in a batch, in a bank and in an evaluation, and with the rows of a training step."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lilora.bank.bank import Bank
from lilora.bank.index import BaseModelId
from lilora.methods import make_method

from .compare import compare, peak_bytes, saved_bytes
from .models import (
    DROPOUT,
    LLAVA_7B,
    LLAVA_LINEARS,
    SMALL,
    TINY,
    Size,
    adapted,
    batch,
    frozen,
    last_logits,
    learning,
    task_names,
    variant,
)
from .models import gate as model_gate
from .problems import SCALING, Problem
from .timing import Ceilings, Machine, figures, measure

PEERS = ("base", "ours", "peft_names", "grouped_mm")
EVALUATED = Size(256, 688, 4, 1, 512, (64, 1, 2, 28, 14), 32, 16, 64, 32, 16, 8, torch.float32)
STORED = Size(512, 1376, 4, 1, 512, (64, 1, 2, 28, 14), 32, 16, 64, 1, 16, 1, torch.float32)
SAMPLES_PER_TASK = 4
ROUNDS = 3  # of what takes seconds


def mixed_batch(
    tasks: int, machine: Machine, ceiling: Callable[[torch.dtype], Ceilings], seconds: float
) -> Iterator[dict]:
    """Inference of 64 rows that belong to so many tasks."""
    if machine.tiny:
        problem = Problem(4, 32, 48, tasks, rank=16, sub_rank=8, dtype=torch.float32)
    elif machine.on_gpu:
        problem = Problem(64, 4096, 11008, tasks)
    else:
        problem = Problem(64, 2048, 5504, tasks, dtype=torch.float32)
    peers = PEERS if tasks > 1 else PEERS[:-1]  # one task has nothing to group
    yield from compare("mixed batch over tasks", problem, peers, machine, ceiling(problem.dtype), False, seconds)


def evaluated_size(machine: Machine, tasks: int) -> Size:
    size = TINY if machine.tiny else EVALUATED
    return replace(size, tasks=tasks, samples=min(size.samples, SAMPLES_PER_TASK * tasks))


def evaluation(tasks: int, machine: Machine) -> Iterator[dict]:
    """Greedy answers to four samples of every task: in mixed batches of up to 32, or with PEFT a task after the other."""
    size = evaluated_size(machine, tasks)
    base = frozen("generate", size, machine.device).eval()
    variants = {
        "ours": variant(base, "ours", "generate", size, 0.0, mixed=True),
        "peft": variant(base, "peft", "generate", size, 0.0, mixed=False),
        "peft_names": variant(base, "peft", "generate", size, 0.0, mixed=True),
    }
    inputs = batch(size, machine)
    model_gate(base, variants, last_logits(inputs), size)
    length = {"max_new_tokens": size.new_tokens, "min_new_tokens": size.new_tokens, "do_sample": False}
    names, total = task_names(size), SAMPLES_PER_TASK * tasks

    def first(count: int) -> dict:
        return {key: value[:count] for key, value in inputs.items()}

    def together(name: str, argument: str, mark: Callable[[], None]) -> None:
        for start in range(0, total, size.samples):
            count = min(size.samples, total - start)
            ids = [names[i % tasks] for i in range(start, start + count)]
            variants[name].model.generate(**first(count), **length, **{argument: ids})
        mark()

    def peft(_: int, mark: Callable[[], None]) -> None:
        for name in names:
            variants["peft"].model.set_adapter(name, inference_mode=True)
            for start in range(0, SAMPLES_PER_TASK, size.samples):
                variants["peft"].model.generate(**first(min(size.samples, SAMPLES_PER_TASK - start)), **length)
        mark()

    candidates = {
        "ours": lambda _, mark: together("ours", "task_ids", mark),
        "peft_names": lambda _, mark: together("peft_names", "adapter_names", mark),
        "peft": peft,
    }
    times = measure(machine, candidates, ["evaluation"], ROUNDS)
    for name in times:
        found = figures(times[name]["evaluation"])
        yield {
            "case": "evaluation over tasks", **size.describe(), "T": tasks, "samples_per_task": SAMPLES_PER_TASK,
            "implementation": name, "direction": "evaluation", **found, "times_us": times[name]["evaluation"],
        }  # fmt: skip


def bank(tasks: int, machine: Machine) -> Iterator[dict]:
    """Size on disk of so many tasks, and the time to load them all: our bank, and PEFT's folder of a LoRA for each."""
    import peft

    size = replace(TINY if machine.tiny else STORED, tasks=tasks)
    base = frozen("generate", size, torch.device("cpu")).eval()
    settings = {
        "r": size.rank, "sub_rank": size.sub_rank, "alpha": SCALING * size.rank, "target_modules": LLAVA_LINEARS
    }  # fmt: skip
    identity = BaseModelId.of(base, "random weights")
    with tempfile.TemporaryDirectory() as folder:
        stores = {"ours": Path(folder) / "bank", "peft": Path(folder) / "peft"}
        method = make_method("lilora", plain_copy(base), settings)
        for name in task_names(size):
            method.add(name)
        stored = Bank.create(stores["ours"], config=settings, base_model=identity)
        for name in task_names(size):
            stored.add_task(name, *method.tensors(name))
        adapted(base, "peft", "generate", size, 0.0).save_pretrained(stores["peft"])

        def ours() -> nn.Module:
            opened = Bank.open(stores["ours"])
            restored = make_method("lilora", plain_copy(base), opened.config)
            restored.restore({name: opened.load_task(name) for name in opened.tasks})
            return restored.model

        def theirs() -> nn.Module:
            first, *others = task_names(size)
            empty = {"low_cpu_mem_usage": True}  # without random values first
            store = stores["peft"]
            model = peft.PeftModel.from_pretrained(plain_copy(base), store / first, adapter_name=first, **empty)
            for name in others:
                model.load_adapter(store / name, adapter_name=name, **empty)
            return model

        loads = {"ours": ours, "peft": theirs}
        candidates = {name: partial(timed_load, load) for name, load in loads.items()}
        times = measure(machine, candidates, ["load"], ROUNDS)
        for name, path in stores.items():
            bytes_ = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            yield {
                "case": "bank over tasks", **size.describe(), "T": tasks, "implementation": name, "direction": "load",
                "bytes_on_disk": bytes_, **figures(times[name]["load"]), "times_us": times[name]["load"],
            }  # fmt: skip


def timed_load(load: Callable[[], nn.Module], _: int, mark: Callable[[], None]) -> None:
    load()
    mark()


def plain_copy(base: nn.Module) -> nn.Module:
    """Modules of its own on the same weights."""
    return copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})


def row_counts(machine: Machine) -> tuple[int, ...]:
    return (4, 8) if machine.tiny else (1024, 4096, 16384) if machine.on_gpu else (64, 256, 1024)


def step_memory(rows: int, machine: Machine) -> Iterator[dict]:
    """Bytes held for backward, and at most, by forward and backward of an MLP of so many rows, dropout on."""
    size = TINY if machine.tiny else LLAVA_7B if machine.on_gpu else SMALL
    base = frozen("MLP", size, machine.device)
    models = {"base": base, **{kind: adapted(base, kind, "MLP", size, DROPOUT).train() for kind in ("ours", "peft")}}
    x = torch.randn(rows, size.hidden, dtype=size.dtype, device=machine.device, requires_grad=True)
    for name, model in models.items():

        def step(model: nn.Module = model) -> object:
            return torch.autograd.grad(model(x).sum(), [x, *learning(model)])

        yield {
            "case": "memory of a step over rows", **size.describe(), "T": 1, "M": rows, "p": DROPOUT,
            "implementation": name, "direction": "both",
            "saved_bytes": saved_bytes(partial(model, x), list(model.parameters())),
            "peak_bytes": peak_bytes(machine, step),
        }  # fmt: skip
