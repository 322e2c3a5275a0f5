"""Kernels and layers for continual, multi-task LoRA: x A (B0 + U_i V_i) with a task index per sample."""

from .attach import attach, route
from .backends import backend, plan
from .explain import explain
from .functional import delta, delta_pair, draw_seed, expert_linear, linear, rank_gate
from .layers.accelerated import accelerate_linears, restore_linears
from .layers.experts import LiLoRAExperts
from .layers.lilora import LiLoRALinear, set_task
from .layers.mlp import fuse_mlps, unfuse_mlps
from .layers.parameters import check_task_name
from .layers.rank_pool import RankPoolLinear
from .ops.experts.groups import group_rows
from .routing.context import BatchContext
from .serving import freeze, unfreeze
from .version import __version__
from .warmup import warmup

__all__ = [
    "BatchContext",
    "LiLoRAExperts",
    "LiLoRALinear",
    "RankPoolLinear",
    "__version__",
    "accelerate_linears",
    "attach",
    "backend",
    "check_task_name",
    "delta",
    "delta_pair",
    "draw_seed",
    "expert_linear",
    "explain",
    "freeze",
    "fuse_mlps",
    "group_rows",
    "linear",
    "plan",
    "rank_gate",
    "restore_linears",
    "route",
    "set_task",
    "unfreeze",
    "unfuse_mlps",
    "warmup",
]
