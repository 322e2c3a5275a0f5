"""What the operations of adapters receive, and its names and types in a registered schema."""

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from torch import Tensor

FACTORS = ("a", "b0", "u", "v", "fusion")
# Inputs that may want a gradient, in the order in which the backward operations return them.
DIFFERENTIABLE = ("x", *FACTORS, "gate")


class AdapterArgs(NamedTuple):
    """The adapter's side of one call; shapes in ops/README.md."""

    a: Tensor
    b0: Tensor
    u: Tensor | None
    v: Tensor | None
    fusion: Tensor | None
    task: Tensor | None
    gate: Tensor | None
    gate_row: Tensor | None
    seed: Tensor | None
    scaling: float
    p: float
    ranks: Sequence[int] | None

    @property
    def rank_sizes(self) -> tuple[int, int]:
        """R, and S or 0 without task factors."""
        return self.a.shape[-2], 0 if self.u is None else self.u.shape[-1]


def kinds_of(fields: Sequence[str], side: str = "") -> dict[str, str]:
    """Name, with the ending `side`, and type of these fields of AdapterArgs in a registered schema."""
    kinds = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", Sequence[int] | None: "SymInt[]?"}
    return {field + side: kinds[AdapterArgs.__annotations__[field]] for field in fields}


class Arguments:
    """Reads the arguments of an operation by name. Of two adapters, what each has of its own ends in _1 and _2."""

    def __init__(self, kinds: dict[str, str]) -> None:
        self.kinds = kinds
        self.sides = ("_1", "_2") if "a_1" in kinds else ("",)
        at = {name: i for i, name in enumerate(kinds)}

        def places(stem: str) -> list[int]:
            """For each side; the place after the last argument holds None."""
            return [at.get(stem + side, at.get(stem, len(at))) for side in self.sides]

        stems = dict.fromkeys(name.removesuffix("_1").removesuffix("_2") for name in at)
        others = [stem for stem in stems if stem not in AdapterArgs._fields]
        self._others = [itemgetter(*dict.fromkeys(places(stem))) for stem in others]
        self._adapters = [itemgetter(*own) for own in zip(*map(places, AdapterArgs._fields), strict=True)]

    def split(self, args: Sequence) -> tuple[list, list[AdapterArgs]]:
        """What is no adapter's, a pair where each side has its own; and the adapters."""
        args = (*args, None)
        return [get(args) for get in self._others], [tuple.__new__(AdapterArgs, get(args)) for get in self._adapters]
