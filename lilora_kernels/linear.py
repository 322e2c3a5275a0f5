"""LiLoRALinear: a frozen linear layer with one small adapter per task on a shared basis."""

import math
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .adapted import AdaptedLinear, described, is_plain, is_sharded, version

POLICIES = ("always", "first", "never")


def check_task_name(name: str) -> None:
    """Raise ValueError for a name that cannot be a task: it becomes a key of parameters and a file name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(
            f"task name {name!r} is not allowed; use letters, digits, '-' and '_', starting with a letter or digit"
        )
    if (
        hasattr(nn.ParameterDict, name)
        or name in ("training", "weight", "bias")
        or name.startswith(("lilora_", "lora_"))
    ):
        raise ValueError(
            f"task name {name!r} is reserved by torch or PEFT; choose another, for example {'task-' + name!r}"
        )


class TaskParameters(nn.ParameterDict):
    """Parameters by task that rebind their layer's slot when code puts others in their places, as loaders and sharding do.

    A compiled forward does not look at them by name, so it would go on with the old ones. The stacked bank goes too.
    """

    def __init__(self, layer: "LiLoRALinear") -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not as a submodule

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        layer = self.__dict__.get("layer")
        if layer is not None and isinstance(value, nn.Parameter):
            layer._bank = None
            if layer.active == (name,):
                layer.bind()


class LiLoRALinear(AdaptedLinear):
    """y = base_layer(x) + scaling * D(x) A^T M_t^T with M_t = f_t B0 + (1 - f_t) U_t V_t, f_t = sigmoid(fusion_t).

    Replaces a linear layer [N, K] in one line; `base_layer` may be any module that maps [..., K] to [..., N] and has
    in_features and out_features. A [r, K] and B0 [N, r] are shared by all tasks, U [N, sub_rank], V [sub_rank, r] and
    fusion [1] belong to one task; scaling = alpha / r (arXiv 2508.06202). With fusion=False M_t = B0 + U_t V_t.

    train_a and train_b0 say when the shared factors learn: "always", in the "first" task only, or "never".

    Parameters are created by `add_task`, in the dtype and on the device of the base weight. A and B0 lie in
    ParameterDicts under every task's name, one Parameter object each. Mixed inference reads a stacked copy of U, V and
    fusion, gathered again when they change; a write through `.data` is no change that torch shows: call `bind()` after it.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 128,
        sub_rank: int = 64,
        alpha: float = 256.0,
        dropout: float = 0.05,
        fusion: bool = True,
        train_a: str = "first",
        train_b0: str = "first",
    ) -> None:
        for name, size in (("r", r), ("sub_rank", sub_rank)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}; it must be an integer of at least 1")
        for name, policy in (("train_a", train_a), ("train_b0", train_b0)):
            if policy not in POLICIES:
                raise ValueError(f"{name} is {policy!r}; it must be one of {list(POLICIES)}")
        super().__init__(base_layer, dropout)
        self.rank, self.sub_rank, self.alpha, self.fusion = r, sub_rank, alpha, fusion
        self.train_a, self.train_b0 = train_a, train_b0
        self.lilora_A, self.lilora_B = TaskParameters(self), TaskParameters(self)
        self.lilora_U, self.lilora_V, self.lilora_fusion = (TaskParameters(self) for _ in range(3))
        self.merged_task: str | None = None
        self.active: tuple[str, ...] = ()
        self._first: str | None = None  # the task that A and B0 were made with, until it is deleted
        self._tied: dict[str, nn.Parameter] = {}  # the one Parameter behind every entry of lilora_A and lilora_B
        self._slot: tuple[Tensor, ...] | None = None  # the active task's a, b0, u, v, fusion
        self._bank: tuple[tuple, tuple[Tensor, ...]] | None = None  # (what it was gathered from, stacked u, v, fusion)
        self._lookup: tuple[tuple, Tensor] | None = None  # (what it was built for, id -> position in the stack)
        self.register_load_state_dict_post_hook(_retie)

    @property
    def lilora_scaling(self) -> float:
        return self.alpha / self.rank

    # --- tasks ------------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks in the order of their ids."""
        return [name for name in self.routes.tasks if name in self.lilora_U]

    def add_task(self, name: str, init: bool = True) -> None:
        """Create the parameters of a task (and of the shared factors with the first) and register its id.

        init=False leaves them uninitialised, for loading. Nothing is added when the name is not allowed or taken.
        """
        check_task_name(name)
        if name in self.lilora_U:
            raise ValueError(f"task {name!r} exists already; delete it first or choose another name")

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(self.empty(*shape))

        if not self.lilora_A:
            self.lilora_A[name], self.lilora_B[name] = (
                parameter(self.rank, self.in_features),
                parameter(self.out_features, self.rank),
            )
            if init:
                nn.init.kaiming_uniform_(self.lilora_A[name], a=math.sqrt(5))
                nn.init.zeros_(self.lilora_B[name])
            self._first, self._tied = name, {"A": self.lilora_A[name], "B": self.lilora_B[name]}
        else:
            self.lilora_A[name] = next(iter(self.lilora_A.values()))
            self.lilora_B[name] = next(iter(self.lilora_B.values()))
        self.lilora_U[name] = parameter(self.out_features, self.sub_rank)
        self.lilora_V[name] = parameter(self.sub_rank, self.rank)
        if self.fusion:
            self.lilora_fusion[name] = parameter(1)
        if init:
            nn.init.zeros_(self.lilora_U[name])
            nn.init.kaiming_uniform_(self.lilora_V[name], a=math.sqrt(5))
            if self.fusion:
                nn.init.normal_(self.lilora_fusion[name])
        if name not in self.routes.tasks:
            self.routes.tasks.append(name)
        if not self.active:
            self.set_task(name)
        else:
            for own in self._own(name):
                own.requires_grad_(False)
            self.bind()

    def delete_task(self, name: str) -> None:
        """Remove a task's parameters; the ids of the others stay."""
        self._require(name)
        if self.merged_task == name:
            self.unmerge()
        train = any(own.requires_grad for own in self._own(name))
        for parameters in (self.lilora_A, self.lilora_B, self.lilora_U, self.lilora_V, self.lilora_fusion):
            if name in parameters:
                del parameters[name]
        if name in self.routes.tasks:
            self.routes.tasks[self.routes.tasks.index(name)] = None
        if self._first == name:
            self._first = None
        if name in self.active:
            self.set_task(*(task for task in self.active if task != name), train=train)
        else:
            self.bind()

    def set_task(self, *names: str, train: bool = True) -> None:
        """Make a task the one that `forward` uses and trains; several names train together, by task ids.

        Parameters of the other tasks stop requiring gradients; the shared factors follow train_a and train_b0.
        """
        for name in names:
            self._require(name)
        self.routes.setting = names, train
        self.active = tuple(names)
        for task in self.lilora_U:
            for own in self._own(task):
                own.requires_grad_(train and task in names)
        self.train_shared(train)
        self.retie()

    def train_shared(self, train: bool = True) -> None:
        """Let A and B0 require gradients as train_a and train_b0 say for the active tasks."""
        first = self._first in self.active
        for policy, shared in ((self.train_a, self.lilora_A), (self.train_b0, self.lilora_B)):
            learns = bool(self.active) and (policy == "always" or (policy == "first" and first))
            for parameter in shared.values():
                parameter.requires_grad_(train and learns)

    def retie(self) -> None:
        """Make every task's A and B0 one Parameter again, the newest, after a load, cast or move that replaced some."""
        for key, shared in (("A", self.lilora_A), ("B", self.lilora_B)):
            if shared:
                tied = [p for p in shared.values() if p is self._tied.get(key)]
                replaced = [p for p in shared.values() if p is not self._tied.get(key)]
                # A task that is added on the meta device, to be loaded, does not have the values yet.
                known = [p for p in replaced if not p.is_meta]
                self._tied[key] = (known or tied or replaced)[-1]
                for name in shared:
                    shared[name] = self._tied[key]
        self.bind()

    def _untied(self) -> bool:
        """Whether a loader replaced A or B0 under the newest task's name without telling us, as transformers' does."""
        shared = {"A": self.lilora_A, "B": self.lilora_B}
        return any(d[next(reversed(d))] is not self._tied[key] for key, d in shared.items())

    def bind(self) -> None:
        """Rebuild the slot that `forward` reads: a lookup by task name there would recompile for every task."""
        self._slot = self._parameters_of(self.active[0]) if len(self.active) == 1 else None
        self._bank = None
        if self.lilora_U and len(self.lilora_U) != len(self.routes.tasks):
            self._id_to_position(next(iter(self.lilora_U.values())).device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.retie()
        return self

    def _own(self, name: str) -> list[nn.Parameter]:
        dicts = (self.lilora_U, self.lilora_V, self.lilora_fusion)
        return [parameters[name] for parameters in dicts if name in parameters]

    def _parameters_of(self, name: str) -> tuple[Tensor | None, ...]:
        fusion = self.lilora_fusion[name] if self.fusion else None
        return self.lilora_A[name], self.lilora_B[name], self.lilora_U[name], self.lilora_V[name], fusion

    def _require(self, name: str) -> None:
        if name not in self.lilora_U:
            raise ValueError(f"task {name!r} is unknown; this layer knows {self.tasks}")

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args, task: Tensor | None = None, **kwargs) -> Tensor:
        """x [..., K] -> [..., N].

        task: [B] int32 ids for x [B, ..., K], -1 for samples without an adapter. Without it the route of the running
        forward decides, and without a route the active task. Raises when several tasks are active and nothing decides.
        """
        adapter = self._adapter(x, task)
        if adapter is None:
            return self.base_layer(x, *args, **kwargs)
        factors, rows = adapter
        y = self._adapted(x, factors, self.lilora_scaling, self._p, args, kwargs, task=rows)
        self._expect_same_tasks(y)
        return y

    def _adapter(self, x: Tensor, task: Tensor | None = None) -> tuple[tuple[Tensor | None, ...], Tensor | None] | None:
        """What this forward adds to the base: (a, b0, u, v, fusion) and the task of each row of x; None for nothing."""
        routed = task is not None or self.routes.current is not None
        if self.merged_task is not None:
            if routed:
                raise RuntimeError(
                    f"task {self.merged_task!r} is merged into the base weight; unmerge() before routing tasks"
                )
            return None
        if not routed:
            # Nothing here may look at how many tasks there are: a compiled graph would be made again for each.
            self.routes.require_known()
            if self._slot is None:
                if self.active:
                    raise ValueError(f"the tasks {list(self.active)} are active together; pass task ids with the batch")
                return None
        elif not self.lilora_U:
            return None
        if not torch.compiler.is_compiling() and self._untied():
            self.retie()
        if routed:
            *factors, rows = self._mixed(self._rows(x, task))
            return tuple(factors), rows
        a, b0, u, v, fusion = self._current_slot()
        return (a, b0, u.unsqueeze(0), v.unsqueeze(0), fusion), None

    @property
    def _p(self) -> float:
        return self.dropout if self.training else 0.0

    def _expect_same_tasks(self, y: Tensor) -> None:
        """Let the backward of y raise if the active task is set before it."""
        if not torch.compiler.is_compiling() and y.requires_grad and self._learns():
            y.register_hook(self.routes.unchanged())
            self._bank = None  # what learns may be sharded, and gathering it again counts no version

    def _rows(self, x: Tensor, task: Tensor | None) -> Tensor:
        if task is None:
            return self.routes.current.rows(x, self.vision)
        samples = x.shape[0] if x.dim() > 1 else 1
        task = self.routes.ids(task, samples, x.device)
        per_sample = x.shape[1:-1].numel()
        return task.unsqueeze(1).expand(samples, per_sample).reshape(-1)

    def _current_slot(self) -> tuple[Tensor, ...]:
        # Code that swaps Parameters past __setattr__ (offloading) cannot tell us; the check costs nothing inside a graph.
        if not torch.compiler.is_compiling() and self._slot[2] is not self.lilora_U[self.active[0]]:
            self.bind()
        return self._slot

    def _mixed(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        """Shared factors, stacked factors of all tasks, and rows as positions in the stack."""
        a, b0 = (next(iter(shared.values())) for shared in (self.lilora_A, self.lilora_B))
        if self._learns() or (torch.compiler.is_compiling() and not self.routes.published()):
            stacked = self._stack()
        else:
            if not torch.compiler.is_compiling() and (self._bank is None or not self.routes.generating):
                self.publish()
            stacked = self._bank[1]
        if len(self.lilora_U) != len(self.routes.tasks):
            rows = self._positions(rows)
        return a, b0, *stacked, rows

    def _learns(self) -> bool:
        return torch.is_grad_enabled() and any(own.requires_grad for own in self._all_own())

    def _all_own(self) -> Iterator[nn.Parameter]:
        # Every forward looks at all of them, and ParameterDict's own access works through its list of keys for each.
        for parameters in (self.lilora_U, self.lilora_V, self.lilora_fusion):
            yield from parameters._parameters.values()

    def _positions(self, rows: Tensor) -> Tensor:
        """Ids as positions in the stack, which has no places for deleted tasks; foreign ids become -1."""
        return self._id_to_position(rows.device)[rows.long().clamp(-1, len(self.routes.tasks))]

    def _id_to_position(self, device: torch.device) -> Tensor:
        """[tasks + 1] int32; the extra last entry is where -1 and foreign ids point to. Made ahead of a graph by bind()."""
        key = (tuple(self.routes.tasks), len(self.tasks), device)
        if self._lookup is None or self._lookup[0] != key:
            position = {name: i for i, name in enumerate(self.tasks)}
            lookup = [position.get(name, -1) for name in self.routes.tasks] + [-1]
            self._lookup = key, torch.tensor(lookup, dtype=torch.int32, device=device)
        return self._lookup[1]

    def _stack(self) -> tuple[Tensor | None, ...]:
        dicts = (self.lilora_U, self.lilora_V, self.lilora_fusion)
        u, v, fusion = (torch.stack([d[name] for name in self.tasks]) if d else None for d in dicts)
        return u, v, None if fusion is None else fusion.squeeze(1)

    def publish(self) -> None:
        """Gather all tasks into the stacked bank that mixed inference reads, unless it is current.

        Sharded parameters are whole while the layer runs only: outside it the bank is dropped.
        """
        if not self.lilora_U:
            return
        if any(is_sharded(own) for own in self._all_own()):
            self._bank = None
            return
        if self._untied():
            self.retie()
        if not self._bank_is_current():
            # Tensors made in inference mode could not be saved for a later backward.
            with torch.inference_mode(False), torch.no_grad():
                self._bank = (self._source(), self._stack())

    def _bank_is_current(self) -> bool:
        return self._bank is not None and self._bank[0] == self._source()

    def _source(self) -> tuple:
        return tuple((id(own), own.data_ptr(), version(own)) for own in self._all_own())

    @torch.no_grad()
    def overwrite_task(self, name: str, u: Tensor, v: Tensor, fusion: Tensor | None = None) -> None:
        """Copy u [N, sub_rank], v [sub_rank, r] and fusion [1] over a task's, and over its place in a gathered bank.

        No tensor moves, so a compiled or captured forward stays valid and sees the new values.
        """
        self._require(name)
        in_bank, at = self._bank_is_current(), self.tasks.index(name)
        values = [u, v] if fusion is None else [u, v, fusion]
        for own, value in zip(self._own(name), values, strict=True):
            own.copy_(value)
        if in_bank:
            for stacked, value in zip(self._bank[1], values, strict=False):
                stacked[at].copy_(value.reshape(stacked[at].shape))
            self._bank = (self._source(), self._bank[1])

    # --- merging ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def delta_weight(self, name: str) -> Tensor:
        """scaling * M_t A of one task, [N, K] in the adapter's dtype (computed in fp32 at least)."""
        self._require(name)
        a, b0, u, v, fusion = self._parameters_of(name)
        wide = torch.promote_types(a.dtype, torch.float32)
        m = b0.to(wide) + u.to(wide) @ v.to(wide)
        if fusion is not None:
            m = torch.lerp(u.to(wide) @ v.to(wide), b0.to(wide), torch.sigmoid(fusion.to(wide)))
        return (self.lilora_scaling * m @ a.to(wide)).to(a.dtype)

    @torch.no_grad()
    def merge(self, name: str) -> None:
        """Add a task to the base weight, for inference without any cost; forward then runs the base alone."""
        if self.merged_task is not None:
            raise RuntimeError(f"task {self.merged_task!r} is merged already; unmerge() first")
        if not is_plain(self.base_layer):
            raise TypeError(f"merge needs a plain nn.Linear base, not a {described(self.base_layer)}")
        self.base_layer.weight += self.delta_weight(name).to(self.base_layer.weight.dtype)
        self.merged_task = name

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged task out again, by subtraction: exact up to the rounding of the base weight's dtype."""
        if self.merged_task is None:
            return
        self.base_layer.weight -= self.delta_weight(self.merged_task).to(self.base_layer.weight.dtype)
        self.merged_task = None

    def extra_repr(self) -> str:
        return (
            f"r={self.rank}, sub_rank={self.sub_rank}, alpha={self.alpha}, dropout={self.dropout}, "
            f"train_a={self.train_a!r}, train_b0={self.train_b0!r}, tasks={self.tasks}, active={list(self.active)}"
        )


def _retie(layer: LiLoRALinear, _) -> None:
    layer.retie()


def set_task(model: nn.Module, *names: str, train: bool = True) -> None:
    """`LiLoRALinear.set_task` for every adapted layer of a model."""
    layers: Sequence[LiLoRALinear] = [m for m in model.modules() if isinstance(m, LiLoRALinear)]
    if not layers:
        raise RuntimeError("this model has no LiLoRALinear layer")
    for layer in layers:
        layer.set_task(*names, train=train)
