"""Compiling ahead, so that no request and no training step waits for a kernel."""

import torch
from torch import nn

from . import backends
from .linear import LiLoRALinear
from .mlp import apart, gate_and_up, is_fused
from .ops import triton_runtime


def warmup(model: nn.Module) -> int:
    """Run every distinct adapted layer and fused MLP of `model` once for each bucket of rows with a launch configuration.

    Compiles the Triton kernels for its shapes: forward with the active task and with task ids, and backward where
    parameters learn. Inputs are random; parameters, gradients, routes and random state stay as they are. Call it after
    the tasks are added or loaded, in the mode (train or eval) in which the model will run; it needs the memory of one
    forward and backward of 8192 rows through the largest layer. Returns the number of runs: 0 where Triton cannot run
    or another backend is ordered. Merged layers are left out.
    """
    if backends.requested() not in (None, "triton"):
        return 0
    runs, seen = 0, set()
    for module in model.modules():
        fused = is_fused(module) and apart(module.gate_proj, module.up_proj) is None
        layer, up = (module.gate_proj, module.up_proj) if fused else (module, None)
        if not isinstance(layer, LiLoRALinear) or not layer.tasks or layer.merged_task is not None:
            continue
        x = layer.example()
        if triton_runtime.refusal(x, layer.rank, layer.sub_rank) is not None:
            continue
        parameters = [*layer.named_parameters(), *(() if up is None else up.named_parameters())]
        own = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in parameters)
        # Views into a flat buffer of an optimizer may lie anywhere: Triton compiles for what is aligned.
        own += tuple(p.data_ptr() % 16 == 0 for name, p in parameters if name.startswith("lilora_"))
        key = x.device, x.dtype, layer.training and layer.dropout > 0, layer.unfused_reason(), layer.active, own
        if key in seen:
            continue
        seen.add(key)
        before = layer.routes.seen, layer.routes.routed
        with torch.random.fork_rng([x.device] if x.is_cuda else []), layer.routes.use(None):
            for rows in triton_runtime.bucket_rows(x.device):
                runs += _run(layer, up, torch.randn(rows, 1, layer.in_features, device=x.device).to(x.dtype))
        layer.routes.seen, layer.routes.routed = before
    return runs


def _run(layer: LiLoRALinear, up: LiLoRALinear | None, x: torch.Tensor) -> int:
    parameters = [p for one in (layer, up) if one is not None for p in one.parameters() if p.requires_grad]
    ids = torch.full((x.shape[0],), layer.routes.tasks.index(layer.tasks[0]), dtype=torch.int32, device=x.device)
    x.requires_grad_(bool(parameters))
    ways = [None, ids] if len(layer.active) == 1 else [ids]
    for task in ways:
        ys = (layer(x, task=task),) if up is None else gate_and_up(layer, up, x, task) or ()
        if any(y.requires_grad for y in ys):
            torch.autograd.grad(ys, [x, *parameters], [torch.randn_like(y) for y in ys], allow_unused=True)
    return len(ways)
