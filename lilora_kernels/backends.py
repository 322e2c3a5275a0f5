"""Which implementation runs an operation: the table, the choice, and why a backend is not used."""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

ORDER = ("cuda", "triton", "eager")
# For all threads: autograd runs backward on a GPU in threads of its own.
_forced: str | None = None
_plan: str | None = None


class Unsupported(RuntimeError):
    """The selected backend or plan cannot run this call."""


@dataclass(frozen=True)
class Implementation:
    """One backend of one operation.

    `backward` is None where the gradient takes no kernel.
    `refusal(x, rank, sub_rank)` says in a few words why it cannot run on x with factors of these ranks, or None.
    `plan` says in a few words how it runs, `plans` names the ways between which it chooses by the call's sizes.
    `rows(device)`: numbers of rows that together meet every kernel which it may have to compile or load.
    """

    forward: Callable
    backward: Callable | None
    refusal: Callable[[Tensor, int, int], str | None]
    plan: str
    plans: tuple[str, ...] = ()
    rows: Callable[[torch.device], list[int]] = lambda device: []


_table: dict[str, dict[str, Implementation]] = {}


def register(op: str, **implementations: Implementation) -> None:
    """Enter the implementations of `lilora::<op>` by backend into the table."""
    _table[op] = implementations


def lazy(
    module: str, refusal: Callable[[Tensor, int, int], str | None], plan: str, plans: tuple[str, ...] = ()
) -> Implementation:
    """An implementation whose module (with its functions forward, backward and rows) is imported by the first call."""

    def late(function: str) -> Callable:
        return lambda *args: getattr(importlib.import_module(module), function)(*args)

    return Implementation(late("forward"), late("backward"), refusal, plan, plans, late("rows"))


def requested() -> str | None:
    """The backend ordered by `backend(...)` or LILORA_BACKEND; None leaves the choice to us."""
    name = _forced or os.environ.get("LILORA_BACKEND") or None
    if name is not None and name not in ORDER:
        raise ValueError(f"LILORA_BACKEND is {name!r}; it must be one of {list(ORDER)}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Order a backend for all calls, of every thread, until the end; one that it cannot run raises instead of falling back."""
    if name not in ORDER:
        raise ValueError(f"backend is {name!r}; it must be one of {list(ORDER)}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def plans(op: str) -> dict[str, tuple[str, ...]]:
    """The plans of each backend that has a choice of them, in order of preference of the backends."""
    return {name: _table[op][name].plans for name in ORDER if name in _table[op] and _table[op][name].plans}


@contextmanager
def plan(name: str) -> Iterator[None]:
    """Select a plan for all calls, of every thread, until the end: for benchmarks and tests, which also select the backend.

    A backend that does not have it, and a call that it cannot run, raises Unsupported.
    """
    global _plan
    before, _plan = _plan, name
    try:
        yield
    finally:
        _plan = before


def selected_plan() -> str | None:
    """The plan that `plan(...)` selects; None leaves the choice to the backend."""
    return _plan


def refusals(op: str, x: Tensor, rank: int, sub_rank: int) -> dict[str, str | None]:
    """For each backend in order of preference, why it cannot run `op` on x; None if it can."""
    table = _table[op]
    return {
        name: table[name].refusal(x, rank, sub_rank)
        if name in table
        else "this operation has no kernel of its own there"
        for name in ORDER
    }


def choose(op: str, x: Tensor, rank: int, sub_rank: int) -> Implementation:
    """The first backend that can run `op` on x, or the one that was ordered, unless `op` has no kernel there at all."""
    table, wanted = _table[op], requested()
    wanted = wanted if wanted in table else None
    for name in ORDER if wanted is None else (wanted,):
        if name in table and table[name].refusal(x, rank, sub_rank) is None:
            if _plan is not None and _plan not in table[name].plans and plans(op):
                raise Unsupported(
                    f"{op}: the backend {name!r} has no plan {_plan!r}; its plans: {list(table[name].plans)}"
                )
            return table[name]
    reasons = refusals(op, x, rank, sub_rank)
    usable = [name for name, reason in reasons.items() if reason is None]
    raise Unsupported(f"{op}: the backend {wanted!r} cannot run on {x.device}: {reasons[wanted]}; available: {usable}")


def explain(model: torch.nn.Module) -> str:
    """One line per adapted linear: the backend and plan that will run, and why the other backends will not.

    A layer is judged by its base weight's device and dtype: that of the activations it expects.
    """
    from .adapted import AdaptedLinear
    from .mlp import pairs

    lines, paired = [], pairs(model)
    for name, layer in model.named_modules():
        if not isinstance(layer, AdaptedLinear):
            continue
        reason = layer.unfused_reason()
        partner, apart = paired.get(layer, (None, None))
        op = "delta" if reason is not None else "delta_pair" if partner and apart is None else "linear"
        reasons = refusals(op, layer.example(), layer.rank, layer.sub_rank)
        wanted = requested()
        chosen = next((b for b, why in reasons.items() if why is None and wanted in (None, b)), None)
        runs = f"{wanted} CANNOT RUN" if chosen is None else f"{chosen} ({_table[op][chosen].plan})"
        fused = "base and adapter in one operation" if reason is None else f"base_layer(x) + delta, because {reason}"
        if partner:
            fused += f", together with {partner}" if apart is None else f", apart from {partner}, because {apart}"
        others = "; ".join(f"{b}: {why}" for b, why in reasons.items() if why is not None)
        lines.append(f"{name or type(layer).__name__}: {runs}, {fused} [{others}]")
    return "\n".join(lines) or "no adapted layer in this model"
