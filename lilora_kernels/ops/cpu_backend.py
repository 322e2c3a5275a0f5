"""The CPU kernels as a backend: of few rows all adapters of a call at once, of more one each; else the composed plan."""

from types import ModuleType

from torch import Tensor

from .. import backends
from . import cpu_runtime, cpu_training
from .schema import AdapterArgs


def implementation(op: str, composed: ModuleType, **binds: object) -> backends.Implementation:
    """Of `delta`, `linear` or `delta_pair`; composed: the module of its eager backend."""

    def forward(x: Tensor, *of: tuple | Tensor | AdapterArgs | None) -> tuple[Tensor, ...]:
        _, sides = cpu_runtime.sides_of(of)
        found = cpu_runtime.forward(op, x, *sides)
        if found is None:
            found = []
            for adapter, *base in sides:
                side = cpu_training.forward(x, *base, adapter)
                if side is None:
                    return composed.forward(x, *of)
                found.append(side)
        ys, hs = zip(*found, strict=True)
        return (*ys, *hs)

    def backward(dy: tuple | Tensor, x: Tensor | None, *of: object) -> dict | tuple[dict, ...]:
        *weight, h, adapter, needs = of
        one = isinstance(adapter, AdapterArgs)
        sides = (
            [(dy, *(weight or [None]), h, adapter, needs)] if one else zip(dy, *weight, h, adapter, needs, strict=True)
        )
        grads = []
        for own, frozen, shrunk, factors, wanted in sides:
            side = cpu_training.backward(own, x, frozen, shrunk, factors, wanted) if wanted else {}
            if side is None:
                return composed.backward(dy, x, *of)
            grads.append(side)
        if one:
            return grads[0]
        if "x" in grads[0]:
            grads[0]["x"] += grads[1].pop("x")
        return tuple(grads)

    return backends.Implementation(
        forward, backward, cpu_runtime.unsupported_reason, cpu_runtime.PLANS | cpu_training.PLAN,
        bind=cpu_training.bind_forward, **binds,
    )  # fmt: skip
