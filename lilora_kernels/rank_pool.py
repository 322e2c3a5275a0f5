"""RankPoolLinear: a frozen linear layer with a pool of ranks, of which a gate chooses some for every sample."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapted import AdaptedLinear, Factors, is_number, version
from .functional import rank_gate

Group = tuple[tuple[str, ...], Tensor | None]


@dataclass(frozen=True, eq=False)
class Choice:
    """The ranks that a forward uses.

    groups: (names of parts, the chosen ranks [k] int64 of these parts laid end to end, or None for all), in order.
    gate: [G, R] over the ranks of the groups in this order; None stands for ones. G = 1 holds for every row.
    snapshot: whether the parts are those of the layer's snapshot.
    """

    groups: tuple[Group, ...]
    gate: Tensor | None = None
    snapshot: bool = False


Chooser = Callable[["RankPoolLinear", Tensor], tuple[Choice | None, Tensor | None]]


class RankPoolLinear(AdaptedLinear):
    """y = base_layer(x) + scaling * ((D(x) A^T) * g) B^T over the ranks and with the gate that `choose` says.

    The pool lies in named parts, `lora_A[part]` [n, K] and `lora_B[part]` [N, n]; parts that require no gradient cost
    none if they come first in the choice. `choose(layer, x)` gives a Choice, or None for the base alone, and the row of
    the gate for each row of x, [M] int32, None where one holds for all. It is called once per forward.
    """

    sub_rank = 0

    def __init__(self, base_layer: nn.Module, choose: Chooser, scaling: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(base_layer, dropout)
        if not is_number(scaling) or not math.isfinite(scaling):
            raise ValueError(f"scaling is {scaling!r}; it must be a finite number")
        self.choose, self.scaling = choose, scaling
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.snapshot: dict[str, tuple[Tensor, Tensor]] = {}  # frozen parts of a teacher, no parameters
        self._gathered: tuple[tuple, Choice, Factors] | None = None

    @property
    def rank(self) -> int:
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

    def part(self, name: str, snapshot: bool = False) -> tuple[Tensor, Tensor]:
        """(A, B) of a part; without ranks if the layer has no such part."""
        if snapshot:
            return self.snapshot[name]
        if name not in self.lora_A:
            return self.empty(0, self.in_features), self.empty(self.out_features, 0)
        return self.lora_A[name], self.lora_B[name]

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [..., K] -> [..., N]."""
        choice, rows = self.choose(self, x)
        if choice is None:
            return self.base_layer(x, *args, **kwargs)
        factors = self._gather(choice)
        adapter = {"gate": choice.gate, "gate_row": rows, "ranks": self._trained(choice)}
        p = self.dropout if self.training and not choice.snapshot else 0.0
        return self._adapted(x, factors, self.scaling, p, args, kwargs, **adapter)

    def train(self, mode: bool = True) -> "RankPoolLinear":
        self._gathered = None
        return super().train(mode)

    def _gather(self, choice: Choice) -> Factors:
        parts = {n: self.part(n, choice.snapshot) for names, _ in choice.groups for n in names}
        if torch.is_grad_enabled() and any(a.requires_grad for a, _ in parts.values()):
            return Factors((*gather(parts, choice.groups), None, None, None))
        # Decoding asks for the same ranks at every step.
        source = tuple((t.data_ptr(), version(t)) for part in parts.values() for t in part)
        source += tuple((names, id(ranks)) for names, ranks in choice.groups)
        if self._gathered is None or self._gathered[0] != source:
            # Tensors made in inference mode could not be saved for a later backward.
            with torch.inference_mode(False), torch.no_grad():
                self._gathered = source, choice, Factors((*gather(parts, choice.groups), None, None, None))
        return self._gathered[2]

    def _trained(self, choice: Choice) -> tuple[int, int] | None:
        """The ranks behind the leading groups that need no gradient; None for all of them."""
        sizes, learns = [], []
        for names, ranks in choice.groups:
            parts = [self.part(name, choice.snapshot)[0] for name in names]
            sizes.append(sum(a.shape[0] for a in parts) if ranks is None else ranks.shape[0])
            learns.append(any(a.requires_grad for a in parts))
        frozen = sum(sizes[: learns.index(True)]) if True in learns else 0
        return (frozen, sum(sizes)) if frozen else None

    def extra_repr(self) -> str:
        parts = ", ".join(f"{name}: {a.shape[0]}" for name, a in self.lora_A.items())
        return f"ranks={{{parts}}}, scaling={self.scaling}, dropout={self.dropout}"


def gather(parts: dict[str, tuple[Tensor, Tensor]], groups: tuple[Group, ...]) -> tuple[Tensor, Tensor]:
    """The chosen ranks of all groups end to end: a [R, K], b [N, R]."""
    chosen_a, chosen_b = [], []
    for names, ranks in groups:
        a = _joined([parts[name][0] for name in names], 0)
        b = _joined([parts[name][1] for name in names], 1)
        chosen_a.append(a if ranks is None else a.index_select(0, ranks))
        chosen_b.append(b if ranks is None else b.index_select(1, ranks))
    return _joined(chosen_a, 0), _joined(chosen_b, 1)


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


@dataclass(frozen=True)
class GateRule:
    """How a RankPool chooses. Published as PCLR; the values named first are the paper's, the others its code's.

    rank: ranks chosen among the experts. scope: one set per "sample" or per "batch" (in training; inference always
    chooses per sample). value: a chosen rank is weighted by its "score" or by 1 ("binary"). reuse: learned experts
    compete with new ones over "all", or in training only fill up ("top_up") fewer than `rank` new ones. query:
    "concatenated" is one cosine between [text, vision] and the key, "two" is cos_text + vision_weight * cos_vision.
    """

    rank: int
    scope: str = "sample"
    value: str = "score"
    reuse: str = "all"
    query: str = "concatenated"
    vision_weight: float = 0.25
    shared_scaling: float = 1.0
    expert_scaling: float = 1.0


@dataclass(frozen=True, eq=False)
class Query:
    """text [B, d_text] and vision [B, d_vision] in fp32, rows of norm 1 (or 0: no image)."""

    text: Tensor
    vision: Tensor


EXPERTS = ("old", "new")


class RankPool(nn.Module):
    """The keys of a pool's rank experts, and which of them a batch of queries gets (PCLR, ICLR 2026).

    Experts lie in the parts "old" (learned before) and "new" (being learned), one key each; the ranks of the part
    "shared" are always on. All linears of a pool use one choice.
    """

    def __init__(self, rule: GateRule, text_width: int, vision_width: int) -> None:
        super().__init__()
        self.rule, self.widths = rule, (text_width, vision_width)
        self.text, self.vision = nn.ParameterDict(), nn.ParameterDict()
        self.shared = 0  # number of shared ranks
        self.snapshot: dict[str, tuple[Tensor, Tensor]] = {}
        self.snapshot_shared = 0

    def put(self, part: str, text: Tensor, vision: Tensor, train: bool) -> None:
        """Make text [n, d_text] and vision [n, d_vision] the part's keys; a part without keys goes."""
        for parameters, value, width in zip((self.text, self.vision), (text, vision), self.widths, strict=True):
            if value.shape != (text.shape[0], width):
                raise ValueError(f"keys of part {part!r} are {list(value.shape)}; they must be [n, {width}]")
            if part in parameters:
                del parameters[part]
            if len(value):
                value = value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
                parameters[part] = nn.Parameter(value, requires_grad=train)

    def keys(self, part: str, snapshot: bool = False) -> tuple[Tensor, Tensor]:
        """(text, vision) keys of a part, [n, d] each; n = 0 if there is no such part."""
        if snapshot and part in self.snapshot:
            return self.snapshot[part]
        if not snapshot and part in self.text:
            return self.text[part], self.vision[part]
        like = next(iter(self.text.values()), torch.empty(0))
        return tuple(like.new_empty(0, width) for width in self.widths)

    def sizes(self, snapshot: bool = False) -> dict[str, int]:
        return {part: self.keys(part, snapshot)[0].shape[0] for part in EXPERTS}

    def scores(self, part: str, query: Query, snapshot: bool = False) -> Tensor:
        """How near each expert's key is to each query, [B, n] fp32; ValueError for a query of another width."""
        for name, value, width in zip(("text", "vision"), (query.text, query.vision), self.widths, strict=True):
            if value.dim() != 2 or value.shape[1] != width:
                raise ValueError(f"the {name} query is {list(value.shape)}; the keys want [samples, {width}]")
        text, vision = self.keys(part, snapshot)
        if self.rule.query == "two":
            near = query.text @ normalised(text).T
            return near + self.rule.vision_weight * (query.vision @ normalised(vision).T)
        norm = (text.square().sum(1) + vision.square().sum(1)).sqrt()
        length = (query.text.square().sum(1) + query.vision.square().sum(1)).sqrt()
        inner = query.text @ text.T + query.vision @ vision.T
        return inner / (length[:, None] * norm).clamp_min(1e-12)

    def choose(self, query: Query, snapshot: bool = False, newest: Tensor | None = None) -> Choice:
        """The ranks for these queries. newest [B] bool: samples that get the new experts (others the old ones only)."""
        sizes = self.sizes(snapshot)
        new, old = sizes["new"], sizes["old"]
        if newest is not None and new and old:
            return self._switched(query, newest, snapshot)
        rule = self.rule
        top_up = rule.reuse == "top_up" and self.training and not snapshot  # inference chooses among all
        if new and new >= rule.rank and (top_up or not old):
            picks = [(("new",), rule.rank)]
        elif new and top_up and old:
            picks = [(("old",), rule.rank - new), (("new",), new)]
        else:
            picks = [(tuple(part for part in EXPERTS if sizes[part]), rule.rank)]
        one = query.text.shape[0] == 1 or (self.training and rule.scope == "batch")
        return self._choice([self._pick(names, take, query, snapshot, one) for names, take in picks], snapshot)

    def _pick(self, names: tuple[str, ...], take: int, query: Query, snapshot: bool, one: bool) -> tuple[Group, Tensor]:
        """A group of experts and its gate: [1, take] over the chosen ranks if one set is for all, else [B, n] over all."""
        scores = _joined([self.scores(name, query, snapshot) for name in names], 1)
        if one:
            scores = scores.mean(0, keepdim=True)
        weights = scores if self.rule.value == "score" else torch.ones_like(scores)
        if take >= scores.shape[1]:
            return (names, None), weights
        gate, chosen = rank_gate(scores.detach(), take)
        if one:
            return (names, chosen[0]), weights.gather(1, chosen)
        return (names, None), gate * weights

    def _choice(self, picked: list[tuple[Group, Tensor]], snapshot: bool) -> Choice:
        """Old experts first, then shared ranks, then new experts, where they are apart: what learns comes last."""
        groups = []
        for (names, ranks), gate in picked:
            if ranks is None:
                sizes = self.sizes(snapshot)
                columns = gate.split([sizes[name] for name in names], 1)
                groups += [(((name,), None), part) for name, part in zip(names, columns, strict=True)]
            else:
                groups.append(((names, ranks), gate))
        groups = [(group, self.rule.expert_scaling * gate) for group, gate in groups]
        shared = self.snapshot_shared if snapshot else self.shared
        if shared:
            always = groups[0][1].new_full((groups[0][1].shape[0], shared), self.rule.shared_scaling)
            groups.insert(0 if groups[0][0][0] == ("new",) else 1, ((("shared",), None), always))
        return Choice(tuple(group for group, _ in groups), torch.cat([gate for _, gate in groups], 1), snapshot)

    def _switched(self, query: Query, newest: Tensor, snapshot: bool) -> Choice:
        """New experts with the best old ones for samples of the newest task, old experts only for the others."""
        sizes, rank = self.sizes(snapshot), self.rule.rank
        scores = {part: self.scores(part, query, snapshot) for part in EXPERTS}

        def best(part: str, take: int) -> Tensor:
            if take <= 0:
                return torch.zeros_like(scores[part])
            gate = torch.ones_like(scores[part])
            if take < sizes[part]:
                gate = rank_gate(scores[part].detach(), take)[0]
            return gate * scores[part] if self.rule.value == "score" else gate

        rows = newest[:, None]
        old = torch.where(rows, best("old", rank - sizes["new"]), best("old", rank))
        new = torch.where(rows, best("new", rank), 0)
        return self._choice([((("old",), None), old), ((("new",), None), new)], snapshot)


def normalised(x: Tensor) -> Tensor:
    """Rows of x at norm 1; a zero row stays zero."""
    return nn.functional.normalize(x, dim=-1)
