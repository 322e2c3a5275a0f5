"""Launches the Triton kernels of `delta`: all phases in one launch, or one launch for each phase."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .. import triton_runtime as runtime
from ..barrier import barrier_state
from ..philox import keep_scale, threshold
from ..schema import AdapterArgs
from ..triton_launcher import Launch, current, launch
from . import triton_kernels as kernels


def run_phases(work: "Forward | Backward", one_launch: bool) -> None:
    """All phases in one launch; each in its own when asked for, or when the device cannot hold a whole grid at once."""
    if one_launch:
        try:
            return work.launch(0, work.LAST)
        except RuntimeError as error:
            # The configured programs fit a whole GPU, but not a share of one (MPS, green contexts).
            if "cooperative" not in str(error):
                raise
    for first, last in work.phases:
        work.launch(first, last)


class Forward:
    """One forward: the tensors that its launches share. Every phase reads what the phases before it wrote.

    Another forward of the same x with the same configuration may have phase 0 compute its h too.
    """

    LAST = 2

    def __init__(self, x: Tensor, bias: Tensor | None, adapter: AdapterArgs, config: runtime.Configuration) -> None:
        self.x = x if x.stride(1) == 1 else x.contiguous()
        self.bias = contiguous(bias)
        self.adapter = adapter = contiguous_adapter(adapter)
        self.sizes = Sizes.of(adapter)
        rows, columns = x.shape
        self.config = config
        self.split = split = max(1, min(self.config["SPLIT_K"], columns // self.config["BLOCK_K"]))
        self.h = x.new_empty(rows, self.sizes.rank)
        self.z = None if adapter.u is None else x.new_empty(rows, self.sizes.sub_rank)
        self.planes = None if split == 1 else x.new_empty(split, rows, self.sizes.rank, dtype=torch.float32)
        self.phases = [(phase, phase) for phase in ((0, 2) if split == 1 else (0, 1, 2))]

    @cached_property
    def y(self) -> Tensor:
        return self.x.new_empty(self.x.shape[0], self.sizes.outputs)

    def launch(self, first: int, last: int, second: "Forward | None" = None) -> None:
        """Run the phases first..last; phase 0 may compute the h of a second adapter of the same x too."""
        adapter, sizes, drop_below = self.adapter, self.sizes, threshold(self.adapter.p)
        other = (None,) * 6
        if second is not None:
            other = (second.adapter.a, second.adapter.fusion, second.adapter.v, second.h, second.z, second.planes)
        tensors = (
            self.x, *adapter[:8], self.bias, adapter.seed if drop_below else None,
            self.h, self.z, self.planes, self.y if last == self.LAST else None, *other,
        )  # fmt: skip
        rows, columns = self.x.shape
        numbers = (
            rows, columns, sizes.outputs, sizes.tasks, sizes.gates, self.x.stride(0),
            float(adapter.scaling), drop_below, keep_scale(adapter.p),
        )  # fmt: skip
        if rows > 0:
            constants = constants_of(kernels.delta_forward, self, first, last, second is not None)
            items = self.items(first, constants) if first == last else 0
            run(kernels.delta_forward, self.x.device, first, last, items, tensors, numbers, constants)

    def items(self, phase: int, constants: dict[str, int]) -> int:
        """How many work items a phase has."""
        groups = ceil(self.sizes.outputs, constants["BLOCK_N"] * constants["TILES_N"])
        return ceil(self.x.shape[0], constants["BLOCK_M"]) * (constants["SPLIT_K"], 1, groups)[phase]


class Backward:
    """One backward: its gradients and the tensors that its launches share.

    `like` is another backward of the same x whose phase 2 will add this one's dx to its own and read x for this da too.
    from_dh: dy is dh, which the phases before 2 would find; only those that read x are to run.
    """

    LAST = 3

    def __init__(
        self,
        dy: Tensor,
        x: Tensor | None,
        h: Tensor | None,
        adapter: AdapterArgs,
        needs: frozenset[str],
        config: runtime.Configuration,
        like: "Backward | None" = None,
        from_dh: bool = False,
    ) -> None:
        self.dy = dy = dy.contiguous()
        self.x = x if x is None or x.stride(1) == 1 else x.contiguous()
        self.h = h
        self.needs = needs
        self.adapter = adapter = contiguous_adapter(adapter)
        self.sizes = sizes = Sizes.of(adapter)
        rows, rank, sub_rank, outputs = dy.shape[0], sizes.rank, sizes.sub_rank, sizes.outputs
        self.config = config
        self.split = split = max(1, min(config["SPLIT_N"], outputs // config["BLOCK_N"]))
        self.chunk = config["CHUNK"] if like is None else like.chunk
        if adapter.u is not None and like is None:
            while self.chunk < rows and ceil(rows, self.chunk) * adapter.u.numel() * 4 > runtime.PLANE_BYTES:
                self.chunk *= 2
        chunks = ceil(rows, self.chunk)
        self.grads = {name: torch.empty_like(getattr(adapter, name)) for name in needs - {"x"}}
        self.reads_x = like is None
        if "x" in needs and like is None:
            self.grads["x"] = dy.new_empty(rows, sizes.columns)
        wants_dh = bool(needs & {"x", "a", "v", "fusion", "gate"})

        self.dh = dy if from_dh else dy.new_empty(rows, rank) if wants_dh else None
        scaled_q_u = dy.new_empty(rows, sub_rank) if "v" in needs else None
        dq_h, dfusion_rows, planes, self.da_planes, *self.after = scratch(
            dy,
            rows * rank if "gate" in needs else None,
            rows if "fusion" in needs else None,
            split * rows * (rank + sub_rank) if wants_dh and split > 1 else None,
            chunks * rank * sizes.columns if "a" in needs else None,
            chunks * outputs * rank if "b0" in needs else None,
            chunks * sizes.tasks * outputs * sub_rank if "u" in needs else None,
            chunks * sizes.tasks * sub_rank * rank if "v" in needs else None,
        )
        self.before = self.dh, dq_h, scaled_q_u, dfusion_rows, planes
        marks = adapter.task is not None and bool(needs & {"u", "v"})
        self.after.append(dy.new_empty(chunks, sizes.tasks, dtype=torch.int32) if marks else None)
        phases = [0, 1] if wants_dh and split > 1 else [0]
        phases += [2] if needs & ({"x", "a", "v", "fusion", "gate"} if like is None else {"v", "fusion"}) else []
        phases += [3] if needs & {"a", "b0", "u", "v"} else []
        self.phases = [(phase, phase) for phase in phases]

    def launch(self, first: int, last: int, second: "Backward | None" = None) -> None:
        """Run the phases first..last; phase 2 may add the dx of a second adapter of the same x, and sum its da too."""
        adapter, sizes, drop_below = self.adapter, self.sizes, threshold(self.adapter.p)
        da_planes = self.da_planes if self.reads_x or first == 3 else None
        other = (None,) * 3 if second is None else (second.adapter.a, second.dh, second.da_planes)
        tensors = (
            self.dy, self.x, self.h, *adapter[:8], adapter.seed if drop_below else None,
            *(self.grads.get(name) for name in ("x", "a", "b0", "u", "v", "fusion", "gate")),
            *self.before, da_planes, *self.after, *other,
        )  # fmt: skip
        low, high = adapter.ranks or (0, sizes.rank)
        numbers = (
            self.dy.shape[0], sizes.columns, sizes.outputs, sizes.tasks, sizes.gates,
            0 if self.x is None else self.x.stride(0), self.chunk,
            float(adapter.scaling), drop_below, keep_scale(adapter.p), low, high,
        )  # fmt: skip
        constants = constants_of(kernels.delta_backward, self, first, last, second is not None)
        items = self.items(first, constants) if first == last else 0
        run(kernels.delta_backward, self.dy.device, first, last, items, tensors, numbers, constants)

    def items(self, phase: int, constants: dict[str, int]) -> int:
        """How many work items a phase has. A wrong number costs time only: programs take items until none is left."""
        needs, sizes, rows, chunks = self.needs, self.sizes, self.dy.shape[0], ceil(self.dy.shape[0], self.chunk)
        if phase == 0:
            shrinks = self.chunk // constants["BLOCK_M"] * constants["SPLIT_N"] if self.dh is not None else 0
            ups = ceil(sizes.outputs, constants["BLOCK_N"]) if needs & {"b0", "u"} else 0
            return chunks * (shrinks + ups + 1)
        if phase == 1:
            return ceil(rows, constants["BLOCK_M"])
        if phase == 2:
            downs = chunks * ceil(sizes.columns, constants["BLOCK_K"]) if self.reads_x else 0
            return chunks * sizes.tasks * ("v" in needs) + sizes.tasks + sizes.gates + downs
        names = needs & {"a", "b0", "u", "v"}
        return sum(ceil(self.grads[name].numel(), kernels.SUM_BLOCK.value) for name in names) + 2 * sizes.tasks


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


def constants_of(kernel, work: Forward | Backward, first: int, last: int, pair: bool) -> Launch:
    """The constants of a launch of the phases first..last."""
    config, rank, sub_rank = work.config, work.sizes.rank, work.sizes.sub_rank
    key = first, last, pair, work.split, rank, sub_rank
    if key not in config.launches:
        split = "SPLIT_K" if kernel is kernels.delta_forward else "SPLIT_N"
        sizes = {name: size for name, size in config.items() if name != "CHUNK"} | {split: work.split}
        config.launches[key] = Launch(
            kernel,
            {"R": rank, "S": sub_rank, "BLOCK_R": runtime.padded(rank), "BLOCK_S": runtime.padded(max(sub_rank, 1))}
            | runtime.phase_config(sizes, first, last, pair)
            | {"FIRST": first, "LAST": last},
            cooperative=first < last,
        )
    return config.launches[key]


def scratch(like: Tensor, *sizes: int | None) -> list[Tensor | None]:
    """fp32 tensors of these numbers of elements in one allocation, each at a multiple of 128 bytes; None for None."""
    padded = [-(-size // 32) * 32 for size in sizes if size is not None]
    parts = iter(like.new_empty(sum(padded), dtype=torch.float32).split_with_sizes(padded) if padded else ())
    return [None if size is None else next(parts) for size in sizes]


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def contiguous_adapter(adapter: AdapterArgs) -> AdapterArgs:
    return AdapterArgs._make([t.contiguous() if isinstance(t, Tensor) else t for t in adapter])


def run(
    kernel, device: torch.device, first: int, last: int, items: int, tensors: tuple, numbers: tuple, constants: Launch
) -> None:
    """One launch of the phases first..last. A single phase has a program for each item; more need all resident at once."""
    with current(tensors[0]):
        state = barrier_state(device) if first < last else None
        if runtime.INTERPRETED:  # programs run one after another there: a barrier can wait for no more than one
            programs = 1 if first < last else 3
        else:
            programs = runtime.processors(device) * constants.programs if first < last else max(items, 1)
        launch(constants, (programs, 1, 1), (*tensors, state), numbers)
