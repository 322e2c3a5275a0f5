"""The implementations that are compared on one adapted linear, each at its best setting.

A peer builds itself on the same operands for every other peer, and says its own adapter's formula on fp64 tensors: the
gate compares with that before anything is timed. A peer that cannot do a problem raises Unavailable with the reason.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilora_kernels import LiLoRALinear, backend, backends, functional
from lilora_kernels.ops.delta import reference

from .problems import SCALING, Operands, Problem, samples

Adapter = Callable[[Tensor, list[Tensor]], Tensor]


class Unavailable(Exception):
    """Why a peer cannot run here."""


@dataclass(frozen=True)
class Built:
    """A peer on its operands, by set: `forward(at)` -> y; `leaves[at]` is x and the parameters that learn.

    adapter(dropped x, parameters): the formula of its adapter, for the gate, in the dtype of what it gets. The parameters
    are those that learn, or in inference those of set 0. ordered(): what forces a backend or plan.
    """

    forward: Callable[[int], Tensor]
    leaves: list[list[Tensor]]
    adapter: Adapter
    ordered: Callable[[], AbstractContextManager] = nullcontext  # around forward and backward


@dataclass(frozen=True)
class Peer:
    title: str
    build: Callable[[list[Operands], bool], Built]
    no_graph: str | None = None  # why a CUDA graph cannot capture it


# --- formulas ---------------------------------------------------------------------------------------------------------


def lilora_adapter(problem: Problem) -> Adapter:
    """Parameters a, b0, then u, v and fusion stacked."""

    def adapter(x: Tensor, parameters: list[Tensor]) -> Tensor:
        a, b0, u, v, fusion = parameters
        parts = [
            reference.delta(x[rows], a, b0, u[t : t + 1], v[t : t + 1], fusion[t : t + 1], scaling=SCALING)
            for t, rows in samples(problem)
        ]
        return torch.cat(parts)

    return adapter


def lora_adapter(problem: Problem, tasks: int) -> Adapter:
    """Parameters A of every task, then B of every task; one task serves all rows."""

    def adapter(x: Tensor, parameters: list[Tensor]) -> Tensor:
        down, up = parameters[:tasks], parameters[tasks:]
        parts = [
            reference.delta(x[rows], down[t], up[t], scaling=SCALING)
            for t, rows in (samples(problem) if tasks > 1 else [(0, slice(None))])
        ]
        return torch.cat(parts)

    return adapter


@torch.no_grad()
def up_projection(s: Operands, t: int) -> Tensor:
    """M_t in fp64."""
    f = torch.sigmoid(s.fusion[t].double())
    return f * s.b0 + (1 - f) * (s.u[t].double() @ s.v[t].double())


@torch.no_grad()
def merged_weight(s: Operands, t: int) -> Tensor:
    return (s.weight.double() + SCALING * up_projection(s, t) @ s.a.double()).to(s.x.dtype)


# --- ours and the base ------------------------------------------------------------------------------------------------


def base_alone(sets: list[Operands], forward: Callable[[int], Tensor]) -> Built:
    """A peer without an adapter."""
    return Built(forward, [[s.x] for s in sets], lambda x, _: 0 * x[:, :1])


def base(sets: list[Operands], training: bool) -> Built:
    return base_alone(sets, lambda at: F.linear(sets[at].x, sets[at].weight))


def frozen_linear(s: Operands) -> nn.Linear:
    linear = nn.Linear(s.problem.columns, s.problem.outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(s.weight, requires_grad=False)
    return linear


def own(tensor: Tensor, training: bool) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=training)


def lilora_layer(s: Operands, training: bool) -> tuple[LiLoRALinear, list[Tensor]]:
    """The layer with one adapter per task, and its parameters in the order of the formula."""
    problem = s.problem
    layer = LiLoRALinear(
        frozen_linear(s), problem.rank, problem.sub_rank, SCALING * problem.rank, problem.p, train_a="always",
        train_b0="always",
    )  # fmt: skip
    names = [f"task{t}" for t in range(problem.tasks)]
    for t, name in enumerate(names):
        layer.add_task(name)
        with torch.no_grad():
            layer.lilora_U[name].copy_(s.u[t])
            layer.lilora_V[name].copy_(s.v[t])
            layer.lilora_fusion[name].fill_(s.fusion[t])
    with torch.no_grad():
        layer.lilora_A[names[0]].copy_(s.a)
        layer.lilora_B[names[0]].copy_(s.b0)
    layer.set_task(*names, train=training)
    layer.train(training)
    per_task = [[d[name] for name in names] for d in (layer.lilora_U, layer.lilora_V, layer.lilora_fusion)]
    return layer, [layer.lilora_A[names[0]], layer.lilora_B[names[0]], *(p for group in per_task for p in group)]


def ours(sets: list[Operands], training: bool) -> Built:
    """LiLoRALinear, the row's task given for a mixed batch; in inference as `freeze` lays the tasks out to be served."""
    problem = sets[0].problem
    tasks = problem.tasks
    layers = [lilora_layer(s, training) for s in sets]
    if tasks > 1 and not training:
        for layer, _ in layers:
            layer.freeze(tasks)
    formula = lilora_adapter(problem)

    def adapter(x: Tensor, parameters: list[Tensor]) -> Tensor:
        u, v, fusion = (torch.stack(parameters[2 + i * tasks : 2 + (i + 1) * tasks]) for i in range(3))
        return formula(x, [*parameters[:2], u, v, fusion.squeeze(1)])

    def forward(at: int) -> Tensor:
        return layers[at][0](sets[at].x, task=sets[at].task)

    leaves = [[s.x, *parameters] for s, (_, parameters) in zip(sets, layers, strict=True)]
    return Built(forward, leaves, adapter)


def ours_operation(sets: list[Operands], training: bool) -> Built:
    """The operation alone on factors that are stacked already, as a gathered bank holds them."""
    problem = sets[0].problem

    def forward(at: int) -> Tensor:
        s = sets[at]
        p = problem.p if training else 0.0
        seed = functional.draw_seed(s.x.device) if p else None
        return functional.linear(s.x, s.weight, None, *s.factors(), task=s.task, seed=seed, scaling=SCALING, p=p)

    return Built(forward, [s.gradients() for s in sets], lilora_adapter(problem))


def ours_by(name: str) -> Callable[[list[Operands], bool], Built]:
    """The layer under a backend that is not the first one here."""

    def build(sets: list[Operands], training: bool) -> Built:
        problem = sets[0].problem
        reasons = backends.unsupported_reasons("linear", sets[0].x, problem.rank, problem.sub_rank)
        if reasons[name] is not None:
            raise Unavailable(reasons[name])
        if next(other for other, reason in reasons.items() if reason is None) == name:
            raise Unavailable("it is what `ours` runs here")
        return replace(ours(sets, training), ordered=partial(backend, name))

    return build


def ours_by_plan(name: str, plan: str) -> Callable[[list[Operands], bool], Built]:
    """`ours_operation` by one plan of a backend."""

    @contextmanager
    def ordered() -> Iterator[None]:
        with backend(name), backends.plan(plan):
            yield

    def build(sets: list[Operands], training: bool) -> Built:
        built = replace(ours_operation(sets, training), ordered=ordered)
        try:
            with torch.no_grad(), ordered():
                built.forward(0)
        except backends.Unsupported as reason:
            raise Unavailable(str(reason)) from reason
        return built

    return build


def formula(sets: list[Operands], training: bool, compiled: bool = False) -> Built:
    """The formula in PyTorch, for equal samples that lie task by task. With fewer rows than ranks M_t stays factored."""
    problem = sets[0].problem
    if problem.rows % problem.tasks:
        raise Unavailable("it needs samples of equal length")
    per_task = problem.rows // problem.tasks
    p = problem.p if training else 0.0

    def run(x, weight, a, b0, u, v, fusion):
        h = F.linear(F.dropout(x, p) if p else x, a)
        f = torch.sigmoid(fusion.float())
        y = F.linear(x, weight)
        if problem.tasks == 1 and per_task >= problem.rank:
            m = f * b0 + (1 - f) * (u[0] @ v[0])
            return torch.addmm(y, h, m.to(h.dtype).T, alpha=SCALING)
        split, y_split = h.view(problem.tasks, per_task, -1), y.view(problem.tasks, per_task, -1)
        f = f.view(-1, 1, 1)
        if per_task >= problem.rank:
            m = f * b0 + (1 - f) * (u @ v)
            return torch.baddbmm(y_split, split, m.to(h.dtype).transpose(1, 2), alpha=SCALING).view(y.shape)
        z = torch.bmm(((1 - f) * split).to(h.dtype), v.transpose(1, 2))
        y = torch.addmm(y, (f * split).to(h.dtype).view(h.shape), b0.T, alpha=SCALING)
        return torch.baddbmm(y.view(y_split.shape), z, u.transpose(1, 2), alpha=SCALING).view(y.shape)

    run = torch.compile(run, dynamic=False) if compiled else run
    return Built(
        lambda at: run(sets[at].x, sets[at].weight, *sets[at].factors()),
        [s.gradients() for s in sets],
        lilora_adapter(problem),
    )


def formula_compiled(sets: list[Operands], training: bool) -> Built:
    return formula(sets, training, compiled=True)


def merged(sets: list[Operands], training: bool) -> Built:
    """M_t merged into a weight per task, ahead of time: what a model per task costs."""
    problem = sets[0].problem
    if training:
        raise Unavailable("a merged weight cannot train its adapter")
    size = problem.tasks * sets[0].weight.nbytes * len(sets)
    if size > (8 << 30):
        raise Unavailable(f"{problem.tasks} merged weights in {len(sets)} sets of inputs take {size / 2**30:.0f} GiB")
    weights = [[merged_weight(s, t) for t in range(problem.tasks)] for s in sets]

    def forward(at: int) -> Tensor:
        x = sets[at].x
        if problem.tasks == 1:
            return F.linear(x, weights[at][0])
        return torch.cat([F.linear(x[rows], weights[at][t]) for t, rows in samples(problem)])

    return Built(forward, [s.gradients() for s in sets], lilora_adapter(problem))


# --- a LoRA per task --------------------------------------------------------------------------------------------------


def lora_factors(s: Operands, tasks: int) -> tuple[list[Tensor], list[Tensor]]:
    """A and B of every task: the ranks of A in another order for each, and M_t."""
    down = [s.a.detach().roll(t, 0) for t in range(tasks)]
    up = [up_projection(s, t).to(s.x.dtype).roll(t, 1) for t in range(tasks)]
    return down, up


def peft_layers(sets: list[Operands], training: bool, tasks: int, wide: bool) -> list[tuple[nn.Module, list[Tensor]]]:
    """PEFT's LoRA layers with the same factors; `wide` leaves the adapters in fp32, PEFT's default."""
    import peft

    problem = sets[0].problem
    config = peft.LoraConfig(
        r=problem.rank, lora_alpha=SCALING * problem.rank, lora_dropout=problem.p, target_modules=["0"],
        init_lora_weights=False,  # they are set below
    )  # fmt: skip
    names = [f"task{t}" for t in range(tasks)]
    found = []
    for s in sets:
        model = peft.get_peft_model(
            nn.Sequential(frozen_linear(s)), config, adapter_name=names[0], autocast_adapter_dtype=wide
        )
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=wide)
        layer = model.base_model.model[0].to(s.x.device).train(training)
        dtype = torch.float32 if wide else s.x.dtype
        factors = zip(names, *lora_factors(s, tasks), strict=True)
        for name, a, b in factors:
            layer.lora_A[name].weight = own(a.to(dtype), training)
            layer.lora_B[name].weight = own(b.to(dtype), training)
        parameters = [layer.lora_A[name].weight for name in names] + [layer.lora_B[name].weight for name in names]
        found.append((layer, parameters))
    return found


def peft_lora(sets: list[Operands], training: bool, wide: bool = False, compiled: bool = False) -> Built:
    """One adapter for all rows: PEFT trains no mixed batch."""
    if wide and sets[0].x.dtype == torch.float32:
        raise Unavailable("in fp32 it is the same as `peft`")
    layers = peft_layers(sets, training, 1, wide)
    calls = [torch.compile(layer, dynamic=False) if compiled else layer for layer, _ in layers]
    leaves = [[s.x, *parameters] for s, (_, parameters) in zip(sets, layers, strict=True)]
    return Built(lambda at: calls[at](sets[at].x), leaves, lora_adapter(sets[0].problem, 1))


def peft_default(sets: list[Operands], training: bool) -> Built:
    return peft_lora(sets, training, wide=True)


def peft_compiled(sets: list[Operands], training: bool) -> Built:
    return peft_lora(sets, training, compiled=True)


def peft_names(sets: list[Operands], training: bool) -> Built:
    """adapter_names: one adapter per sample."""
    problem = sets[0].problem
    if training:
        raise Unavailable("PEFT refuses adapter_names in training")
    layers = peft_layers(sets, training, problem.tasks, wide=False)
    if problem.rows % problem.tasks:
        raise Unavailable("it needs samples of equal length")
    names = [f"task{t}" for t in range(problem.tasks)]
    leaves = [[s.x, *parameters] for s, (_, parameters) in zip(sets, layers, strict=True)]

    def forward(at: int) -> Tensor:
        x = sets[at].x.view(problem.tasks, -1, problem.columns)
        return layers[at][0](x, adapter_names=names).view(problem.rows, problem.outputs)

    return Built(forward, leaves, lora_adapter(problem, problem.tasks))


def grouped_mm(sets: list[Operands], training: bool) -> Built:
    """A LoRA per task by two grouped products over rows that are sorted already, factors stacked already."""
    problem = sets[0].problem
    if problem.tasks == 1:
        raise Unavailable("one task has nothing to group")
    if problem.dtype != torch.bfloat16 and sets[0].x.is_cuda:
        raise Unavailable(f"grouped_mm takes bfloat16 on a GPU, not {problem.dtype_name}")
    offsets = torch.tensor([rows.stop for _, rows in samples(problem)], dtype=torch.int32, device=sets[0].x.device)
    p = problem.p if training else 0.0
    stacks = []
    for s in sets:
        down, up = lora_factors(s, problem.tasks)
        stacks.append([own(torch.stack(down), training), own(torch.stack(up), training)])

    def forward(at: int) -> Tensor:
        x, (down, up) = sets[at].x, stacks[at]
        h = F.grouped_mm(F.dropout(x, p) if p else x, down.transpose(1, 2), offs=offsets)
        y = F.grouped_mm(h, up.transpose(1, 2), offs=offsets)
        return torch.add(F.linear(x, sets[at].weight), y, alpha=SCALING)

    formula = lora_adapter(problem, problem.tasks)
    leaves = [[s.x, *stack] for s, stack in zip(sets, stacks, strict=True)]
    return Built(forward, leaves, lambda x, stack: formula(x, [*stack[0], *stack[1]]))


PEERS = {
    "base": Peer("frozen base, F.linear", base),
    "ours": Peer("LiLoRALinear", ours),
    "ours_operation": Peer("lilora::linear on stacked factors", ours_operation),
    **{f"ours_{name}": Peer(f"LiLoRALinear, backend {name}", ours_by(name)) for name in backends.BACKENDS},
    **{
        f"ours_{name}_{plan}": Peer(f"lilora::linear, {name}, {plan}", ours_by_plan(name, plan))
        for name, plans in backends.plans("linear").items()
        for plan in plans
        if len(plans) > 1  # else it is what the layer runs
    },
    "formula": Peer("LiLoRA's formula in PyTorch", formula),
    "formula_compiled": Peer("the formula under torch.compile", formula_compiled),
    "merged": Peer("merged, a weight per task", merged),
    "peft": Peer("PEFT LoRA, adapters in the base's dtype, one for all rows", peft_lora),
    "peft_default": Peer("PEFT LoRA, its defaults (fp32 adapters), one for all rows", peft_default),
    "peft_compiled": Peer("PEFT LoRA under torch.compile, one for all rows", peft_compiled),
    "peft_names": Peer("PEFT LoRA, adapter_names", peft_names, "it copies the rows of each adapter from the host"),
    "grouped_mm": Peer("a LoRA per task by F.grouped_mm", grouped_mm),
}
# Every way in which ours can run: what a backend or a plan registers is here without being named.
OURS = tuple(name for name in PEERS if name.startswith("ours"))
OURS_ON_GPU = tuple(name for name in OURS if not name.startswith("ours_cpu"))
