"""RankPoolLinear: a frozen linear layer with a pool of ranks, of which a gate chooses some for every sample."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import AdaptedLinear, Factors, is_number, version

Group = tuple[tuple[str, ...], Tensor | None]


@dataclass(frozen=True, eq=False)
class Choice:
    """The ranks that a forward uses.

    groups: (names of parts, the chosen ranks [k] int64 of these parts laid end to end, or None for all), in order.
    gate: [G, R] over the ranks of the groups in this order; None stands for ones. G = 1 holds for every row.
    teacher: whether the parts are those of the layer's teacher.
    """

    groups: tuple[Group, ...]
    gate: Tensor | None = None
    teacher: bool = False


Chooser = Callable[["RankPoolLinear", Tensor], tuple[Choice | None, Tensor | None]]


class RankPoolLinear(AdaptedLinear):
    """y = base_layer(x) + scaling * ((D(x) A^T) * g) B^T over the ranks and with the gate that `choose` says.

    The pool lies in named parts, `lora_A[part]` [n, K] and `lora_B[part]` [N, n]; parts that require no gradient cost
    none if they come first in the choice. `choose(layer, x)` gives a Choice, or None for the base alone, and the row of
    the gate for each row of x, [M] int32, None where one holds for all. It is called once per forward.
    """

    sub_rank = 0

    def __init__(
        self,
        base_layer: nn.Module,
        choose: Chooser,
        scaling: float = 1.0,
        dropout: float = 0.0,
        freeze_base: bool = True,
    ) -> None:
        super().__init__(base_layer, dropout, freeze_base)
        if not is_number(scaling) or not math.isfinite(scaling):
            raise ValueError(f"scaling is {scaling!r}; it must be a finite number")
        self.choose, self.scaling = choose, scaling
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.teacher: dict[str, tuple[Tensor, Tensor]] = {}  # frozen parts of a teacher, no parameters
        self._gathered: tuple[tuple, Choice, Factors] | None = None

    @property
    def rank(self) -> int:  # type: ignore[override]
        return sum(a.shape[0] for a in self.lora_A.values())

    def put(self, part: str, a: Tensor, b: Tensor, train: bool) -> None:
        """Make a [n, K] and b [N, n] the part's parameters, in place of those it had; a part without ranks goes.

        They are kept in fp32 under a 16-bit base.
        """
        if a.shape != (b.shape[1], self.in_features) or b.shape[0] != self.out_features:
            raise ValueError(
                f"part {part!r} is {list(a.shape)} and {list(b.shape)}; it must be [n, {self.in_features}] and "
                f"[{self.out_features}, n]"
            )
        self._gathered = None
        for parameters, value in ((self.lora_A, a), (self.lora_B, b)):
            if part in parameters:
                del parameters[part]
            if value.numel():
                like = self.empty(0)
                dtype = torch.promote_types(like.dtype, torch.float32)
                value = value.detach().to(like.device, dtype, copy=True, memory_format=torch.contiguous_format)
                parameters[part] = nn.Parameter(value, requires_grad=train)

    def part(self, name: str, teacher: bool = False) -> tuple[Tensor, Tensor]:
        """(A, B) of a part; without ranks if the layer has no such part."""
        if teacher:
            return self.teacher[name]
        if name not in self.lora_A:
            return self.empty(0, self.in_features), self.empty(self.out_features, 0)
        return self.lora_A[name], self.lora_B[name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> [..., N]."""
        choice, rows = self.choose(self, x)
        if choice is None:
            return self.base_layer(x, *args, **kwargs)
        factors = self._gather(choice)
        adapter = {"gate": choice.gate, "gate_row": rows, "ranks": self._trained(choice)}
        p = self.dropout if self.training and not choice.teacher else 0.0
        return self._adapted(x, factors, self.scaling, p, args, kwargs, **adapter)

    def train(self, mode: bool = True) -> "RankPoolLinear":
        self._gathered = None
        return super().train(mode)

    def _gather(self, choice: Choice) -> Factors:
        parts = {n: self.part(n, choice.teacher) for names, _ in choice.groups for n in names}
        if torch.is_grad_enabled() and any(t.requires_grad for part in parts.values() for t in part):
            return Factors((*gather(parts, choice.groups), None, None, None))
        # Decoding asks for the same ranks at every step.
        source = tuple((t.data_ptr(), version(t)) for part in parts.values() for t in part)
        source += tuple((names, id(ranks)) for names, ranks in choice.groups)
        gathered = self._gathered  # read once: another thread may gather other ranks meanwhile
        if gathered is None or gathered[0] != source:
            # Tensors made in inference mode could not be saved for a later backward.
            with torch.inference_mode(False), torch.no_grad():
                gathered = source, choice, Factors((*gather(parts, choice.groups), None, None, None))
            self._gathered = gathered
        return gathered[2]

    def _trained(self, choice: Choice) -> tuple[int, int] | None:
        """The ranks behind the leading groups that need no gradient; None for all of them."""
        sizes, trains = [], []
        for names, ranks in choice.groups:
            parts = [self.part(name, choice.teacher) for name in names]
            sizes.append(sum(a.shape[0] for a, _ in parts) if ranks is None else ranks.shape[0])
            trains.append(any(t.requires_grad for part in parts for t in part))
        frozen = sum(sizes[: trains.index(True)]) if True in trains else 0
        return (frozen, sum(sizes)) if frozen else None

    def extra_repr(self) -> str:
        parts = ", ".join(f"{name}: {a.shape[0]}" for name, a in self.lora_A.items())
        return f"ranks={{{parts}}}, scaling={self.scaling}, dropout={self.dropout}"


def gather(parts: dict[str, tuple[Tensor, Tensor]], groups: tuple[Group, ...]) -> tuple[Tensor, Tensor]:
    """The chosen ranks of all groups end to end: a [R, K], b [N, R]."""
    chosen_a, chosen_b = [], []
    for names, ranks in groups:
        a = joined([parts[name][0] for name in names], 0)
        b = joined([parts[name][1] for name in names], 1)
        chosen_a.append(a if ranks is None else a.index_select(0, ranks))
        chosen_b.append(b if ranks is None else b.index_select(1, ranks))
    return joined(chosen_a, 0), joined(chosen_b, 1)


def joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
