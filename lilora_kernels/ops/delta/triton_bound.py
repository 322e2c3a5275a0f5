"""Calls of `linear` and `delta` bound to their parameters, by launches that an earlier call of as many rows has made."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import compress
from math import gcd
from operator import itemgetter

import torch
from torch import Tensor

from ... import backends
from .. import triton_runtime as runtime
from ..barrier import barrier_state
from ..schema import FACTORS, AdapterArgs
from ..triton_launcher import current, observed
from .triton_jobs import Backward, Forward, run_jobs

OPERANDS = ("x", *FACTORS)


def bind_gradients(x: Tensor, *of: Tensor | AdapterArgs | None) -> "Bound | None":
    """See `Implementation.bind_gradients`. of: weight and bias of `linear`, and the adapter."""
    *base, adapter = of
    parameters = [t for t in (*base, *adapter[:5]) if t is not None]
    plain = all(t.numel() > 0 and t.is_contiguous() and not t.is_neg() for t in parameters)
    if runtime.INTERPRETED or adapter.gate is not None or not plain:
        return None
    return Bound(x, adapter, *base[1:])


def bind(x: Tensor, *of: Tensor | AdapterArgs | None) -> Callable | None:
    """See `Implementation.bind`."""
    *base, adapter = of
    bound = bind_gradients(x, *of)

    def run(x: Tensor, task: Tensor | None, seed: Tensor | None) -> Tensor | None:
        found = bound.forward(x, base, adapter._replace(task=task, seed=seed))
        return found and found[0]

    return bound and run


class Launches:
    """Those of a call, for others of its kind. made: what `run_jobs` returned; operands and results: the tensors of that call."""

    def __init__(self, made: list, operands: Sequence[Tensor | None], results: Sequence[Tensor]) -> None:
        places = {id(None): 0}
        places |= {id(t): 2 + at for at, t in enumerate((*operands, *results)) if t is not None}
        self.each, self.offsets, self.size = [], [], 0  # of what the call has for itself, in one allocation
        for ready, tensors, state in made:
            if state is not None:
                places[id(state)] = 1
            for t in tensors:
                if id(t) not in places:
                    places[id(t)] = 2 + len(operands) + len(results) + len(self.offsets)
                    self.offsets.append(self.size)
                    self.size += -(-t.nbytes // 128) * 128
            self.each.append((ready, itemgetter(*[places[id(t)] for t in tensors])))
        self.waits = any(state is not None for *_, state in made)

    def __call__(self, like: Tensor, pointers: Sequence[int]) -> None:
        """pointers: of the operands and results."""
        device = like.device
        with current(device):
            state = barrier_state(device) if self.waits else None
            own = like.new_empty(self.size, dtype=torch.uint8)
            start = own.data_ptr()
            found = 0, state.data_ptr() if self.waits else 0, *pointers, *[start + at for at in self.offsets]
            for ready, chosen in self.each:
                ready(like.get_device(), chosen(found))


@cache
def launches_of(*kind: object) -> dict[tuple, Launches]:
    """Of all layers of a kind, by what else tells their calls apart."""
    return {}


class Bound:
    """A call of both directions for few rows, bound to where its parameters lie."""

    def __init__(self, x: Tensor, adapter: AdapterArgs, bias: Tensor | None = None) -> None:
        self.columns, (self.outputs, self.rank) = adapter.a.shape[1], adapter.b0.shape
        parameters = bias, *adapter[:5]
        self.pointers = [0 if t is None else t.data_ptr() for t in parameters]
        kinds = [None if t is None else (t.dtype, t.shape) for t in parameters]
        self.kinds = kinds[1:]  # of the factors
        self.launches = launches_of(x.device, x.dtype, *kinds, adapter.scaling, adapter.p, *(adapter.ranks or ()))

    def forward(
        self, x: Tensor, base: Sequence[Tensor | None], adapter: AdapterArgs
    ) -> tuple[Tensor, Tensor, None] | None:
        """y [..., N] and h [M, R] for x [..., K]; None for what has to take the usual way."""
        rows, plan, task, seed = x.shape[:-1].numel(), backends.forced["plan"], adapter.task, adapter.seed
        weight, bias = base or (None, None)
        pointers = x.data_ptr(), *self.pointers, *[0 if t is None else t.data_ptr() for t in (task, seed)]
        launches = self.launches.get(kind := (rows, plan, task is None))
        if not is_bound(rows, plan, pointers, launches) or not x.is_contiguous() or x.is_neg():
            return None
        if task is not None and (task.shape != (rows,) or not task.is_contiguous()):
            return None
        flat = x if x.dim() == 2 else x.view(rows, x.shape[-1])
        if launches is None:
            work = Forward(flat, bias, adapter, plan != "by_phase")
            made = run_jobs(work, plan != "by_phase")
            y, h = work.y, work.h
            self.note(kind, made, (flat, bias, *adapter[:5], task, seed), (y, h))
        else:
            y, h = x.new_empty(rows, self.outputs), x.new_empty(rows, self.rank)
            launches(x, (*pointers, y.data_ptr(), h.data_ptr()))
        if weight is not None:
            y.addmm_(flat, (weight if weight.dtype is x.dtype else weight.to(x.dtype)).t())
        # Autograd would let nobody write to a view.
        return y if flat is x else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], self.outputs]), h, None

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        h: Tensor | None,
        adapter: AdapterArgs,
        needs: tuple[bool, ...],
        keep: None = None,
    ) -> list[Tensor] | None:
        """Those of OPERANDS that are needed, in this order, for dy [..., N] and x [..., K]; None as in forward.

        Parameters may lie elsewhere by now: sharding, and hooks on saved tensors, bring them anew, perhaps as others.
        """
        if x is not None and x.is_neg():
            return None
        if not dy.is_contiguous() or dy.is_neg():
            dy = dy.resolve_neg().contiguous()
        *factors, task, _, _, seed = adapter[:9]
        rows, plan = dy.shape[:-1].numel(), backends.forced["plan"]
        pointers = [dy.data_ptr()]
        for t in (x, h, *factors, task, seed):
            at = 0 if t is None else t.data_ptr()
            if t is not None and (at == 0 or not t.is_contiguous()):
                return None
            pointers.append(at)
        if [None if t is None else (t.dtype, t.shape) for t in factors] != self.kinds:
            return None
        for t, width in ((x, self.columns), (h, self.rank)):
            if t is not None and (t.dtype is not dy.dtype or t.numel() != rows * width):
                return None
        launches = self.launches.get(kind := (rows, plan, task is None, needs))
        if not is_bound(rows, plan, pointers, launches):
            return None
        flat = dy if dy.dim() == 2 else dy.view(rows, self.outputs)
        if launches is None:
            operands = flat, x if x is None else x.view(rows, -1), h, *factors, task, seed
            wanted = frozenset(compress(OPERANDS, needs))
            work = Backward(*operands[:3], adapter, wanted, plan != "by_phase")
            made = run_jobs(work, plan != "by_phase")
            results = [work.grads[name] for name in OPERANDS if name in wanted]
            self.note(kind, made, operands, results)
        else:
            results = [torch.empty_like(t) for t in compress(factors, needs[1:])]
            if needs[0]:
                results.insert(0, dy.new_empty(rows, self.columns))
            launches(dy, (*pointers, *[t.data_ptr() for t in results]))
        if needs[0]:
            if weight is not None:
                results[0].addmm_(flat, weight if weight.dtype is dy.dtype else weight.to(dy.dtype))
            if flat is not dy:
                results[0] = results[0].view(*dy.shape[:-1], -1)
        return results

    def note(self, kind: tuple, made: list, operands: Sequence[Tensor | None], results: Sequence[Tensor]) -> None:
        """Launches that Triton had to see are not known; nor is which tensor it was that is two operands."""
        given = [id(t) for t in operands if t is not None]
        if None not in made and len(set(given)) == len(given):
            self.launches[kind] = Launches(made, operands, results)


def is_bound(rows: int, plan: str | None, pointers: Sequence[int], launches: Launches | None) -> bool:
    """Whether launches of this kind may be kept, and can be made: all memory lies as `triton_jobs.staged` has it."""
    few = 0 < rows <= backends.ONE_LAUNCH_ROWS and plan in (None, "one_launch", "by_phase")
    if not few or gcd(16, *pointers) < 16:
        return False
    return launches is None or not any(observed(ready.kernel) for ready, _ in launches.each)
