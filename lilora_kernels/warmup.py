"""Compiling and loading ahead, so that no request, no training step and no graph capture waits for a kernel."""

import torch
from torch import nn

from . import backends
from .linear import LiLoRALinear
from .mlp import apart, gate_and_up, is_fused


def warmup(model: nn.Module) -> int:
    """Run every distinct LiLoRALinear and fused MLP of `model` once for each number of rows with kernels of its own.

    Compiles what the Triton kernels need for its shapes and loads what the CUDA library and cuBLAS load at their first
    launch: forward with the active task and with task ids, and backward where parameters learn, with and without a gradient
    of the input. Not yet covered, so that a first call may still compile: evaluation of a layer in train mode,
    the gradient of x through layers of which nothing learns, a single row. Inputs are random; parameters, gradients, routes
    and random state stay as they are.

    Call it after the tasks are added or loaded and set, in the mode (train or eval) and under the autocast in which the
    model will run; it needs the memory of one forward and backward of 8192 rows through the largest layer. Returns the
    number of runs: 0 where the backend has nothing to compile or load. Raises where a selected backend cannot run. Merged
    layers are left out, and layers with a pool of ranks (RankPoolLinear), whose kernels follow from what is chosen for a
    batch: run one batch through these.
    """
    runs, seen = 0, set()
    for module in model.modules():
        fused = is_fused(module) and apart(module.gate_proj, module.up_proj) is None
        layer, up = (module.gate_proj, module.up_proj) if fused else (module, None)
        if not isinstance(layer, LiLoRALinear) or not layer.tasks or layer.merged_task is not None:
            continue
        x = layer.example()
        op = "delta_pair" if fused else "delta" if layer.unfused_reason() is not None else "linear"
        parameters = [*layer.named_parameters(), *(() if up is None else up.named_parameters())]
        own = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in parameters)
        # Views into a flat buffer of an optimizer may lie anywhere: Triton compiles for what is aligned.
        own += tuple(p.data_ptr() % 16 == 0 for name, p in parameters if name.startswith("lilora_"))
        key = op, x.device, x.dtype, layer.training and layer.dropout > 0, layer.unfused_reason(), layer.active, own
        if key in seen:
            continue
        seen.add(key)
        before = layer.routes.seen, layer.routes.routed
        with torch.random.fork_rng([x.device] if x.is_cuda else []), layer.routes.use(None):
            for rows in backends.choose(op, x, layer.rank, layer.sub_rank).rows(x.device):
                runs += _run(layer, up, torch.randn(rows, 1, layer.in_features, device=x.device).to(x.dtype))
        layer.routes.seen, layer.routes.routed = before
    return runs


def _run(layer: LiLoRALinear, up: LiLoRALinear | None, x: torch.Tensor) -> int:
    """Each way in which the layer may be called with so many rows; returns how many these are."""
    parameters = [p for one in (layer, up) if one is not None for p in one.parameters() if p.requires_grad]
    ids = torch.full((x.shape[0],), layer.routes.tasks.index(layer.tasks[0]), dtype=torch.int32, device=x.device)
    # The input of a model's first layer wants no gradient: another set of arguments, hence another kernel.
    ways = [
        (t, wanted)
        for t in ([None, ids] if len(layer.active) == 1 else [ids])
        for wanted in ([True, False] if parameters else [False])
    ]
    for task, wanted in ways:
        leaf = x.detach().requires_grad_(wanted)
        ys = (layer(leaf, task=task),) if up is None else gate_and_up(layer, up, leaf, task) or ()
        if any(y.requires_grad for y in ys):
            inputs = [leaf, *parameters] if wanted else parameters
            torch.autograd.grad(ys, inputs, [torch.randn_like(y) for y in ys], allow_unused=True)
    return len(ways)
