"""A pool's rank experts: their keys, and which of them a batch of queries gets."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lilora_kernels import rank_gate
from lilora_kernels.layers.rank_pool import Choice, Group, joined


@dataclass(frozen=True)
class GateRule:
    """How a RankPool chooses. Published as PCLR; the values named first are the paper's, the others its code's.

    rank: ranks chosen among the experts. scope: one set per "sample" or per "batch" (in training; inference always
    chooses per sample). value: a chosen rank is weighted by its "score" or by 1 ("binary"). reuse: trained experts
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

    Experts lie in the parts "old" (trained before) and "new" (being trained), one key each; the ranks of the part
    "shared" are always on. All linears of a pool use one choice.
    """

    def __init__(self, rule: GateRule, text_width: int, vision_width: int) -> None:
        super().__init__()
        self.rule, self.widths = rule, (text_width, vision_width)
        self.text, self.vision = nn.ParameterDict(), nn.ParameterDict()
        self.shared = 0  # number of shared ranks
        self.teacher: dict[str, tuple[Tensor, Tensor]] = {}
        self.teacher_shared = 0

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

    def keys(self, part: str, teacher: bool = False) -> tuple[Tensor, Tensor]:
        """(text, vision) keys of a part, [n, d] each; n = 0 if there is no such part."""
        if teacher and part in self.teacher:
            return self.teacher[part]
        if not teacher and part in self.text:
            return self.text[part], self.vision[part]
        like = next(iter(self.text.values()), torch.empty(0))
        return tuple(like.new_empty(0, width) for width in self.widths)

    def sizes(self, teacher: bool = False) -> dict[str, int]:
        return {part: self.keys(part, teacher)[0].shape[0] for part in EXPERTS}

    def scores(self, part: str, query: Query, teacher: bool = False) -> Tensor:
        """How near each expert's key is to each query, [B, n] fp32; ValueError for a query of another width."""
        for name, value, width in zip(("text", "vision"), (query.text, query.vision), self.widths, strict=True):
            if value.dim() != 2 or value.shape[1] != width:
                raise ValueError(f"the {name} query is {list(value.shape)}; the keys want [samples, {width}]")
        text, vision = self.keys(part, teacher)
        if self.rule.query == "two":
            near = query.text @ normalised(text).T
            return near + self.rule.vision_weight * (query.vision @ normalised(vision).T)
        norm = (text.square().sum(1) + vision.square().sum(1)).sqrt()
        length = (query.text.square().sum(1) + query.vision.square().sum(1)).sqrt()
        inner = query.text @ text.T + query.vision @ vision.T
        return inner / (length[:, None] * norm).clamp_min(1e-12)

    def choose(self, query: Query, teacher: bool = False, newest: Tensor | None = None) -> Choice:
        """The ranks for these queries. newest [B] bool: samples that get the new experts (others the old ones only)."""
        sizes = self.sizes(teacher)
        new, old = sizes["new"], sizes["old"]
        if newest is not None and new and old:
            return self._switched(query, newest, teacher)
        rule = self.rule
        top_up = rule.reuse == "top_up" and self.training and not teacher  # inference chooses among all
        if new and new >= rule.rank and (top_up or not old):
            picks = [(("new",), rule.rank)]
        elif new and top_up and old:
            picks = [(("old",), rule.rank - new), (("new",), new)]
        else:
            picks = [(tuple(part for part in EXPERTS if sizes[part]), rule.rank)]
        one = query.text.shape[0] == 1 or (self.training and rule.scope == "batch")
        return self._choice([self._pick(names, take, query, teacher, one) for names, take in picks], teacher)

    def _pick(self, names: tuple[str, ...], take: int, query: Query, teacher: bool, one: bool) -> tuple[Group, Tensor]:
        """A group of experts and its gate: [1, take] over the chosen ranks if one set is for all, else [B, n] over all."""
        scores = joined([self.scores(name, query, teacher) for name in names], 1)
        if one:
            scores = scores.mean(0, keepdim=True)
        weights = scores if self.rule.value == "score" else torch.ones_like(scores)
        if take >= scores.shape[1]:
            return (names, None), weights
        gate, chosen = rank_gate(scores.detach(), take)
        if one:
            return (names, chosen[0]), weights.gather(1, chosen)
        return (names, None), gate * weights

    def _choice(self, picked: list[tuple[Group, Tensor]], teacher: bool) -> Choice:
        """Old experts first, then shared ranks, then new experts, where they are apart: what is trained comes last."""
        groups = []
        for (names, ranks), gate in picked:
            if ranks is None:
                sizes = self.sizes(teacher)
                columns = gate.split([sizes[name] for name in names], 1)
                groups += [(((name,), None), part) for name, part in zip(names, columns, strict=True)]
            else:
                groups.append(((names, ranks), gate))
        groups = [(group, self.rule.expert_scaling * gate) for group, gate in groups]
        shared = self.teacher_shared if teacher else self.shared
        if shared:
            always = groups[0][1].new_full((groups[0][1].shape[0], shared), self.rule.shared_scaling)
            groups.insert(0 if groups[0][0][0] == ("new",) else 1, ((("shared",), None), always))
        return Choice(tuple(group for group, _ in groups), torch.cat([gate for _, gate in groups], 1), teacher)

    def _switched(self, query: Query, newest: Tensor, teacher: bool) -> Choice:
        """New experts with the best old ones for samples of the newest task, old experts only for the others."""
        sizes, rank = self.sizes(teacher), self.rule.rank
        scores = {part: self.scores(part, query, teacher) for part in EXPERTS}

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
        return self._choice([((("old",), None), old), ((("new",), None), new)], teacher)


def normalised(x: Tensor) -> Tensor:
    """Rows of x at norm 1; a zero row stays zero."""
    return nn.functional.normalize(x, dim=-1)
