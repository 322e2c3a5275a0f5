"""The processes that `accelerate launch` or torchrun started for one run: how they connect, who writes, how they agree.

Every process runs the whole command and holds the same learner. The first one, rank 0, writes and prints; the Trainer
divides the batches and reduces the gradients. Without a launcher everything here is that of one process.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import DeepSpeedPlugin

from lilora.errors import UserError

Result = TypeVar("Result")


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def sharded() -> bool:
    """Whether the Trainer shards the parameters (FSDP2)."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def deepspeed() -> bool:
    """Whether DeepSpeed trains, which keeps copies of the parameters of its own and leaves no gradients behind."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def init(device: torch.device) -> None:
    """Connect this process to the others; UserError for an engine that is not supported."""
    if sharded():
        for key, value in (("FSDP_VERSION", "2"), ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")):
            if os.environ.get(key) != value:
                raise UserError(
                    f"{key.lower()} is {os.environ.get(key)} and only {value} is supported; start with "
                    "examples/accelerate/fsdp2.yaml"
                )
    if deepspeed() and DeepSpeedPlugin().zero_stage == 3:
        raise UserError("ZeRO-3 is not supported; use ZeRO-2, or FSDP2 to shard the parameters too")
    if world_size() == 1:
        return
    state = PartialState(cpu=device.type == "cpu")
    if sharded() and state.distributed_type == DistributedType.MULTI_CPU:
        raise UserError("accelerate shards nothing on CPUs; use examples/accelerate/ddp.yaml there")


def destroy() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_rank0(action: Callable[[], Result]) -> Result:
    """Run `action` in the first process alone; all get its result, once it is done."""
    if world_size() == 1:
        return action()
    result = [action() if rank() == 0 else None]
    torch.distributed.broadcast_object_list(result)
    return result[0]


def all_gather(own: Any) -> list[Any]:
    """`own` of every process, by rank."""
    if world_size() == 1:
        return [own]
    everyone: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def check_same(what: str, digest: Callable[[], str]) -> None:
    """UserError unless `digest` gives the same in all processes."""
    values = all_gather(digest()) if world_size() > 1 else []
    if len(set(values)) > 1:
        raise UserError(
            f"{what} differs between the processes ({', '.join(values)}); give all of them the same files and versions"
        )
