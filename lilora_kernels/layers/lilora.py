"""LiLoRALinear: a frozen linear layer with one small adapter per task on a shared basis."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..offloading import offloading, onload, onloaded
from ..ops.adapter_operation import before_backward
from ..routing.context import TEXT, BatchContext
from .base import AdaptedLinear, Factors, described, is_conv1d, is_number, is_plain, is_sharded
from .parameters import SharedParameter, TaskParameters, check_task_name, stacked, window
from .unattached import watch, watch_running_model

POLICIES = ("always", "first", "never")
KINDS = ("lilora_A", "lilora_B", "lilora_U", "lilora_V", "lilora_fusion")
_of_kinds = itemgetter(*KINDS)


RANK, DROPOUT = 128, 0.05  # of the paper


def default_sub_rank(r: int) -> int:
    return max(1, r // 2)


def default_alpha(r: int) -> float:
    return 2.0 * r


class LiLoRALinear(AdaptedLinear):
    """y = base_layer(x) + scaling * D(x) A^T M_t^T with M_t = f_t B0 + (1 - f_t) U_t V_t, f_t = sigmoid(fusion_t).

    Replaces a linear layer [N, K] in one line; `base_layer` may be any module that maps [..., K] to [..., N] and has
    in_features and out_features; unless freeze_base is False, it stops requiring gradients. A [r, K] and B0 [N, r] are
    shared by all tasks, U [N, sub_rank], V [sub_rank, r] and fusion [1] belong to one task; scaling = alpha / r
    (arXiv 2508.06202). With fusion=False M_t = B0 + U_t V_t. Defaults: sub_rank = max(1, r // 2), alpha = 2 r.

    train_a and train_b0 say when the shared factors train: "always", in the "first" task only, or "never".

    Parameters are created by `add_task`, in the dtype and on the device of the base weight. A and B0 lie in
    ParameterDicts under every task's name, one Parameter object each.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = RANK,
        sub_rank: int | None = None,
        alpha: float | None = None,
        dropout: float = DROPOUT,
        fusion: bool = True,
        train_a: str = "first",
        train_b0: str = "first",
        freeze_base: bool = True,
    ) -> None:
        for name, size in (("r", r), ("sub_rank", 1 if sub_rank is None else sub_rank)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} is {size!r}; it must be an integer of at least 1")
        sub_rank = default_sub_rank(r) if sub_rank is None else sub_rank
        if sub_rank > r:
            raise ValueError(
                f"sub_rank is {sub_rank} and r is {r}, the most that the rank of U V can be; give at most r"
            )
        alpha = default_alpha(r) if alpha is None else alpha
        if not is_number(alpha) or not 0 < alpha < math.inf:
            raise ValueError(f"alpha is {alpha!r}; it must be a positive number")
        for name, policy in (("train_a", train_a), ("train_b0", train_b0)):
            if policy not in POLICIES:
                raise ValueError(f"{name} is {policy!r}; it must be one of {list(POLICIES)}")
        super().__init__(base_layer, dropout, freeze_base)
        self.rank, self.sub_rank, self.alpha, self.fusion = r, sub_rank, alpha, fusion
        self.leading: tuple[int, ...] = getattr(base_layer, "leading", ())  # sizes of every factor in front of its own
        self.train_a, self.train_b0 = train_a, train_b0
        self.lilora_A, self.lilora_B = SharedParameter(self), SharedParameter(self)
        self.lilora_U, self.lilora_V, self.lilora_fusion = (TaskParameters(self) for _ in range(3))
        self.merged_task: str | None = None
        self.active: tuple[str, ...] = ()
        self._first: str | None = None  # the task that A and B0 were made with, until it is deleted
        self._frozen: Factors | None = None  # with all tasks' u, v, fusion by id: see serving.freeze
        self._thawed: Factors | None = None  # after unfreeze: those before it; the parameters still are their windows
        self._slot: Factors | None = None  # with u, v, fusion of the one active task; without for several
        self.register_load_state_dict_post_hook(_loaded)
        self.register_state_dict_post_hook(_copied)

    @property
    def lilora_scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def is_transposed(self) -> bool:
        """Whether the base weight is [K, N]."""
        return is_conv1d(self.base_layer)

    def has_plain_weight(self) -> bool:
        """Whether a delta can be added to the base weight as it is."""
        return is_plain(self.base_layer) or is_conv1d(self.base_layer)

    def weight_key(self, prefix: str) -> str:
        """The name of the base weight in a state dict where this layer's names start with `prefix`."""
        return f"{prefix}base_layer.weight"

    # --- tasks ------------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks in the order of their ids."""
        return [name for name in self.model_tasks.known if name in self.lilora_U]

    def add_task(self, name: str, init: bool = True, first: bool | None = None) -> None:
        """Create the parameters of a task (and of the shared factors with the first) and register its id.

        init=False leaves them uninitialised, for loading. first: of a saved task, whether A and B0 were made with it; by
        default the first that is added is the one. Nothing is added when the name is not allowed or taken.
        """
        check_task_name(name)
        self.onload()
        if name in self.lilora_U:
            raise ValueError(f"task {name!r} exists already; delete it first or choose another name")
        capacity = self.capacity
        tasks = self.model_tasks
        if capacity is not None and name not in tasks.known and not tasks.has_room(capacity):
            raise ValueError(
                f"task {name!r} does not fit: the model was frozen with a capacity of {capacity} tasks, and has them; delete or "
                "overwrite one, or freeze it again with a larger capacity"
            )

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(self.empty(*self.leading, *shape))

        first = not self.lilora_A if first is None else first
        if not self.lilora_A:
            self.lilora_A[name], self.lilora_B[name] = (
                parameter(self.rank, self.in_features),
                parameter(self.out_features, self.rank),
            )
            if init:
                nn.init.kaiming_uniform_(self.lilora_A[name].flatten(0, -2), a=math.sqrt(5))
                nn.init.zeros_(self.lilora_B[name])
        else:
            self.lilora_A[name] = next(iter(self.lilora_A.values()))
            self.lilora_B[name] = next(iter(self.lilora_B.values()))
        if first and self._first is None:
            self._first = name
        self.lilora_U[name] = parameter(self.out_features, self.sub_rank)
        self.lilora_V[name] = parameter(self.sub_rank, self.rank)
        if self.fusion:
            self.lilora_fusion[name] = parameter(*(() if self.leading else (1,)))
        if init:
            nn.init.zeros_(self.lilora_U[name])
            nn.init.kaiming_uniform_(self.lilora_V[name].flatten(0, -2), a=math.sqrt(5))
            if self.fusion:
                nn.init.normal_(self.lilora_fusion[name])
        tasks.add(name, capacity)
        if self._frozen is not None:
            self._fill_windows(name, self._frozen)
        if not self.active:
            self.set_task(name)
        else:
            for own in self._own(name):
                own.requires_grad_(False)
            self.bind()

    def is_first(self, name: str) -> bool:
        """Whether A and B0 were made with this task."""
        return self._first == name

    @torch.no_grad()
    def delete_task(self, name: str) -> None:
        """Remove a task's parameters; the ids of the others stay."""
        self._require(name)
        self.onload()
        if self.merged_task == name:
            self.unmerge()
        own = self._own(name)
        train = any(parameter.requires_grad for parameter in own)
        if self._frozen is not None or self._thawed is not None:  # leave their places in the stacks empty
            for parameter in own:
                place = parameter.detach()
                parameter.data = place.clone()
                place.zero_()
        for kind in KINDS:
            if name in getattr(self, kind):
                del getattr(self, kind)[name]
        self.model_tasks.remove(name)
        if self._first == name:
            self._first = None
        if name in self.active:
            self.set_task(*(task for task in self.active if task != name), train=train)
        else:
            self.bind()

    def set_task(self, *names: str, train: bool = True) -> None:
        """Make a task the one that `forward` uses and trains; several names train together, by task ids.

        Parameters of the other tasks stop requiring gradients; the shared factors follow train_a and train_b0. Those that
        accelerate offloads come in for good where something trains: an optimizer holds them.
        """
        for name in names:
            self._require(name)
        if train and names:
            self.onload()
        self.active = tuple(names)
        self.model_tasks.activate(self.active, train)
        for task in self.lilora_U:
            for own in self._own(task):
                own.requires_grad_(train and task in names)
        self.train_shared(train)
        self.bind()

    def onload(self) -> None:
        """Take the adapter's parameters out of accelerate's offloading, if they are in it; the base layer stays there."""
        onload(*self._kinds)

    def keep(self, kind: TaskParameters, device: torch.device) -> None:
        """Take back parameters that accelerate has offloaded without having them, as PEFT's files for it do not name them."""
        del kind._hf_hook
        if self._slot is not None and (own := self._slot[self._kinds.index(kind)]) is not None:
            kind[self.active[0]] = nn.Parameter(own.detach().to(device), requires_grad=own.requires_grad)

    def train_shared(self, train: bool = True) -> None:
        """Let A and B0 require gradients as train_a and train_b0 say for the active tasks."""
        first = self._first in self.active
        for policy, shared in ((self.train_a, self.lilora_A), (self.train_b0, self.lilora_B)):
            trains = bool(self.active) and (policy == "always" or (policy == "first" and first))
            for parameter in shared.values():
                parameter.requires_grad_(train and trains)

    def bind(self) -> None:
        """Rebuild what compiled forwards read: a lookup by task name there would recompile for every task."""
        self._bind_slot()
        self._settle(self.capacity)

    def _settle(self, capacity: int | None) -> None:
        if self.lilora_U:
            self.model_tasks.settle(next(iter(self.lilora_U.values())).device, capacity)

    def _bind_slot(self) -> None:
        if len(self.active) == 1:
            self._slot = Factors(self._parameters_of(self.active[0]))
        elif self.lilora_U:
            first = next(iter(self.lilora_A))
            self._slot = Factors((self.lilora_A[first], self.lilora_B[first], None, None, None))
        else:
            self._slot = None
        if self._frozen is not None and self._slot is not None:
            self._frozen = Factors((*self._slot[:2], *self._frozen[2:]))

    def replaced(self, name: str) -> None:
        """A Parameter of the task is another object now."""
        if self._slot is not None:
            self._bind_slot()
        if self._frozen is not None and name in self.model_tasks.known:
            self._fill_windows(name, self._frozen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LiLoRALinear":
        capacity, self._frozen, self._thawed = self.capacity, None, None
        super()._apply(fn, recurse)
        self.bind()
        if capacity is not None and self._is_shared():
            self.batch_invariant = False
            warnings.warn(
                "parameters in shared memory are not frozen any more; see lilora_kernels.freeze", stacklevel=2
            )
        elif capacity is not None:
            self.freeze(capacity)
        return self

    def __getstate__(self) -> dict:
        # The parameters of a copy are not windows.
        return self.__dict__ | {"_frozen": None, "_thawed": None, "batch_invariant": False}

    # --- serving ----------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int | None:
        """How many ids a frozen layer has room for; None unless it is frozen."""
        return None if self._frozen is None else len(self._frozen[2])

    def require_freezable(self) -> None:
        """RuntimeError for parameters that are not here in full outside the layer's forward, or differ in dtype."""
        self.onload()
        own = [p for entries in self._kinds[2:] for p in entries.values()]
        if any(p.is_meta or is_sharded(p) for p in own):
            raise RuntimeError(
                f"{self.path}: a model whose adapters are sharded or on the meta device cannot be frozen; load it in full first"
            )
        if self._is_shared():
            raise RuntimeError(
                f"{self.path}: parameters in shared memory (share_memory(), or sent to another process) cannot be frozen: what "
                "other processes write into them would not be seen"
            )
        if len(dtypes := {p.dtype for p in own}) > 1:
            raise RuntimeError(
                f"tasks of the dtypes {sorted(map(str, dtypes))} cannot be frozen together; cast them to one"
            )

    def _is_shared(self) -> bool:
        """Whether processes share the parameters: a frozen layer would compute with copies of them."""
        return any(p.is_cpu and p.is_shared() for kind in self._kinds[2:] for p in kind.values())

    def freeze(self, capacity: int) -> None:
        """See `serving.freeze`. Forwards of other threads read the stacks as soon as they are there: filled and settled."""
        like = next(iter(self.lilora_U.values()), None)
        like = self.empty(0) if like is None else like
        stacks = self._frozen or self._thawed
        if stacks is None or (len(stacks[2]), stacks[2].dtype, stacks[2].device) != (capacity, like.dtype, like.device):
            sizes = [(self.out_features, self.sub_rank), (self.sub_rank, self.rank), () if self.fusion else None]
            shapes = [None if size is None else (capacity, *self.leading, *size) for size in sizes]
            stacks = Factors((None, None, *(None if shape is None else like.new_zeros(shape) for shape in shapes)))
        for name in self.tasks:
            self._fill_windows(name, stacks)
        self._settle(capacity)
        self._frozen = stacks if self._slot is None else Factors((*self._slot[:2], *stacks[2:]))

    def unfreeze(self) -> None:
        self._thawed = self._frozen or self._thawed
        self._frozen, self.batch_invariant = None, False

    def train(self, mode: bool = True) -> "LiLoRALinear":
        if mode:
            self.unfreeze()
        return super().train(mode)

    @torch.no_grad()
    def _fill_windows(self, name: str, stacks: Factors) -> None:
        """Make the task's parameters windows of the stacks of a frozen layer, with the values that they have."""
        for stack, entries in zip(stacks[2:], self._kinds[2:], strict=True):
            if name in entries and not entries[name].is_meta:  # else a loader is still to bring it
                own, place = entries[name], stack[self.model_tasks.id_of(name)].view_as(entries[name])
                if own.data_ptr() != place.data_ptr():
                    own.data = window(place.copy_(own))

    def _require_windows(self, stacks: Factors) -> None:
        """RuntimeError where a frozen layer has other parameters than windows of its stacks."""
        for stack, kind in zip(stacks[2:], self._kinds[2:], strict=True):
            for name, own in kind._parameters.items():
                if own.data_ptr() != stack[self.model_tasks.id_of(name)].data_ptr():
                    raise RuntimeError(
                        f"{self.path}: the parameters of task {name!r} were replaced, as torch.func.functional_call does, and "
                        "a frozen model would not see it; unfreeze(model) first"
                    )

    @property
    def _kinds(self) -> tuple[TaskParameters, ...]:
        return _of_kinds(self._modules)

    def _own(self, name: str) -> list[nn.Parameter]:
        return [parameters[name] for parameters in self._kinds[2:] if name in parameters]

    def _parameters_of(self, name: str) -> tuple[Any, ...]:
        return tuple(kind._parameters.get(name) for kind in self._kinds)

    def _require(self, name: str) -> None:
        if name not in self.lilora_U:
            raise ValueError(f"task {name!r} is unknown; this layer knows {self.tasks}")

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, task: Tensor | None = None, **kwargs: Any) -> Tensor:
        """x [..., K] -> [..., N].

        task: [B] int32 ids for x [B, ..., K], -1 for samples without an adapter, or [B, L] for x [B, L, K]. Without it
        the context of the running forward decides, and without task ids there the active task. Raises when several tasks
        are active and nothing decides.
        """
        if "task_ids" in kwargs:
            raise TypeError(
                "LiLoRALinear: task_ids is an argument of a model, after attach(model); a layer alone takes task, ids [B] int32"
            )
        own = self._modules["lilora_U"]
        if "_hf_hook" in own.__dict__ and not torch.compiler.is_compiling() and offloading(own):
            if self.training and self._trains():
                raise RuntimeError(
                    f"{self.path}: task {self.active[0]!r} trains, but its parameters are offloaded and an optimizer holds mere "
                    "placeholders; make the task active again (set_task, set_adapter), which brings them in, then the optimizer"
                )
            with onloaded(*self._kinds):
                return self._forward(x, args, kwargs, task)
        return self._forward(x, args, kwargs, task)

    def _forward(self, x: Tensor, args: tuple, kwargs: dict, task: Tensor | None) -> Tensor:
        adapter = self._adapter(x, task)
        if adapter is None:
            return self.base_layer(x, *args, **kwargs)
        factors, rows = adapter
        y = self._adapted(x, factors, self.lilora_scaling, self._p, args, kwargs, task=rows)
        self._expect_same_tasks(y)
        return y

    def _adapter(self, x: Tensor, task: Tensor | None = None) -> tuple[Factors, Tensor | None] | None:
        """What this forward adds to the base: factors and the task of each row of x; None for nothing."""
        tasks, place = self.model_tasks, self.place
        if task is None:
            context = tasks.current
        else:
            place = TEXT
            ids, known = tasks.ids(task, x.shape[0] if x.dim() > 1 else 1, x.device)
            if ids.dim() == 2 and ids.shape != x.shape[:-1]:
                raise ValueError(
                    f"task has the shape {list(ids.shape)}; it must be {list(x.shape[:-1])}, one id for each row of x"
                )
            context = BatchContext(ids, ids=known, tasks=tasks, of_rows=True)
        routed = None if context is None or context.task is None else context
        if self.merged_task is not None:
            if routed is not None:
                raise RuntimeError(
                    f"task {self.merged_task!r} is merged into the base weight; unmerge() before routing tasks"
                )
            return None
        # Nothing below may look at how many tasks there are: a compiled graph would be made again for each.
        slot, compiling = self._slot, torch.compiler.is_compiling()
        if not compiling and not self.ran:
            if self.path == AdaptedLinear.path:
                watch_running_model()
            self.ran = tasks.reached = True
        if slot is not None and not compiling:
            # Code that swaps Parameters past __setattr__ (offloading, functional_call) does not tell us.
            name = self.active[0] if len(self.active) == 1 else next(iter(self.lilora_A._parameters))
            for kind, own in zip(self._kinds, slot, strict=True):
                if own is not None and own is not kind._parameters.get(name):
                    if self._frozen is not None:
                        self._require_windows(self._frozen)
                    self._bind_slot()
                    slot = self._slot
                    break
        if routed is not None:
            return None if slot is None else self._mixed(x, slot[:2], routed, place)
        if context is None and not compiling:
            tasks.require_context()
        if slot is None or slot[2] is None:
            if len(self.active) > 1:
                raise ValueError(f"the tasks {list(self.active)} are active together; pass task ids with the batch")
            return None
        return slot, None

    def _mixed(self, x: Tensor, shared: tuple[Tensor, ...], context: BatchContext, place: str | None) -> tuple | None:
        """As `_adapter`, for tasks by sample. shared: a and b0; place: where x lies."""
        frozen = self._frozen  # read once: another thread may freeze or unfreeze meanwhile
        trains = self._trains()
        if frozen is not None and not trains:
            return frozen, context.rows(x, place, (False, False, True), self.path)
        whose = trains, self.training, False
        names, _ = context.chosen(*whose)
        if not names:
            return None
        rows = context.rows(x, place, whose, self.path)
        if context.generating and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            key = self, self.model_tasks.changes
            if key not in context.stacks:
                # A copy even of one task: a sharded one is there while the layer runs only.
                stacks = (t if t is None else t.clone() for t in self._stack(names))
                context.stacks[key] = Factors((*shared, *stacks))
            factors = context.stacks[key]
            if factors[0] is not shared[0] or factors[1] is not shared[1]:  # brought anew for every step
                factors = context.stacks[key] = Factors((*shared, *factors[2:]))
        else:
            factors = Factors((*shared, *self._stack(names)))
        return factors, rows

    def _stack(self, names: tuple[str, ...]) -> tuple[Tensor | None, ...]:
        """Of these tasks u [T, N, S], v [T, S, R], fusion [T]; `leading` behind T."""
        fusion = stacked(self.lilora_fusion, names).view(len(names), *self.leading) if self.fusion else None
        return stacked(self.lilora_U, names), stacked(self.lilora_V, names), fusion

    def stacking(self) -> tuple[bool, bool, bool]:
        """What decides which tasks a mixed forward stacks: see `BatchContext.chosen`; and whether it reads frozen stacks."""
        trains = self._trains()
        return trains, self.training, self._frozen is not None and not trains

    @property
    def _p(self) -> float:
        return self.dropout if self.training else 0.0

    def _trains(self) -> bool:
        return torch.is_grad_enabled() and any(self.lilora_U._parameters[name].requires_grad for name in self.active)

    def _expect_same_tasks(self, y: Tensor) -> None:
        """Let the backward of y raise if the active task is set before it."""
        if y.requires_grad and not torch.compiler.is_compiling() and self._trains():
            before_backward(y, partial(self.model_tasks.require, self.model_tasks.activation))

    @torch.no_grad()
    def check_load(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """RuntimeError for what would change a merged task, or the weight that it is merged into: `unmerge` subtracts it; and
        for several A or B0, of which the last one would be that of all tasks."""
        for kind in KINDS[:2]:
            held = {name: state.get(f"{prefix}{kind}.{name}") for name in getattr(self, kind)}
            given = {name: t for name, t in held.items() if t is not None and not (t.is_meta or is_sharded(t))}
            for name, value in given.items():
                one, first = next(iter(given.items()))
                value = value.to(first.device, first.dtype)
                if value.shape != first.shape or not torch.allclose(value, first, rtol=0, atol=0, equal_nan=True):
                    raise RuntimeError(
                        f"{prefix}{kind} is not the same for the tasks {one!r} and {name!r}, which share it; load the state "
                        "dict of one model"
                    )
        if self.merged_task is None:
            return
        kept = {f"{kind}.{name}": p for kind in KINDS[:2] for name, p in getattr(self, kind).items()}
        kept |= {f"{kind}.{self.merged_task}": getattr(self, kind).get(self.merged_task) for kind in KINDS[2:]}
        kept = {prefix + name: own for name, own in kept.items()}
        kept[self.weight_key(prefix)] = getattr(self.base_layer, "weight", None)
        for name, own in kept.items():
            new = state.get(name)
            if new is not None and own is not None and not (new.shape == own.shape and torch.equal(new.to(own), own)):
                raise RuntimeError(
                    f"{name} cannot be loaded over while task {self.merged_task!r} is merged; unmerge() first"
                )

    @torch.no_grad()
    def overwrite_task(self, name: str, u: Tensor, v: Tensor, fusion: Tensor | None = None) -> None:
        """Copy u [N, sub_rank], v [sub_rank, r] and fusion [1] over a task's; ValueError, and nothing written, for others.

        No tensor moves, so a compiled or captured forward stays valid and sees the new values.
        """
        self._require(name)
        self.onload()
        own, values = self._own(name), [u, v] if fusion is None else [u, v, fusion]
        if [p.shape for p in own] != [value.shape for value in values] or self.merged_task == name:
            got = [list(value.shape) for value in values]
            state = (
                "is merged; unmerge() it first" if self.merged_task == name else f"has {[list(p.shape) for p in own]}"
            )
            raise ValueError(f"task {name!r} cannot be overwritten with tensors of the shapes {got}: it {state}")
        if any(parameter.is_meta for parameter in own):
            raise ValueError(f"task {name!r} cannot be overwritten: its tensors are on the meta device, without values")
        for parameter, value in zip(own, values, strict=True):
            parameter.copy_(value)
        for stack in (self._frozen or ())[2:]:  # has the same memory, and versions of its own: a backward shall raise
            if stack is not None and not stack.is_inference():
                torch.autograd.graph.increment_version(stack)

    # --- merging ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def delta_weight(self, name: str) -> Tensor:
        """scaling * M_t A of one task in the adapter's dtype (computed in fp32 at least), as the base weight lies."""
        self._require(name)
        with onloaded(*self._kinds):
            a, b0, u, v, fusion = self._parameters_of(name)
        wide = torch.promote_types(a.dtype, torch.float32)
        m, b0 = u.to(wide) @ v.to(wide), b0.to(wide)
        m = b0 + m if fusion is None else torch.lerp(m, b0, fusion.to(wide).sigmoid().view(*self.leading, 1, 1))
        delta = (self.lilora_scaling * m @ a.to(wide)).to(a.dtype)
        return delta.mT if self.is_transposed else delta

    def require_own_weight(self) -> None:
        """RuntimeError for a base whose weight is made of other tensors in every forward: what is added to it is lost."""
        if not isinstance(self.base_layer.weight, nn.Parameter):
            raise RuntimeError(
                f"{self.path}: the base weight is made anew in every forward, as by pruning, weight_norm or parametrizations, "
                "so a merge would be lost; remove them first (prune.remove, remove_parametrizations)"
            )

    @torch.no_grad()
    def merge(self, name: str) -> None:
        """Add a task to the base weight, for inference without any cost; forward then runs the base alone."""
        if self.merged_task is not None:
            raise RuntimeError(f"task {self.merged_task!r} is merged already; unmerge() first")
        if not self.has_plain_weight():
            raise TypeError(f"merge needs a plain nn.Linear base, not a {described(self.base_layer)}")
        self.require_own_weight()
        weight = self.base_layer.weight
        weight += self.delta_weight(name).to(weight.dtype)
        self.merged_task = name

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged task out again, by subtraction: exact up to the rounding of the base weight's dtype."""
        if self.merged_task is None:
            return
        weight = self.base_layer.weight
        weight -= self.delta_weight(self.merged_task).to(weight.dtype)
        self.merged_task = None

    def extra_repr(self) -> str:
        return (
            f"r={self.rank}, sub_rank={self.sub_rank}, alpha={self.alpha}, dropout={self.dropout}, "
            f"train_a={self.train_a!r}, train_b0={self.train_b0!r}, tasks={self.tasks}, active={list(self.active)}"
        )


def _loaded(layer: LiLoRALinear, _: object) -> None:
    layer.bind()


def _copied(layer: LiLoRALinear, state: dict[str, Any], prefix: str, _: object) -> None:
    """What is taken out of the stacks of a frozen layer stays as it is when another task takes its place there."""
    if layer._frozen is not None or layer._thawed is not None:
        for kind in KINDS[2:]:
            for name in getattr(layer, kind):
                key = f"{prefix}{kind}.{name}"
                if key in state and not isinstance(state[key], nn.Parameter):  # as with keep_vars
                    state[key] = state[key].clone()


def set_task(model: nn.Module, *names: str, train: bool = True) -> None:
    """`LiLoRALinear.set_task` for every adapted layer of a model; RuntimeError for a model without any.

    PEFT hears of it, which merges and reports the adapters that it believes active.
    """
    layers: Sequence[LiLoRALinear] = [m for m in model.modules() if isinstance(m, LiLoRALinear)]
    if not layers:
        raise RuntimeError("this model has no LiLoRALinear layer")
    tuner: Any = next(
        (m for m in model.modules() if hasattr(type(m), "set_task") and not isinstance(m, LiLoRALinear)), None
    )
    if tuner is not None and names:
        tuner.set_task(*names, train=train)
    else:
        for layer in layers:
            layer.set_task(*names, train=train)
    if len(names) == 1 and "active_adapter" in vars(model):  # PeftModel knows one
        model.active_adapter = names[0]
    watch(model)
