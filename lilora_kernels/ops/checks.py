"""Argument checks shared by the real and the fake implementation of every operation."""

import torch
from torch import Tensor

from .schema import FACTORS, AdapterArgs

OUTPUTS = {("b0", 0), ("u", -2)}  # the dimensions that may differ between the adapters of a pair: N


def check_delta(op: str, x: Tensor, adapter: AdapterArgs) -> None:
    """Raise ValueError (shapes, ranges) or TypeError (dtypes) in one sentence; never looks at a tensor's values."""

    a, b0, u, v, fusion, task, gate, gate_row, seed, _, p, ranks = adapter

    def wrong(argument: str, got: object, wanted: str) -> ValueError:
        return ValueError(f"{op}: {argument} is {got}; {wanted}")

    if x.dim() != 2:
        raise wrong("x", f"{x.dim()}-D", "it must be [M, K]: flatten the leading dimensions")
    rows, columns = x.shape
    if a.dim() != 2 or a.shape[1] != columns:
        raise wrong("a", list(a.shape), f"it must be [R, K] with K = {columns}, the columns of x")
    rank = a.shape[0]
    if rank < 1:
        raise wrong("a", list(a.shape), "R, its rows, must be at least 1")
    if b0.dim() != 2 or b0.shape[1] != rank:
        raise wrong("b0", list(b0.shape), f"it must be [N, R] with R = {rank}, the rows of a")
    if (u is None) != (v is None):
        raise wrong("u and v", "one of them None", "give both or neither")
    if u is not None and v is not None:
        tasks, one = u.shape[:-2], u.dim() == 2
        if u.dim() not in (2, 3) or u.shape[-2] != b0.shape[0]:
            raise wrong("u", list(u.shape), f"it must be [T, N, S], or [N, S], with N = {b0.shape[0]}, the rows of b0")
        if u.shape[-1] < 1:
            raise wrong(
                "u", list(u.shape), "S, its last dimension, must be at least 1; leave u and v out for plain LoRA"
            )
        if v.shape != (*tasks, u.shape[-1], rank):
            form = "[S, R]" if one else "[T, S, R]"
            raise wrong("v", list(v.shape), f"it must be {form} = {[*tasks, u.shape[-1], rank]}")
        if task is None and not one and u.shape[0] != 1:
            raise wrong("task", "None", f"with {u.shape[0]} tasks every row needs a task: pass task [M] int32")
        if task is not None and one:
            raise wrong(
                "task", "given", "u [N, S] is that of one task for all rows: leave task out, or give u [T, N, S]"
            )
    if fusion is not None:
        if u is None:
            raise wrong("fusion", "given", "it mixes b0 with u v: give u and v too")
        count = u.shape[0] if u.dim() == 3 else 1
        if fusion.shape != (count,):
            raise wrong("fusion", list(fusion.shape), f"it must be [T] with T = {count}")
    if gate is not None and (gate.dim() != 2 or gate.shape[1] != rank):
        raise wrong("gate", list(gate.shape), f"it must be [G, R] with R = {rank}")
    if gate_row is not None and gate is None:
        raise wrong("gate_row", "given", "it selects rows of gate: give gate too")
    if gate is not None and gate_row is None and gate.shape[0] != 1:
        raise wrong("gate_row", "None", f"with {gate.shape[0]} gates every row needs one: pass gate_row [M] int32")
    for name, index in (("task", task), ("gate_row", gate_row)):
        if index is None:
            continue
        if index.dtype != torch.int32:
            raise TypeError(f"{op}: {name} is {index.dtype}; it must be torch.int32")
        if index.dim() != 1 or index.shape[0] != rows:
            raise wrong(name, list(index.shape), f"it must be [M] with M = {rows}, the rows of x")
    if not 0 <= p < 1:
        raise wrong("p", p, "the dropout probability must be in [0, 1)")
    if p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise wrong("seed", None if seed is None else f"{seed.dtype} {list(seed.shape)}", "dropout needs one int64")
    if ranks is not None and (len(ranks) != 2 or not 0 <= ranks[0] <= ranks[1] <= rank):
        raise wrong("ranks", list(ranks), f"it must be (first, last + 1) within 0..{rank}")
    floats = {"x": x, "a": a, "b0": b0, "u": u, "v": v, "fusion": fusion, "gate": gate}
    for name, tensor in floats.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be a floating-point tensor")
    for name, tensor in {**floats, "task": task, "gate_row": gate_row, "seed": seed if p > 0 else None}.items():
        if tensor is not None and tensor.device != x.device:
            raise wrong(name, f"on {tensor.device}", f"move it to {x.device}, the device of x")


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: AdapterArgs) -> None:
    """What `linear` adds to the arguments of `delta`: the frozen base weight [N, K] and bias [N]."""
    check_delta(op, x, adapter)
    outputs = adapter.b0.shape[0]
    if weight.dim() != 2 or weight.shape[0] != outputs or weight.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: weight is {list(weight.shape)}; it must be [N, K] = {[outputs, x.shape[1]]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias is {list(bias.shape)}; it must be [N] with N = {weight.shape[0]}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} is {tensor.dtype}; use base_layer(x) + delta for quantised bases")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; move it to {x.device}, the device of x")


def check_pair(
    op: str,
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    biases: tuple[Tensor | None, ...],
    adapters: tuple[AdapterArgs, AdapterArgs],
) -> None:
    """Both adapters, with their bases where given; they may differ in N alone."""
    for weight, bias, adapter in zip(weights, biases, adapters, strict=True):
        if weight is not None:
            check_linear(op, x, weight, bias, adapter)
        elif bias is not None:
            raise ValueError(f"{op}: a bias is given without its weight; give the weight too")
        else:
            check_delta(op, x, adapter)
    for name in FACTORS:
        got = [None if t is None else list(t.shape) for t in (getattr(adapter, name) for adapter in adapters)]
        kept = [
            None if t is None else [n for i, n in enumerate(t) if not {(name, i), (name, i - len(t))} & OUTPUTS]
            for t in got
        ]
        if kept[0] != kept[1]:
            raise ValueError(
                f"{op}: {name}_1 is {got[0]} and {name}_2 is {got[1]}; r, sub_rank and tasks must be equal, "
                "and u, v, fusion given to both or neither"
            )


def check_expert_linear(op: str, x: Tensor, weight: Tensor, ends: Tensor, adapter: AdapterArgs) -> None:
    """Stacks of the arguments of `linear`, one for each expert, and where the groups of rows end."""
    if weight.dim() != 3 or weight.shape[0] < 1:
        raise ValueError(f"{op}: weight is {list(weight.shape)}; it must be [E, N, K], one matrix for each expert")
    experts = weight.shape[0]
    if ends.dtype != torch.int32:
        raise TypeError(f"{op}: ends is {ends.dtype}; it must be torch.int32")
    if ends.dim() not in (1, 2) or ends.shape[0] != experts or ends.shape[-1] < 1:
        raise ValueError(f"{op}: ends is {list(ends.shape)}; it must be [E] or [E, T + 1] with E = {experts}")
    own = ["E"] if ends.dim() == 1 else ["T", "E"]
    leading = (experts,) if ends.dim() == 1 else (ends.shape[1] - 1, experts)
    if not leading[0]:
        raise ValueError(f"{op}: ends is {list(ends.shape)}, of no task; give ends [E] for rows of one task")
    shared = {"a": (adapter.a, 2, ["R", "K"]), "b0": (adapter.b0, 2, ["N", "R"])}
    of_tasks = {"u": (adapter.u, 2, ["N", "S"]), "v": (adapter.v, 2, ["S", "R"]), "fusion": (adapter.fusion, 0, [])}
    for factors, stack, form in ((shared, (experts,), ["E"]), (of_tasks, leading, own)):
        for name, (tensor, last, sizes) in factors.items():
            if tensor is not None and (tensor.dim() != len(stack) + last or tensor.shape[: len(stack)] != stack):
                raise ValueError(
                    f"{op}: {name} is {list(tensor.shape)}; it must be [{', '.join(form + sizes)}] with "
                    f"{', '.join(form)} = {', '.join(map(str, stack))}, as ends has them"
                )
    a, b0 = adapter.a[0], adapter.b0[0]
    u, v = (t if t is None else t.flatten(0, -3)[0] for t in (adapter.u, adapter.v))
    if ends.device != x.device:
        raise ValueError(f"{op}: ends is on {ends.device}; move it to {x.device}, the device of x")
    fusion = None if adapter.fusion is None else adapter.fusion.flatten()[:1]
    check_linear(op, x, weight[0], None, adapter._replace(a=a, b0=b0, u=u, v=v, fusion=fusion))
