"""Which rows belong to which task, as plans made of library products want to know it."""

from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ..schema import AdapterArgs

LONG_RUN = 32  # mean rows per run of equal ids from which a product per run is cheaper than permuting [M, N]


class Group(NamedTuple):
    """Rows of one task, or of several whose runs of rows are equally long and lie one behind the other.

    Where the host would have to wait for a device to see ids: all rows, and a mask [M, 1].
    """

    tasks: int | slice | Tensor
    rows: slice | None = None  # None for all
    count: int = 1  # of tasks
    mask: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Its rows of a tensor [M, n]: [m, n], of several tasks [count, m, n]."""
        tensor = tensor if self.rows is None else tensor[self.rows]
        return tensor if self.count == 1 else tensor.view(self.count, -1, tensor.shape[1])

    def masked(self, rows: Tensor) -> Tensor:
        return rows if self.mask is None else torch.where(self.mask, rows, 0)  # NaN of other rows too

    def own(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """Of u or v [T, n, m] that of its task, [n, m], of several tasks [count, n, m]."""
        if factor.dim() == 3:
            factor = factor.index_select(0, self.tasks) if isinstance(self.tasks, Tensor) else factor[self.tasks]
        return factor if factor.dtype == dtype else factor.to(dtype)


class Layout(NamedTuple):
    """Which rows belong to which task.

    order: the permutation that makes each task one run, None where it is so already; task: [M] in this order, None without
    one. runs: a Group for each task; groups: those of equal length joined. bare: rows without a task. stretches: the runs
    before the permutation, by task, where they are so long that a product for each is cheaper than to permute [M, N].
    present: the tasks of `runs` [t] int32, None where they are 0, 1, ... is_seen: whether the host knows all this.
    """

    order: Tensor | None
    task: Tensor | None
    runs: list[Group]
    groups: list[Group]
    bare: tuple[slice, ...] = ()
    stretches: list[Group] | None = None
    present: Tensor | None = None
    is_seen: bool = True

    def ordered(self, tensor: Tensor | None) -> Tensor | None:
        return tensor if self.order is None or tensor is None else tensor[self.order]

    def restored(self, tensor: Tensor) -> Tensor:
        return tensor if self.order is None else torch.empty_like(tensor).index_copy_(0, self.order, tensor)

    @property
    def one(self) -> bool:
        """Whether all rows belong to one task."""
        return len(self.runs) == 1 and self.runs[0].rows is None and self.is_seen


ONE_TASK = Layout(None, None, [Group(0)], [Group(0)])


def layout_of(adapter: AdapterArgs) -> Layout:
    """Raises ValueError for ids of no task; where the host does not see them their rows become NaN (see `shares`)."""
    task = adapter.task
    if task is None:
        return ONE_TASK
    kept = getattr(task, "layouts", None)  # of a BatchContext, whose rows do not change
    if kept and not is_captured(task):
        return kept[0]
    on_host = task if seen_by_host(task) else getattr(task, "on_host", None)
    if on_host is None or is_captured(task):
        runs = [Group(t, mask=(task == t).unsqueeze(1)) for t in range(adapter.u.shape[0])]
        return Layout(None, None, runs, runs, is_seen=False)
    found = layout(on_host, adapter.u.shape[0], task.device)
    if kept is not None:
        kept.append(found)
    return found


def is_known(adapter: AdapterArgs) -> bool:
    """Whether the host knows which rows belong to which task, and a captured graph would not be run with others."""
    task = adapter.task
    if task is None:
        return True
    return (seen_by_host(task) or bool(getattr(task, "layouts", None)) or hasattr(task, "on_host")) and not is_captured(
        task
    )


def is_captured(task: Tensor) -> bool:
    """Whether a CUDA graph records the call, which will be run again with other ids."""
    return task.is_cuda and torch.cuda.is_current_stream_capturing()


def layout(task: Tensor, tasks: int, device: torch.device) -> Layout:
    """That of the rows' tasks, [M] on the host; its tensors lie on `device`."""
    order, stretches, found = None, None, runs_of(task)
    if len({t for t, _ in found}) < len(found):
        if len(task) >= LONG_RUN * len(found):
            stretches = [Group(t, rows) for t, rows in sorted(found, key=itemgetter(0)) if t >= 0]
        order = torch.argsort(task, stable=True)
        task = task[order]
        found = runs_of(task)
    for t, _ in found:
        if not -1 <= t < tasks:
            raise ValueError(
                f"task has the id {t}; ids must be in 0..{tasks - 1}, or -1 for rows without an adapter (a compiled model in "
                "training counts the active tasks alone: make all tasks of a batch active with set_task)"
            )
    runs = [Group(t, None if len(found) == 1 else rows) for t, rows in found if t >= 0]
    bare = tuple(rows for t, rows in found if t < 0)
    if order is None:
        task = None
    else:  # the host need not wait until the device has them
        order, task = order.to(device, non_blocking=True), task.to(device, non_blocking=True)
    ids, present = [run.tasks for run in runs], None
    if ids != list(range(len(ids))):
        present = torch.tensor(ids, dtype=torch.int32).to(device, non_blocking=True)
    return Layout(order, task, runs, joined(runs, device), bare, stretches, present)


def seen_by_host(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.is_cpu


def runs_of(task: Tensor) -> list[tuple[int, slice]]:
    ids, counts = torch.unique_consecutive(task, return_counts=True)
    lengths = counts.tolist()
    return [(t, slice(end - n, end)) for t, n, end in zip(ids.tolist(), lengths, accumulate(lengths), strict=True)]


def joined(runs: list[Group], device: torch.device) -> list[Group]:
    """Neighbours of equal length in one group."""
    groups = []
    for run in runs:
        last = groups[-1][-1].rows if groups else None
        if last is not None and run.rows == slice(last.stop, 2 * last.stop - last.start):
            groups[-1].append(run)
        else:
            groups.append([run])
    return [group[0] if len(group) == 1 else side_by_side(group, device) for group in groups]


def side_by_side(runs: list[Group], device: torch.device) -> Group:
    tasks, rows = [run.tasks for run in runs], slice(runs[0].rows.start, runs[-1].rows.stop)
    together = slice(tasks[0], tasks[-1] + 1)  # indexes without a copy
    neighbours = tasks == list(range(together.start, together.stop))
    return Group(together if neighbours else torch.tensor(tasks).to(device, non_blocking=True), rows, len(runs))
