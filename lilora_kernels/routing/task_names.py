"""The names of a model's tasks by id, and which of them are active."""

from collections.abc import Sequence

import torch
from torch import Tensor

# One for each sample of a batch, or one for each token: [B] or [B, L].
TaskIds = Tensor | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | Sequence[Sequence[str]]


class TaskNames:
    """`names[i]` is the name of task i, None once deleted. Ids are used again where a frozen model has no others left."""

    def __init__(self) -> None:
        self.names: list[str | None] = []
        self._ids: dict[str, int] = {}
        self.changes = 0  # how often tasks came, went or became active
        self.active: tuple[str, ...] = ()
        self.train = True  # whether the active tasks do
        self.disabled = False  # as PEFT's disable_adapter does: no layer runs its adapter
        self._tables: dict[tuple, Tensor] = {}
        self._settled: dict[torch.device, tuple[int, int | None]] = {}  # `changes` and capacity that its tables are of

    @property
    def known(self) -> tuple[str, ...]:
        """The names of the tasks that there are, in the order of their ids."""
        return tuple(self._ids)

    @property
    def activation(self) -> tuple:
        """What a recomputation must find as its forward left it."""
        return self.active, self.train, self.disabled

    def id_of(self, name: str) -> int:
        if name not in self._ids:
            raise ValueError(f"task {name!r} is unknown; this model knows {list(self.known)}")
        return self._ids[name]

    def has_room(self, capacity: int) -> bool:
        """Whether one more task has an id below `capacity`."""
        return len(self.names) < capacity or None in self.names

    def add(self, name: str, capacity: int | None = None) -> None:
        """Give a task the next id, or if that is not below `capacity` the first of a deleted task; nothing if it has one."""
        if name in self._ids:
            return
        if capacity is None or len(self.names) < capacity:
            self._ids[name] = len(self.names)
            self.names.append(name)
        else:
            self.names[self.names.index(None)] = name
            self._ids = {each: at for at, each in enumerate(self.names) if each is not None}  # in the order of ids
        self.changes += 1

    def remove(self, name: str, forget: bool = False) -> None:
        """Take a task's id out of use; with `forget`, which undoes `add`, as if there had been none."""
        if name in self._ids:
            at = self._ids.pop(name)
            self.changes += 1
            if forget and at == len(self.names) - 1:
                del self.names[at]
            else:
                self.names[at] = None

    def ids(
        self, task_ids: TaskIds, samples: int | None, device: torch.device | None
    ) -> tuple[Tensor, list[int] | None]:
        """Names or ids, one per sample [B] or token [B, L] -> (int32 on `device`, the same as integers, one behind the other,
        None where the host would wait).

        None as a name and -1 as an id stand for no adapter.
        """
        if not isinstance(task_ids, Tensor):
            ordered = hasattr(task_ids, "__getitem__") and not isinstance(task_ids, str | dict)
            if not ordered or not hasattr(task_ids, "__len__") or getattr(task_ids, "ndim", 1) == 0:
                raise TypeError(f"task_ids is {task_ids!r}; pass one name or id per sample, in a list")
            rows = [list(t) if isinstance(t, list | tuple) or getattr(t, "ndim", 0) else t for t in task_ids]
            by_token = bool(rows) and all(isinstance(t, list) for t in rows)
            named = [t for row in rows for t in row] if by_token else rows
            named = [-1 if t is None else self.id_of(t) if isinstance(t, str) else t for t in named]
            if not all(hasattr(t, "__index__") and not isinstance(t, bool) for t in named):  # numpy's integers have it
                raise TypeError(f"task_ids is {list(task_ids)!r}; it must hold task names or integer ids")
            if by_token and len({len(row) for row in rows}) > 1:
                raise ValueError(
                    f"task_ids has rows of {[len(row) for row in rows]} ids; give one for each token, padding too"
                )
            # As int32 some would be too large, and have to be named below.
            task_ids = torch.tensor([int(t) for t in named], dtype=torch.int64, device="cpu")
            task_ids = task_ids.view(len(rows), -1) if by_token else task_ids
        if task_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"task_ids is {task_ids.dtype}; it must be torch.int32 or torch.int64")
        if task_ids.dim() not in (1, 2) or (samples is not None and task_ids.shape[0] != samples):
            wanted = "one id per sample" if samples is None else f"[{samples}], one id per sample of the batch"
            raise ValueError(f"task_ids has the shape {list(task_ids.shape)}; it must be {wanted}")
        values = None
        if task_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            values = task_ids.flatten().tolist()
            for t in set(values):
                if t != -1 and not (0 <= t < len(self.names) and self.names[t] is not None):
                    known = {i: name for i, name in enumerate(self.names) if name is not None}
                    raise ValueError(f"task_ids holds {t}; known ids are {known}, and -1 for no adapter")
        return task_ids.to(device=device, dtype=torch.int32), values

    def positions(self, task: Tensor, training: bool) -> Tensor:
        """Ids whose values the host does not know -> positions among the active tasks in training, else among `known`.

        Ids of no task become -1. In training those of a task that is not active become a position that does not exist,
        for which kernels write NaN: an error would have to wait for the device.
        """
        if not training and len(self._ids) == len(self.names):
            return task
        return self._looked_up(training, task)

    def slots(self, task: Tensor) -> Tensor:
        """As `positions`, for a frozen model, in which an id is its own position."""
        return self._looked_up("frozen", task)

    def _looked_up(self, kind: object, task: Tensor) -> Tensor:
        table = self._tables[kind, task.device]
        return table[task.long().clamp(-1, table.shape[0] - 1)]

    def activate(self, names: tuple[str, ...], train: bool) -> None:
        """Of the model: layers have their own, which are these unless one of them alone was told otherwise."""
        if (self.active, self.train) != (names, train):
            self.active, self.train = names, train
            self.changes += 1

    def settle(self, device: torch.device, capacity: int | None) -> None:
        """Make what `positions` and, of layers with room for `capacity` ids, `slots` read on this device.

        Ahead of a graph, which could not. The first layer of a model that asks after a change makes them for all.
        """
        changes, room = self._settled.get(device, (None, None))
        if changes == self.changes and capacity in (None, room):
            return
        for training, names in ((True, self.active), (False, self.known)):
            position = {name: i for i, name in enumerate(names)} | {None: -1}
            table = [position.get(name, len(names)) for name in self.names] + [-1]  # -1 and foreign ids read the last
            self._tables[training, device] = torch.tensor(table, dtype=torch.int32, device=device)
        if capacity is not None:
            slots = [-1 if name is None else i for i, name in enumerate(self.names)]
            slots = torch.tensor(slots + [-1] * (capacity + 1 - len(slots)), dtype=torch.int32, device="cpu")
            table = self._tables.get(("frozen", device))
            if table is None or table.shape != slots.shape:
                self._tables["frozen", device] = slots.to(device)
            else:  # in place: a captured graph reads it
                table.copy_(slots)
        self._settled[device] = self.changes, capacity

    def require_active(self, ids: list[int]) -> None:
        for i in set(ids) - {-1}:
            if self.names[i] not in self.active:
                raise ValueError(
                    f"the batch has samples of task {self.names[i]!r}, and {list(self.active)} train; make all tasks of a "
                    "training batch active with set_task(model, *names), or run it under torch.no_grad() or model.eval()"
                )
