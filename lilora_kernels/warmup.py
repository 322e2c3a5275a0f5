"""Compiling ahead, so that no request and no training step waits for a kernel."""

import torch
from torch import nn

from .linear import LiLoRALinear
from .ops import triton_runtime


def warmup(model: nn.Module) -> int:
    """Run every distinct adapted layer of `model` once for each bucket of rows that has a launch configuration.

    Compiles the Triton kernels for its shapes: forward with the active task and with task ids, and backward where
    parameters learn. Inputs are random; parameters, gradients and random state stay as they are. Call it after the
    tasks are added or loaded, in the mode (train or eval) in which the model will run. Returns the number of runs.
    Where Triton cannot run, it does nothing and returns 0.
    """
    runs, seen = 0, set()
    for layer in model.modules():
        if not isinstance(layer, LiLoRALinear) or not layer.tasks:
            continue
        x = layer.example()
        if triton_runtime.refusal(x, layer.rank, layer.sub_rank) is not None:
            continue
        parameters = [p for p in layer.parameters() if p.requires_grad]
        key = (
            layer.in_features, layer.out_features, layer.rank, layer.sub_rank, layer.fusion, layer.training, x.dtype,
            layer.unfused_reason(), getattr(layer.base_layer, "bias", None) is None, len(parameters), layer.active,
        )  # fmt: skip
        if key in seen:
            continue
        seen.add(key)
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            for rows in triton_runtime.bucket_rows(x.device):
                runs += _run(layer, torch.randn(rows, 1, layer.in_features, device=x.device).to(x.dtype), parameters)
    return runs


def _run(layer: LiLoRALinear, x: torch.Tensor, parameters: list[nn.Parameter]) -> int:
    ids = torch.full((x.shape[0],), layer.routes.tasks.index(layer.tasks[0]), dtype=torch.int32, device=x.device)
    x.requires_grad_(bool(parameters))
    ways = [ids] if len(layer.active) > 1 or layer.merged_task is not None else [None, ids]
    for task in ways:
        y = layer(x, task=task)
        if y.requires_grad:
            torch.autograd.grad(y, [x, *parameters], torch.randn_like(y), allow_unused=True)
    return len(ways)
