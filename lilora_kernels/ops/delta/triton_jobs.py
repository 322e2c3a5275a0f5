"""Launches the Triton kernels of `delta`: a launch for each job, or one for all of them."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .. import triton_runtime as runtime
from ..barrier import COUNTERS, barrier_state
from ..philox import keep_scale, threshold
from ..schema import AdapterArgs
from ..triton_launcher import Launch, Ready, current, launch
from . import triton_backward, triton_configs, triton_forward
from .triton_backward import BackwardSizes, Gradients, Lower, PartialSums, RowSums, Thinned, Upper, UpperSums
from .triton_configs import Configuration
from .triton_forward import Expanded, ForwardSizes, Shrunk

PARTIAL_BYTES = 1 << 28  # how much memory the partial sums of du may take before chunks of rows grow
NO_ADAPTER, NO_LOWER = (kind(*(None,) * len(kind._fields)) for kind in (Shrunk, Lower))
NO_SUMS = RowSums(*(None,) * len(RowSums._fields))


def run_jobs(work: "Forward | Backward", one_launch: bool) -> list:
    """All jobs in one launch; each in its own when asked for, or when the device cannot hold a whole grid at once. What `run`
    returns of each launch."""
    if one_launch:
        try:
            return [work.at_once()]
        except RuntimeError as error:
            # The configured programs fit a whole GPU, but not a share of one (MPS, green contexts).
            if "cooperative" not in str(error):
                raise
    return [job(work) for job in work.jobs]


class Forward:
    """One forward: the tensors that its launches share. `other`: of a second adapter of the same x, which shrink serves too."""

    def __init__(
        self,
        x: Tensor,
        bias: Tensor | None,
        adapter: AdapterArgs,
        one_launch: bool = False,
        other: "Forward | None" = None,
        pair: bool = False,
    ) -> None:
        self.x = rows_of(x)
        self.bias = staged(bias)
        self.adapter = adapter = staged_adapter(adapter)
        self.sizes = sizes = Sizes.of(adapter)
        self.other = other
        self.rows, columns = x.shape
        self.whole = triton_configs.configuration("delta_forward", x, adapter) if one_launch else None
        self.config = self.whole or triton_configs.configuration("shrink", x, adapter, pair or other is not None)
        split = max(1, min(self.config["SPLIT_K"], columns // self.config["BLOCK_K"]))
        rows, config = self.rows, self.config
        self.split = split if ceil(rows, config["BLOCK_M"]) <= COUNTERS else 1
        h, z = x.new_empty(rows, sizes.rank), None if adapter.u is None else x.new_empty(rows, sizes.sub_rank)
        partials = None if self.split == 1 else x.new_empty(self.split, rows, sizes.rank, dtype=torch.float32)
        self.shrunk = Shrunk(adapter.a, adapter.v, h, z, partials)

    @property
    def jobs(self) -> list[Callable[["Forward"], object]]:
        return [Forward.shrink, Forward.expand]

    @property
    def h(self) -> Tensor:
        return self.shrunk.h

    @cached_property
    def y(self) -> Tensor:
        return self.x.new_empty(self.rows, self.sizes.outputs)

    def shrink(self) -> object:
        adapter, other = self.adapter, self.other
        tensors = self.x, adapter.gate, adapter.task, adapter.gate_row, adapter.fusion
        tensors += (None if other is None else other.adapter.fusion, seed_of(adapter))
        numbers = self.rows, *self.sizes.tall, self.x.stride(0), threshold(adapter.p), keep_scale(adapter.p)
        groups = self.shrunk, NO_ADAPTER if other is None else other.shrunk
        made = launch_of(triton_forward.shrink, ForwardSizes, self.config, self.sizes, SPLIT_K=self.split)
        items = ceil(self.rows, self.config["BLOCK_M"]) * self.split
        return run(made, items, self.x.device, groups, tensors, numbers, self.split > 1)

    def expand(self) -> object:
        adapter, sizes = self.adapter, self.sizes
        config = self.whole or triton_configs.configuration("expand", self.x, adapter)
        expanded = Expanded(adapter.b0, adapter.u, self.bias, self.h, self.shrunk.z, self.y)
        shares = self.shares(config)
        tensors = adapter.gate, adapter.task, adapter.gate_row, adapter.fusion
        numbers = self.rows, sizes.outputs, sizes.tasks, sizes.gates, shares, float(adapter.scaling)
        made = launch_of(triton_forward.expand, ForwardSizes, config, sizes)
        groups = ceil(sizes.outputs, config["BLOCK_N"] * config["TILES_N"])
        return run(
            made, ceil(self.rows, config["BLOCK_M"]) * groups * shares, self.x.device, (expanded,), tensors, numbers
        )

    def at_once(self) -> object:
        adapter, sizes = self.adapter, self.sizes
        expanded = Expanded(adapter.b0, adapter.u, self.bias, self.h, self.shrunk.z, self.y)
        tensors = self.x, adapter.gate, adapter.task, adapter.gate_row, adapter.fusion, seed_of(adapter)
        numbers = (
            self.rows, sizes.columns, sizes.outputs, sizes.tasks, sizes.gates, self.x.stride(0), self.shares(self.whole),
            threshold(adapter.p), float(adapter.scaling), keep_scale(adapter.p),
        )  # fmt: skip
        made = launch_of(
            triton_forward.delta_forward, ForwardSizes, self.whole, sizes, at_once=True, SPLIT_K=self.split
        )
        return run(made, 0 if self.rows == 0 else None, self.x.device, (self.shrunk, expanded), tensors, numbers, True)

    def shares(self, config: Configuration) -> int:
        """How many programs share the tasks of a tile: one visits them one after the other, a few hundred ns each."""
        return max(1, min(4, min(self.sizes.tasks, self.rows, config["BLOCK_M"]) // 4))


class Backward:
    """One backward: its gradients and the tensors that its launches share.

    `first`: another backward of the same x, whose from_x adds this one's dx to its own and reads x for this da too.
    from_dh: dy is dh, which from_dy would find; only that which reads x is to run.
    """

    def __init__(
        self,
        dy: Tensor,
        x: Tensor | None,
        h: Tensor | None,
        adapter: AdapterArgs,
        needs: frozenset[str],
        one_launch: bool = False,
        first: "Backward | None" = None,
        from_dh: bool = False,
    ) -> None:
        self.dy = dy = dy.resolve_neg().contiguous()
        self.x = None if x is None else rows_of(x)
        self.adapter = adapter = staged_adapter(adapter)
        self.needs, self.sizes, self.is_first, self.second = needs, Sizes.of(adapter), first is None, None
        if first is not None:
            first.second = self
        self.rows, sizes = dy.shape[0], self.sizes
        rows = self.rows
        rank, sub_rank, outputs = sizes.rank, sizes.sub_rank, sizes.outputs
        self.whole = triton_configs.configuration("delta_backward", dy, adapter) if one_launch else None
        self.config = self.whole or triton_configs.configuration("from_dy", dy, adapter)
        split = max(1, min(self.config["SPLIT_N"], outputs // self.config["BLOCK_N"]))
        self.split = split if ceil(rows, self.config["BLOCK_M"]) <= COUNTERS else 1
        self.chunk = self.config["CHUNK"] if first is None else first.chunk
        if adapter.u is not None and first is None:
            while self.chunk < rows and ceil(rows, self.chunk) * adapter.u.numel() * 4 > PARTIAL_BYTES:
                self.chunk *= 2
        chunks = ceil(rows, self.chunk)
        self.grads = {name: torch.empty_like(getattr(adapter, name)) for name in needs - {"x"}}
        if "x" in needs and first is None:
            self.grads["x"] = dy.new_empty(rows, sizes.columns)
        wants_dh = bool(needs & {"x", "a", "v", "fusion", "gate"})

        dh = dy if from_dh else dy.new_empty(rows, rank) if wants_dh else None
        scaled_q_u = dy.new_empty(rows, sub_rank) if "v" in needs else None
        dq_h, dfusion_rows, partials, da, db0, du, dv = scratch(
            dy,
            rows * rank if "gate" in needs else None,
            rows if "fusion" in needs else None,
            self.split * rows * (rank + sub_rank) if wants_dh and not from_dh and self.split > 1 else None,
            chunks * rank * sizes.columns if "a" in needs else None,
            chunks * outputs * rank if "b0" in needs else None,
            chunks * sizes.tasks * outputs * sub_rank if "u" in needs else None,
            chunks * sizes.tasks * sub_rank * rank if "v" in needs else None,
        )
        marks = adapter.task is not None and bool(needs & {"u", "v"})
        present = dy.new_empty(chunks, sizes.tasks, dtype=torch.int32) if marks else None
        self.upper = Upper(adapter.b0, adapter.u, adapter.v, h)
        self.thinned = Thinned(dh, dq_h, scaled_q_u, dfusion_rows, partials)
        self.upper_sums = UpperSums(db0, du, present)
        self.lower = Lower(adapter.a, dh, da) if needs & {"x", "a"} else NO_LOWER
        grads = self.grads.get
        self.sums = NO_SUMS
        if needs & {"v", "fusion", "gate"}:
            self.sums = RowSums(h, scaled_q_u, dv, dfusion_rows, grads("fusion"), dq_h, grads("gate"))
        self.partial_sums, self.gradients = PartialSums(da, db0, du, dv), Gradients(*map(grads, Gradients._fields))
        # Not bound to this object, which would keep it and all gradients alive: autograd would copy them.
        self.jobs: list[Callable[[Backward], object]] = [] if from_dh else [Backward.from_dy]
        if self.sums is not NO_SUMS or (self.lower is not NO_LOWER and first is None):
            self.jobs.append(Backward.from_x)
        if needs & {"a", "b0", "u", "v"}:
            self.jobs.append(Backward.add_partials)

    def from_dy(self) -> object:
        adapter, config, sizes = self.adapter, self.config, self.sizes
        tensors = self.dy, adapter.gate, adapter.task, adapter.gate_row, adapter.fusion
        ranks = adapter.ranks or (0, sizes.rank)
        numbers = (
            self.rows, sizes.outputs, sizes.tasks, sizes.gates, self.chunk, float(adapter.scaling), *ranks,
        )  # fmt: skip
        shrinks = self.chunk // config["BLOCK_M"] * self.split if self.thinned.dh is not None else 0
        ups = ceil(sizes.outputs, config["BLOCK_N"]) if self.needs & {"b0", "u"} else 0
        items = ceil(self.rows, self.chunk) * (shrinks + ups + (self.upper_sums.present is not None))
        made = launch_of(triton_backward.from_dy, BackwardSizes, config, sizes, SPLIT_N=self.split)
        groups = self.upper, self.thinned, self.upper_sums
        return run(made, items, self.dy.device, groups, tensors, numbers, self.thinned.partials is not None)

    def from_x(self) -> object:
        adapter, sizes, second = self.adapter, self.sizes, self.second
        own = self.lower if self.is_first else NO_LOWER
        other = NO_LOWER if second is None else second.lower
        config = self.whole or triton_configs.configuration("from_x", self.dy, adapter, other is not NO_LOWER)
        tensors = self.x, self.grads.get("x"), adapter.gate, adapter.task, adapter.gate_row, seed_of(adapter)
        ranks, chunks = adapter.ranks or (0, sizes.rank), ceil(self.rows, self.chunk)
        numbers = (
            self.rows, *sizes.tall, 0 if self.x is None else self.x.stride(0), self.chunk,
            threshold(adapter.p), keep_scale(adapter.p), *ranks,
        )  # fmt: skip
        downs = chunks * ceil(sizes.columns, config["BLOCK_K"]) if own is not NO_LOWER else 0
        rows_summed = chunks * sizes.tasks * ("v" in self.needs) + sizes.tasks * ("fusion" in self.needs)
        made = launch_of(triton_backward.from_x, BackwardSizes, config, sizes)
        items = downs + rows_summed + sizes.gates * ("gate" in self.needs)
        return run(made, items, self.dy.device, (own, other, self.sums), tensors, numbers)

    def add_partials(self) -> object:
        sizes = self.sizes
        config = self.whole or triton_configs.configuration("add_partials", self.dy, self.adapter)
        numbers = self.rows, sizes.columns, sizes.outputs, sizes.tasks, self.chunk
        made = launch_of(triton_backward.add_partials, BackwardSizes, config, sizes)
        block, tasks = triton_backward.SUM_BLOCK.value, sizes.tasks
        summed = {"a": 1, "b0": 1, "u": tasks, "v": tasks}
        items = sum(
            count * ceil(grad.numel() // count, block)
            for count, grad in zip(summed.values(), self.gradients, strict=True)
            if grad is not None
        )
        return run(
            made, items, self.dy.device, (self.partial_sums, self.gradients), (self.upper_sums.present,), numbers
        )

    def at_once(self) -> object:
        adapter, sizes = self.adapter, self.sizes
        tensors = self.dy, self.x, self.grads.get("x"), adapter.gate, adapter.task, adapter.gate_row, adapter.fusion
        ranks = adapter.ranks or (0, sizes.rank)
        numbers = (
            self.rows, sizes.columns, sizes.outputs, sizes.tasks, sizes.gates,
            0 if self.x is None else self.x.stride(0), self.chunk,
            threshold(adapter.p), float(adapter.scaling), keep_scale(adapter.p), *ranks,
        )  # fmt: skip
        made = launch_of(
            triton_backward.delta_backward, BackwardSizes, self.whole, sizes, at_once=True, SPLIT_N=self.split
        )
        groups = (
            self.upper, self.thinned, self.upper_sums, self.lower, self.sums, self.partial_sums, self.gradients,
        )  # fmt: skip
        return run(made, None, self.dy.device, groups, (*tensors, seed_of(adapter)), numbers, True)


class Sizes(NamedTuple):
    """K, N, R, S (0 without task factors), T and G of one adapter."""

    columns: int
    outputs: int
    rank: int
    sub_rank: int
    tasks: int
    gates: int

    @classmethod
    def of(cls, adapter: AdapterArgs) -> "Sizes":
        tasks, _, sub_rank = (1, 0, 0) if adapter.u is None else (1, *adapter.u.shape)[-3:]
        rank, columns = adapter.a.shape
        gates = 0 if adapter.gate is None else adapter.gate.shape[0]
        return cls(columns, adapter.b0.shape[0], rank, sub_rank, tasks, gates)

    @property
    def tall(self) -> tuple[int, int, int]:
        """K, T, G: what kernels that read x want to know."""
        return self.columns, self.tasks, self.gates


def launch_of(kernel, names: type, config: Configuration, sizes: Sizes, at_once: bool = False, **own: int) -> Launch:
    """A launch of a kernel whose sizes are `names`, those that it does not read 0; `own` ones before the configuration's."""
    key = kernel, sizes.rank, sizes.sub_rank, *own.values()
    if key not in config.launches:
        known = config | {
            "R": sizes.rank, "S": sizes.sub_rank,
            "BLOCK_R": runtime.padded(sizes.rank), "BLOCK_S": runtime.padded(max(sizes.sub_rank, 1)),
        } | own  # fmt: skip
        constants = {"c": names(*(known.get(name, 0) for name in names._fields))}
        constants |= {name: config[name] for name in ("num_warps", "num_stages") if name in config}
        config.launches[key] = Launch(kernel, constants, config.get("PROGRAMS", 1) if at_once else 0)
    return config.launches[key]


def scratch(like: Tensor, *sizes: int | None) -> list[Tensor | None]:
    """fp32 tensors of these numbers of elements in one allocation, each at a multiple of 128 bytes; None for None."""
    padded = [-(-size // 32) * 32 for size in sizes if size is not None]
    parts = iter(like.new_empty(sum(padded), dtype=torch.float32).split_with_sizes(padded) if padded else ())
    return [None if size is None else next(parts) for size in sizes]


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def rows_of(x: Tensor) -> Tensor:
    """Rows may lie anywhere, the elements of one next to each other: a tile reaches up to 128 rows with 32 bits."""
    return x if x.stride(1) == 1 and x.stride(0) < 1 << 24 and not x.is_neg() else x.resolve_neg().contiguous()


def staged(tensor: Tensor | None, aligned: bool = True) -> Tensor | None:
    """Contiguous, and `aligned` at a multiple of 16 bytes: others, such as views of an optimizer's flat buffer, would be read 2
    bytes at a time and without asynchronous copies, by kernels compiled for that."""
    if tensor is None or (tensor.is_contiguous() and not tensor.is_neg() and not (aligned and tensor.data_ptr() & 15)):
        return tensor
    tensor = tensor.resolve_neg().contiguous()
    return tensor.clone() if aligned and tensor.data_ptr() & 15 else tensor


def staged_adapter(adapter: AdapterArgs) -> AdapterArgs:
    """The small tensors, which are read an element at a time, may lie anywhere."""
    a, b0, u, v, fusion, task, gate, gate_row, seed, *others = adapter
    a, b0, u, v, gate = map(staged, (a, b0, u, v, gate))
    fusion, task, gate_row = (staged(t, aligned=False) for t in (fusion, task, gate_row))
    return AdapterArgs(a, b0, u, v, fusion, task, gate, gate_row, seed, *others)


def seed_of(adapter: AdapterArgs) -> Tensor | None:
    return adapter.seed if threshold(adapter.p) else None


def run(
    made: Launch,
    items: int | None,
    device: torch.device,
    groups: tuple,
    tensors: tuple,
    numbers: tuple,
    waits: bool | None = None,
) -> tuple[Ready, list[Tensor | None], Tensor | None] | None:
    """One launch: a program for each item, nothing for none; where items is None, as many programs as are resident at once, up
    to those of the configuration.

    waits: whether programs wait for each other, of a kernel that has a state for it behind its other tensors. Returns what
    `launch` does, and that state.
    """
    if items == 0:
        return None
    with current(device):
        state = barrier_state(device) if waits else None
        tensors += () if waits is None else (state,)
        if items is not None:
            launched = launch(made, (3 if runtime.INTERPRETED else items, 1, 1), tensors, numbers, groups)
            return launched and (*launched, state)
        while True:
            # Where programs run one after another a barrier can wait for no more than one.
            tried = made.programs
            programs = 1 if runtime.INTERPRETED else runtime.processors(device) * tried
            try:
                launched = launch(made, (programs, 1, 1), tensors, numbers, groups)
                return launched and (*launched, state)
            except RuntimeError as error:
                if tried == 1 or "cooperative" not in str(error):
                    raise
                # The registers of these ranks leave room for fewer. Another thread may have found so meanwhile.
                made.programs = min(made.programs, tried - 1)
