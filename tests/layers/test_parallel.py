"""LiLoRALinear in two processes (gloo, CPU): DistributedDataParallel, and parameters sharded by FSDP2."""

import os
import socket
import traceback
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lilora_kernels import LiLoRALinear, attach, route, set_task

TASKS = ("a", "b", "c")


def in_two(check, *arguments) -> None:
    """Run check(rank, *arguments) in two forked processes that are connected; both must come to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [os.fork() or run(rank, port, check, arguments) for rank in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def run(rank: int, port: int, check, arguments) -> None:
    code = 1
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=20),
        )
        check(rank, *arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Model(nn.Sequential):
    """Two adapted linears with random values in every adapter tensor: x [B, L, 6] -> [B, L, 5]."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        first, second = (LiLoRALinear(nn.Linear(*size), 4, 2, 8.0, 0.0, train_a="always") for size in ((6, 7), (7, 5)))
        super().__init__(first, nn.ReLU(), second)
        for layer in (first, second):
            layer.base_layer.requires_grad_(False)
            for name in TASKS:
                layer.add_task(name)
            with torch.no_grad():
                for name, parameter in layer.named_parameters():
                    if name.startswith("lilora_"):
                        parameter.normal_()
        attach(self)
        set_task(self, *TASKS)


def loss_of(model: nn.Module, x: torch.Tensor, tasks: list[int]) -> torch.Tensor:
    with route(getattr(model, "module", model), torch.tensor(tasks, dtype=torch.int32)):
        return model(x).square().mean()


def batches() -> tuple[torch.Tensor, list[list[int]]]:
    """x [2 ranks, 4, 3, 6] and their tasks: c is in no batch, b not in that of rank 1."""
    return torch.randn(2, 4, 3, 6, generator=torch.Generator().manual_seed(5)), [[0, 1, 1, 0], [0, -1, 0, 0]]


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    learning = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in learning.items()}


def wanted_gradients() -> dict[str, torch.Tensor]:
    """Of the mean over both ranks' batches, by one process."""
    model, (x, tasks) = Model(), batches()
    loss_of(model, x.flatten(0, 1), tasks[0] + tasks[1]).backward()
    return gradients(model)


def absent_tasks(rank: int, shard: bool) -> None:
    model, (x, tasks) = Model(), batches()
    if shard:
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model, find_unused_parameters=False)
    for _ in range(2):  # DDP complains of a parameter without a gradient at the next forward
        model.zero_grad()
        loss_of(model, x[rank], tasks[rank]).backward()
    got, want = gradients(model), wanted_gradients()
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert (torch.count_nonzero(gradient) == 0) == name.endswith(".c")
        torch.testing.assert_close(gradient, want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_tasks_that_are_absent_on_a_rank_get_exact_zeros_and_the_others_one_process_s_gradients(shard):
    in_two(absent_tasks, shard)


def mixed_inference(rank: int) -> None:
    model, twin = Model(), Model()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    x, tasks = batches()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.003) for m in (model, twin)]
    for _ in range(3):
        with torch.no_grad():  # the bank of the last round must not be read again
            got, want = model(x[0], task_ids=tasks[0]), twin(x[0], task_ids=tasks[0])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x[0], task_ids=tasks[0]).square().mean().backward()
            optimizer.step()
    with torch.no_grad(), route(model, tasks[1]):
        torch.testing.assert_close(model(x[0]), twin(x[0], task_ids=tasks[1]), rtol=1e-5, atol=1e-6)
    for task in TASKS:  # one task after the other, by the slot
        for m in (model, twin):
            set_task(m, task, train=False)
        with torch.no_grad():
            torch.testing.assert_close(model(x[0]), twin(x[0]), rtol=1e-5, atol=1e-6)


def test_sharded_parameters_are_read_anew_after_every_step():
    in_two(mixed_inference)
