"""Which implementation runs an operation: the table, the choice, and why a backend is not used."""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "eager")
PLANS = ("composed", "one_launch", "by_phase", "decode", "fused")
COMPOSED = {"composed": "for all rows"}  # library products around what is ours
CHOICES = {"backend": BACKENDS, "plan": PLANS}
VARIABLES = {"backend": "LILORA_BACKEND", "plan": "LILORA_PLAN"}
# Up to here `linear` takes one launch: with few rows a processor only waits for launches. bench.model, us of both directions
# by the Triton kernels, gate and up, 8 tasks, one launch / by phase: 64 rows 114 / 117, 128 rows 118 / 121, 256 rows 144 / 147;
# the host's launches alone, 20 / 35. For more rows the plan composed is faster where it can be taken.
ONE_LAUNCH_ROWS = 255
# The backend and plan that the contexts of these names or LILORA_<KIND>, read here, force; None leaves the choice to us. For
# all threads: autograd runs backward on a GPU in threads of its own.
forced = {kind: os.environ.get(variable) or None for kind, variable in VARIABLES.items()}

_wrong = next(
    (
        f"{VARIABLES[kind]} is {name!r}; it must be one of {list(CHOICES[kind])}"
        for kind, name in forced.items()
        if name is not None and name not in CHOICES[kind]
    ),
    None,
)


class Unsupported(RuntimeError):
    """The forced backend or plan cannot run this call."""


@dataclass(frozen=True)
class Implementation:
    """One backend of one operation.

    `backward` is None where the gradient takes no kernel.
    `unsupported_reason(x, rank, sub_rank)` says in a few words why it cannot run on x with factors of these ranks, or None.
    `plans`: the algorithms it has, and for which rows each is taken; empty where an operation has no choice of them.
    `bind(*arguments)`: bound(x, task, seed) -> y [..., N] for x [..., K] and ids [M] of the same kinds as here, without
    gradients; all other arguments stay what and where they are. bound is None, or returns it, where a call has to take the
    usual way.
    `bind_gradients(*arguments)`: the same with gradients, as an object with forward(x, base, adapter) -> y and h, and
    backward(dy, x, weight, h, adapter, needs) -> those of x and the factors that are needed.
    `rows(device)`: numbers of rows that together meet every kernel which it may have to compile or load.
    """

    forward: Callable
    backward: Callable | None
    unsupported_reason: Callable[[Tensor, int, int], str | None]
    plans: dict[str, str]
    rows: Callable[[torch.device], list[int]] = lambda device: []
    bind: Callable[..., Callable | None] = lambda *_: None
    bind_gradients: Callable[..., Any] = lambda *_: None


_table: dict[str, dict[str, Implementation]] = {}


def register(op: str, **implementations: Implementation) -> None:
    """Enter the implementations of `lilora::<op>` by backend into the table."""
    _table[op] = implementations


def lazy(
    module: str, unsupported_reason: Callable[[Tensor, int, int], str | None], plans: dict[str, str]
) -> Implementation:
    """An implementation whose module is imported by the first call, with its functions forward, backward, rows, and those that
    bind calls, if it has any."""

    def late(function: str) -> Callable:
        return lambda *args: getattr(importlib.import_module(module), function, lambda *_: None)(*args)

    names = "rows", "bind", "bind_gradients"
    return Implementation(late("forward"), late("backward"), unsupported_reason, plans, *map(late, names))


@contextmanager
def _force(kind: str, name: str) -> Iterator[None]:
    if name not in CHOICES[kind]:
        raise ValueError(f"{kind} is {name!r}; it must be one of {list(CHOICES[kind])}")
    before, forced[kind] = forced[kind], name
    try:
        yield
    finally:
        forced[kind] = before


def backend(name: str) -> AbstractContextManager[None]:
    """Force a backend for all calls, of every thread, until the end; one that it cannot run raises instead of falling back."""
    return _force("backend", name)


def plan(name: str) -> AbstractContextManager[None]:
    """Force a plan for all calls, of every thread, until the end: of the forced backend, or of the first that has it.

    A backend without this plan, and a call that the plan cannot run, raise Unsupported.
    """
    return _force("plan", name)


def plans(op: str) -> dict[str, dict[str, str]]:
    """The plans of each backend of `op`, in order of preference of the backends."""
    return {name: _table[op][name].plans for name in BACKENDS if name in _table[op]}


def unsupported_reasons(op: str, x: Tensor, rank: int, sub_rank: int) -> dict[str, str | None]:
    """For each backend in order of preference, why it cannot run `op` on x by the forced plan; None if it can."""
    return {name: _unsupported_reason(op, name, x, rank, sub_rank, forced["plan"]) for name in BACKENDS}


def _unsupported_reason(op: str, name: str, x: Tensor, rank: int, sub_rank: int, plan: str | None) -> str | None:
    if (implementation := _table[op].get(name)) is None:
        return "this operation has no kernel of its own there"
    if plan is not None and implementation.plans and plan not in implementation.plans:
        return f"it has no plan {plan!r}"
    return implementation.unsupported_reason(x, rank, sub_rank)


def choose(op: str, x: Tensor, rank: int, sub_rank: int) -> Implementation:
    """The first backend that can run `op` on x, or the one that is forced, unless `op` has no kernel there at all."""
    wanted, plan = forced["backend"], forced["plan"]
    if _wrong is not None:
        raise ValueError(_wrong)
    for name in (wanted,) if wanted in _table[op] else BACKENDS:
        if _unsupported_reason(op, name, x, rank, sub_rank, plan) is None:
            return _table[op][name]
    what = " and ".join(f"the {kind} {name!r}" for kind, name in (("backend", wanted), ("plan", plan)) if name)
    reasons = unsupported_reasons(op, x, rank, sub_rank)
    why = reasons[wanted] if wanted else "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    available = {
        name: list(has) for name, has in plans(op).items() if not _table[op][name].unsupported_reason(x, rank, sub_rank)
    }
    raise Unsupported(f"{op}: {what} cannot run on {x.device}: {why}; available: {available}")
