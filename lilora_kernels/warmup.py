"""Compiling and loading ahead, so that no request, no training step and no graph capture waits for a kernel."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import backends
from .layers.base import AdaptedLinear
from .layers.experts import ExpertLinear
from .layers.lilora import LiLoRALinear
from .layers.mlp import gate_and_up, is_fused, unfused_reason
from .layers.rank_pool import RankPoolLinear
from .routing.context import BatchContext


def warmup(model: nn.Module) -> int:
    """Run every distinct adapted layer and fused MLP of `model` in each way that compiles or loads kernels of its own.

    These are each number of rows with kernels of its own; the active task and task ids, or of a pool of ranks one choice
    for all rows and one for each sample; evaluation, and training as the parameters now want gradients, with an input that
    wants one and with one that does not. Compiles what the Triton kernels need for these shapes and loads what the CUDA
    library and cuBLAS load at their first launch.

    Call it after the tasks are added or loaded and set, in the mode (train or eval) in which the model will run, and again
    when other parameters train. Inputs are random, contiguous and of the base weight's dtype, torch's default dtype where that is
    packed: call it under the autocast of the model's forwards. It runs on the current stream. Another stream and a capture
    compile and load nothing more; cuBLAS allocates a workspace for each, unless it is called under torch.cuda.stream.

    Parameters, gradients, modes, routes, counts of routers and random state stay as they are. It needs the memory of one
    forward and backward of 8192 rows through the largest layer. Returns the number of forwards: 0 where the backend has
    nothing to compile or load. Raises where a forced backend or plan cannot run, and what a function that chooses ranks raises
    outside the model's forward. Merged layers are left out.
    """
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trains = any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    cases = list(_cases(model))
    trained = [case for case in cases if case.layer.training]
    with _no_trace(layers):
        modes = {module: module.training for module in model.modules()}
        try:
            for module in modes:
                module.training = False  # layers forget by train() what they gathered
            with torch.no_grad():
                for case in trained:
                    case.run(case.x())
        finally:
            for module, mode in modes.items():
                module.training = mode
        wanted = (True, False) if trains else (False,)
        for case in cases:
            for x_trains in wanted:
                _step(case, case.x().requires_grad_(x_trains), trainable)
    return len(trained) + len(cases) * len(wanted)


@dataclass
class _Case:
    """One way to call a layer, or gate_proj and up_proj of a fused MLP as one: see `run`."""

    layer: AdaptedLinear
    up: LiLoRALinear | None
    like: Tensor  # [1, K], of the dtype and on the device of the inputs
    rows: int
    routed: bool
    teacher: bool = False
    known: int | None = (
        None  # of a routed one whose ids the host knows, as a route does: which of the layer's tasks they are
    )

    def x(self) -> Tensor:
        """[samples, rows of each, K]; ranks of a pool are chosen for each sample, and for all rows where it is one."""
        samples = next((n for n in range(2, self.rows + 1) if self.rows % n == 0), 1) if self.routed else 1
        shape = samples, self.rows // samples, self.layer.in_features
        return torch.randn(shape, device=self.like.device).to(self.like.dtype)

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        layer, tasks = self.layer, self.layer.model_tasks
        if isinstance(layer, RankPoolLinear):
            with tasks.use(tasks.example(x, self.teacher)):
                return (layer(x),)
        task, context = None, BatchContext(None)
        if self.routed:
            t = tasks.id_of((layer.active or layer.tasks)[self.known or 0])
            task = torch.full((len(x),), t, dtype=torch.int32, device=x.device)
            if self.known is not None:
                task, context = None, BatchContext(task, vision_tokens=[1] * len(x), ids=[t] * len(x))
        with tasks.use(context):
            return (layer(x, task=task),) if self.up is None else gate_and_up(layer, self.up, x, task) or ()


def _cases(model: nn.Module) -> Iterator[_Case]:
    seen = set()
    for module in model.modules():
        fused = is_fused(module) and unfused_reason(module.gate_proj, module.up_proj) is None
        layer, up = (module.gate_proj, module.up_proj) if fused else (module, None)
        if not isinstance(layer, AdaptedLinear) or not (ways := _ways(layer)):
            continue
        like = layer.example()
        op = "delta_pair" if fused else "delta" if layer.unfused_reason() is not None else "linear"
        key = op, like.device, like.dtype, _identity(layer), up and _identity(up)
        if key in seen:
            continue
        seen.add(key)
        # How many ranks of a pool are chosen shows in its forward.
        rank = 0 if isinstance(layer, RankPoolLinear) else layer.rank
        for rows in backends.choose(op, like, rank, layer.sub_rank).rows(like.device):
            yield from (_Case(layer, up, like, rows, *way) for way in ways)
            if isinstance(layer, LiLoRALinear) and rows > backends.ONE_LAUNCH_ROWS and _knows_more(like.device):
                first_and_last = {0, len(layer.active or layer.tasks) - 1}
                yield from (_Case(layer, up, like, rows, True, known=at) for at in first_and_last)


def _knows_more(device: torch.device) -> bool:
    """Whether there is a plan for rows whose tasks the host knows beside that for those it does not see."""
    return device.type != "cpu"


def _ways(layer: AdaptedLinear) -> list[tuple[bool, ...]]:
    """`routed`, and for a pool `teacher`, of each case; none where the forward is that of the base."""
    if isinstance(layer, RankPoolLinear):
        whole = [False, True] if layer.rank else []
        return [(way,) for way in whole] + [(way, True) for way in (False, True) if layer.teacher]
    experts = isinstance(layer, ExpertLinear)  # no kernels to compile
    if experts or not isinstance(layer, LiLoRALinear) or not layer.tasks or layer.merged_task is not None:
        return []
    return [(False,), (True,)] if len(layer.active) == 1 else [(True,)]


def _identity(layer: AdaptedLinear) -> tuple:
    """What decides which kernels a layer takes, beside the device and dtype of x."""
    own = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters())
    choice: tuple = ()
    if isinstance(layer, RankPoolLinear):
        chooser = getattr(layer.choose, "__code__", type(layer.choose))
        choice = id(layer.model_tasks), chooser, tuple((n, a.shape, a.dtype) for n, (a, _) in layer.teacher.items())
    dropout = layer.training and layer.dropout > 0
    return type(layer), own, dropout, layer.unfused_reason(), getattr(layer, "active", None), choice


def _step(case: _Case, x: Tensor, trainable: list[nn.Parameter]) -> None:
    """A forward and, where anything wants gradients, its backward; both leave memory with this frame."""
    ys = case.run(x)
    if any(y.requires_grad for y in ys):
        inputs = [x, *trainable] if x.requires_grad else trainable
        torch.autograd.grad(ys, inputs, [y.detach() for y in ys], allow_unused=True)


@contextmanager
def _no_trace(layers: list[AdaptedLinear]) -> Iterator[None]:
    """Put back what forwards leave behind: random state, what routes and routers have seen, and what layers have gathered."""
    tasks = {layer.model_tasks: (layer.model_tasks.seen, layer.model_tasks.routed) for layer in layers}
    gathered = [(layer, layer._gathered) for layer in layers if isinstance(layer, RankPoolLinear)]
    routers = [layer.choose for layer in layers if isinstance(layer, RankPoolLinear)]
    counts = [count for router in routers if isinstance(router, nn.Module) for count in router.buffers()]
    counted = [count.clone() for count in counts]
    devices = {layer.example().device for layer in layers}
    try:
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            yield
    finally:
        for one, seen in tasks.items():
            one.seen, one.routed = seen
        for layer, value in gathered:
            layer._gathered = value
        with torch.no_grad():
            for count, value in zip(counts, counted, strict=True):
                count.copy_(value)
