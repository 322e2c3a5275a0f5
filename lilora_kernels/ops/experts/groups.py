"""Rows in the order of their experts and tasks, and products with a matrix for each run of them."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from ..delta.eager import cast, wide, wide_product

# What torch._grouped_mm takes on a GPU: so many groups, and sizes that are multiples of sixteen bytes.
MOST, ALIGNED = 1024, 8


def group_rows(expert: Tensor, task: Tensor | None, experts: int, tasks: int) -> tuple[Tensor, Tensor]:
    """The order of rows by expert and, within one, by task; and where each group ends.

    expert: [tokens, k] integers below `experts`; task: [tokens] int32 of T = `tasks` tasks, others for none, or None where all
    rows belong to one. A row is one of the M = tokens * k choices. -> (order [M] int64, ends [E] int32, or [E, T + 1] with the
    rows without a task first). Stable, and the host waits for nothing.
    """
    key, shape = expert.long(), (experts,)
    if task is not None:
        group = torch.where((task >= 0) & (task < tasks), task + 1, 0)
        key, shape = key * (tasks + 1) + group.unsqueeze(1), (experts, tasks + 1)
    key, order = torch.sort(key.flatten(), stable=True)
    groups = torch.arange(prod(shape), device=key.device)
    return order, torch.searchsorted(key, groups, right=True, out_int32=True).view(shape)


@dataclass(eq=False)
class Groups:
    """Runs of rows that share a matrix.

    ends: [G] int32. spans: of the groups that have rows, (index of their matrix, rows); None where the host does not know them,
    and the device's grouped product takes them. tasks: T where matrices are [T, E, ...] and every expert's first group has none.
    """

    ends: Tensor
    spans: list[tuple[int | tuple[int, int], slice]] | None
    tasks: int | None = None

    @cached_property
    def sizes(self) -> Tensor:
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1))

    def spread(self, values: Tensor, rows: int) -> Tensor:
        """One value [G] of each group -> [rows, 1]."""
        return values.repeat_interleave(self.sizes, output_size=rows).unsqueeze(1)

    def sum(self, values: Tensor) -> Tensor:
        """Sums of the values [M] of each group's rows -> [G]."""
        return torch.segment_reduce(values, "sum", lengths=self.sizes, axis=0, unsafe=True, initial=0)

    def laid(self, matrices: Tensor) -> Tensor:
        """[G, n, m] in the order of the groups."""
        if self.tasks is None:
            return matrices
        return torch.nn.functional.pad(matrices.transpose(0, 1), (0, 0, 0, 0, 1, 0)).flatten(0, 1)

    def taken(self, values: Tensor) -> Tensor:
        """[G, ...] in the order of the groups -> [T, E, ...], or [E, ...]."""
        if self.tasks is None:
            return values
        return values.unflatten(0, (-1, self.tasks + 1))[:, 1:].transpose(0, 1).contiguous()

    def times(self, x: Tensor, matrices: Tensor, add_to: Tensor | None = None) -> Tensor:
        """x [M, n] by each group's own of the matrices [.., n, m], in x's dtype -> [M, m]; added where that is given.

        Rows of no matrix stay unwritten: what is made of them is left out by their group.
        """
        if self.spans is None:
            y = torch._grouped_mm(x.contiguous(), cast(self.laid(matrices), x.dtype), offs=self.ends)
            return y if add_to is None else add_to.add_(y)
        y = x.new_empty(len(x), matrices.shape[-1]) if add_to is None else add_to
        for at, rows in self.spans:
            matrix = cast(matrices[at], x.dtype)
            if add_to is None:
                torch.mm(x[rows], matrix, out=y[rows])
            else:
                y[rows].addmm_(x[rows], matrix)
        return y

    def sum_products(self, left: Tensor, right: Tensor, like: Tensor) -> Tensor:
        """left^T right of each group's rows, [.., n, m] in the shape and dtype of `like`; zero for groups without rows."""
        if self.spans is None:
            sums = torch._grouped_mm(left.contiguous().mT, right.contiguous(), offs=self.ends)
            return cast(self.taken(sums.masked_fill_((self.sizes == 0)[:, None, None], 0)), like.dtype)
        sums = torch.zeros_like(like, memory_format=torch.contiguous_format)
        wider = left.dtype != wide(left.dtype) and like.dtype == wide(left.dtype)
        for at, rows in self.spans:
            sums[at] = wide_product(left[rows].T, right[rows]) if wider else left[rows].T @ right[rows]
        return sums


def groups_of(ends: Tensor, x: Tensor, sizes: tuple[int, ...]) -> tuple[Groups, Groups]:
    """(by expert, by expert and task) of the rows of x, which end at ends [E] or [E, T + 1]; sizes: those of all matrices.

    ValueError on a CPU for ends that are not those of the rows.
    """
    tasks = ends.shape[1] - 1 if ends.dim() == 2 else None
    last = ends if tasks is None else ends[:, -1].contiguous()
    if len(x) and takes_grouped_product(x, ends.numel(), sizes):
        by_expert = Groups(last, None)
        return by_expert, by_expert if tasks is None else Groups(ends.flatten(), None, tasks)
    known = ends.flatten().tolist()
    if known != sorted(known) or known[0] < 0 or known[-1] != len(x):
        raise ValueError(
            f"ends goes from {known[0]} to {known[-1]} for the {len(x)} rows of x; it must be what group_rows gives for them"
        )
    if tasks is None:
        by_expert = Groups(last, spans_of(known))
        return by_expert, by_expert
    pairs = [(divmod(g, tasks + 1), rows) for g, rows in spans_of(known)]
    own = [((t - 1, e), rows) for (e, t), rows in pairs if t > 0]
    return Groups(last, spans_of(known[tasks :: tasks + 1])), Groups(ends.flatten(), own, tasks)


def spans_of(ends: list[int]) -> list[tuple[int, slice]]:
    return [(g, slice(start, stop)) for g, (start, stop) in enumerate(pairwise([0, *ends])) if stop > start]


def takes_grouped_product(x: Tensor, groups: int, sizes: tuple[int, ...]) -> bool:
    """Whether the device multiplies all groups at once. On a CPU torch loops over them too, and fp64 it does not take."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    aligned = all(size % ALIGNED == 0 for size in sizes)
    return aligned and groups <= MOST and torch.cuda.get_device_capability(x.device) >= (8, 0)
