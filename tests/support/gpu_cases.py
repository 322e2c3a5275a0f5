"""Inputs on a GPU, and the errors of our operations there against the formula in fp64."""

from dataclasses import fields

import torch
import torch.nn.functional as F

from lilora_kernels import functional
from lilora_kernels.ops.delta import reference
from lilora_kernels.ops.philox import keep_mask, keep_scale
from support.cases import NAMES, SCALING, Errors, Inputs, adapter, base, case_id, make

# Numbers of rows that meet every bucket of the shipped configurations.
ROWS = {"few": (0, 1, 2, 17, 63, 64, 65, 127, 255), "some": (257, 300, 1000), "many": (2049, 3001)}
IDS = ("same", "distinct", "runs", "sorted", "random")


def make_on_gpu(*args, **kwargs) -> Inputs:
    i = make(*args, **kwargs)
    return Inputs(**{f.name: None if (t := getattr(i, f.name)) is None else t.cuda() for f in fields(i)})


def make_pair(outputs, **shape) -> list[Inputs]:
    """Two adapters of one x and one task index, `outputs` wide and half as wide again."""
    one, two = make_on_gpu(outputs=outputs, **shape), make_on_gpu(outputs=outputs * 3 // 2, **shape)
    two.x, two.task = one.x, one.task
    return [one, two]


def seed_tensor(value: int) -> torch.Tensor:
    return torch.tensor([value], device="cuda")


def base_on_gpu(i: Inputs) -> list[torch.Tensor]:
    return [t.cuda() for t in base(i)]


def ours(op, inputs, bases, p, seed):
    one = inputs[0]
    options = {"task": one.task, "scaling": SCALING, "p": p, "seed": seed}
    if op == "pair":
        return functional.delta_pair(one.x, adapter(one)[1:], adapter(inputs[1])[1:], bases=bases, **options)
    options |= {"gate": one.gate, "gate_row": one.gate_row}
    if op == "linear":
        return (functional.linear(one.x, *bases[0], *adapter(one)[1:], **options),)
    return (functional.delta(*adapter(one), **options),)


def formula(op, inputs, bases, p, seed):
    mask = (keep_mask(seed, *inputs[0].x.shape, p), keep_scale(p)) if p else ()
    for i, base_ in zip(inputs, bases, strict=True):
        gate_row = None if i.gate_row is None else i.gate_row.long()
        y = reference.delta(*adapter(i), i.task, i.gate, gate_row, *mask, scaling=SCALING)
        yield y if op == "delta" else y + F.linear(i.x, *(t.to(i.x.dtype) for t in base_))


def leaves(inputs, names):
    """Copies that require gradients, x one tensor of all of them; and the tensors to differentiate for, by name."""
    copies = [i.leaves(names) for i in inputs]
    for copy in copies[1:]:
        copy.x = copies[0].x
    wanted = {}
    for at, copy in enumerate(copies):
        wanted |= {f"d{n}{at or ''}": getattr(copy, n) for n in names if n != "x" or at == 0}
    return copies, {name: t for name, t in wanted.items() if t is not None}


def add_errors(errors: Errors, op: str, inputs: list[Inputs], p: float = 0.0, seed=None, names=NAMES, label="") -> None:
    """One forward and backward of ours, of the formula in the same dtype, and of the formula in fp64.

    op: delta, linear or pair (with bases). Each name's errors make one pool per label.
    """
    bases = [base_on_gpu(i) for i in inputs]
    results, dys = [], None
    for run, given in ((ours, inputs), (formula, inputs), (formula, [i.to(torch.float64) for i in inputs])):
        copies, wanted = leaves(given, names)
        ys = list(run(op, copies, bases, p, seed))
        if dys is None:
            dys = [torch.randn_like(y) for y in ys]
        grads = torch.autograd.grad(ys, list(wanted.values()), [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)])
        results.append({f"y{at or ''}": y.detach() for at, y in enumerate(ys)} | dict(zip(wanted, grads, strict=True)))
    got, plain, truth = results
    for name, tensor in got.items():
        assert tensor.dtype == plain[name].dtype
        if not name.startswith("dfusion"):
            errors.add(f"{name}{label}", tensor, plain[name], truth[name])
        elif len(inputs[0].x) > 60 and tensor.numel() > 1:
            # One number for each task, which may all but cancel: judged over many rows and tasks, and all calls together.
            errors.add(name, tensor, plain[name], truth[name])


def run_all(op, i, p=0.0, seed=None):
    """y and all gradients of one operation, for a dy that is the same in every call."""
    copies, wanted = leaves([i], NAMES)
    bases = [base_on_gpu(i)] if op == "linear" else None  # copies to the device, which a graph cannot capture
    (y,) = ours(op, copies, bases, p, seed)
    dy = torch.cos(torch.arange(y.numel(), device="cuda")).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(wanted.values()), dy)]


def assert_equal(got, want):
    for ours_, theirs in zip(got, want, strict=True):
        assert torch.equal(ours_, theirs)


def capture(function):
    """A CUDA graph of one call, and what it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


# What makes a kernel of its own; numbers of rows and tasks, and how the tasks lie, do not, and vary inside a test.
AXES = {
    "kind": [
        (torch.bfloat16, 128, 64),
        (torch.float16, 100, 17),
        (torch.bfloat16, 16, 8),
        (torch.float32, 16, 8),
        (torch.float16, 4, 1),
    ],
    "size": [(256, 384), (136, 72), (33, 47)],
    "rows": list(ROWS),
    "coefficients": ["fusion", "plain", "lora"],
    "task_ids": [True, False],
    "gate": [False, True],
    "p": [0.05, 0.0],
}


def kind_id(case):
    dtype, *ranks = case["kind"]
    return case_id({**case, "kind": dtype, "ranks": ranks})


def check_variant(op, kind, size, rows, coefficients, task_ids, gate, p):
    dtype, rank, sub_rank = kind
    errors = Errors()
    for count in ROWS[rows]:
        for seed, mix in enumerate(IDS if task_ids else ("one",) * 8):
            shape = {"rows": count, "columns": size[0], "outputs": size[1], "rank": rank, "sub_rank": sub_rank}
            tasks = 8 if mix == "sorted" else 3
            shape |= {"tasks": tasks, "coefficients": coefficients, "mix": mix, "gate": gate, "dtype": dtype}
            i = make_on_gpu(**shape, seed=seed)
            add_errors(errors, op, [i], p, seed_tensor(count * 2**33 + seed), label=f", {count} rows")
    errors.check()


def check_shape(op, *sizes, names=NAMES, seeds=4, **shape):
    errors = Errors()
    for seed in range(seeds):
        add_errors(errors, op, [make_on_gpu(*sizes, **shape, seed=seed)], 0.05, seed_tensor(-seed), names)
    errors.check()
