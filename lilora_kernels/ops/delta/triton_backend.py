"""Launches the Triton kernels of `delta`: all phases in one launch, or one launch for each phase."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import backends
from .. import triton_runtime as runtime
from ..barrier import barrier_state
from ..philox import keep_scale, threshold
from ..schema import AdapterArgs
from . import triton_kernels as kernels


def forward(x: Tensor, adapter: AdapterArgs) -> tuple[Tensor, Tensor]:
    return run_forward(x, None, adapter, backends.one_launch(x.shape[0]))


def backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str]
) -> dict[str, Tensor]:
    return run_backward(dy, x, h, adapter, needs, backends.one_launch(dy.shape[0]))


def rows(device: torch.device) -> list[int]:
    return runtime.bucket_rows(device)


def run_forward(x: Tensor, bias: Tensor | None, adapter: AdapterArgs, one_launch: bool) -> tuple[Tensor, Tensor]:
    """y [M, N] = bias + delta, and h [M, R]."""
    work = Forward(x, bias, adapter, one_launch)
    run_phases(work, one_launch)
    return work.y, work.h


def run_backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str], one_launch: bool
) -> dict[str, Tensor]:
    """The gradients in `needs`; dx without the part through the base weight."""
    work = Backward(dy, x, h, adapter, needs, one_launch)
    run_phases(work, one_launch)
    return work.grads


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

    `like` is another forward of the same x whose phase 0 will compute this one's h too: they share a configuration.
    """

    LAST = 2

    def __init__(
        self, x: Tensor, bias: Tensor | None, adapter: AdapterArgs, one_launch: bool, like: "Forward | None" = None
    ) -> None:
        self.x = x if x.stride(1) == 1 else x.contiguous()
        self.bias = contiguous(bias)
        self.adapter = adapter = contiguous_adapter(adapter)
        self.sizes = Sizes.of(adapter)
        rows, columns = x.shape
        self.config = runtime.config("forward", one_launch, x, adapter) if like is None else dict(like.config)
        split = self.config["SPLIT_K"] = max(1, min(self.config["SPLIT_K"], columns // self.config["BLOCK_K"]))
        self.y, self.h = x.new_empty(rows, self.sizes.outputs), x.new_empty(rows, self.sizes.rank)
        self.z = None if adapter.u is None else x.new_empty(rows, self.sizes.sub_rank)
        self.planes = None if split == 1 else x.new_empty(split, rows, self.sizes.rank, dtype=torch.float32)
        self.phases = [(phase, phase) for phase in ((0, 2) if split == 1 else (0, 1, 2))]

    def launch(self, first: int, last: int, second: "Forward | None" = None) -> None:
        """Run the phases first..last; phase 0 may compute the h of a second adapter of the same x too."""
        adapter, sizes, drop_below = self.adapter, self.sizes, threshold(self.adapter.p)
        other = (None,) * 6
        if second is not None:
            other = (second.adapter.a, second.adapter.fusion, second.adapter.v, second.h, second.z, second.planes)
        tensors = (
            self.x, adapter.a, adapter.b0, adapter.u, adapter.v, adapter.fusion, adapter.task, adapter.gate,
            adapter.gate_row, self.bias, adapter.seed if drop_below else None, self.h, self.z, self.planes, self.y, *other,
        )  # fmt: skip
        rows, columns = self.x.shape
        numbers = (
            rows, columns, sizes.outputs, sizes.tasks, sizes.gates, self.x.stride(0),
            adapter.scaling, drop_below, keep_scale(adapter.p),
        )  # fmt: skip
        if rows > 0:
            constants = sizes.constants | runtime.phase_config(self.config, first, last, second is not None)
            blocks = ceil(rows, constants["BLOCK_M"])
            groups = ceil(sizes.outputs, constants["BLOCK_N"] * constants["TILES_N"])
            items = blocks * (constants["SPLIT_K"], 1, groups)[first]
            run(kernels.delta_forward, self.x.device, first, last, items, tensors, numbers, constants)


class Backward:
    """One backward: its gradients and the tensors that its launches share.

    `like` is another backward of the same x whose phase 2 will add this one's dx to its own and read x for this da too.
    """

    LAST = 3

    def __init__(
        self,
        dy: Tensor,
        x: Tensor | None,
        h: Tensor | None,
        adapter: AdapterArgs,
        needs: frozenset[str],
        one_launch: bool,
        like: "Backward | None" = None,
    ) -> None:
        self.dy = dy = dy.contiguous()
        self.x = x if x is None or x.stride(1) == 1 else x.contiguous()
        self.h = h
        self.needs = needs
        self.adapter = adapter = contiguous_adapter(adapter)
        self.sizes = sizes = Sizes.of(adapter)
        rows, rank, sub_rank, outputs = dy.shape[0], sizes.rank, sizes.sub_rank, sizes.outputs
        self.config = config = (
            runtime.config("backward", one_launch, dy, adapter) if like is None else dict(like.config)
        )
        split = config["SPLIT_N"] = max(1, min(config["SPLIT_N"], outputs // config["BLOCK_N"]))
        self.chunk = config.pop("CHUNK") if like is None else like.chunk
        if adapter.u is not None and like is None:
            while self.chunk < rows and ceil(rows, self.chunk) * adapter.u.numel() * 4 > runtime.PLANE_BYTES:
                self.chunk *= 2
        chunks = ceil(rows, self.chunk)
        self.grads = {name: torch.empty_like(getattr(adapter, name)) for name in needs - {"x"}}
        self.reads_x = like is None
        if "x" in needs and like is None:
            self.grads["x"] = dy.new_empty(rows, sizes.columns)
        wants_dh = bool(needs & {"x", "a", "v", "fusion", "gate"})

        def empty(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return dy.new_empty(shape, dtype=dtype) if wanted else None

        self.dh = empty(wants_dh, rows, rank, dtype=dy.dtype)
        self.da_planes = empty("a" in needs, chunks, rank, sizes.columns)
        self.before = (
            self.dh,
            empty("gate" in needs, rows, rank),  # dq * h
            empty("v" in needs, rows, sub_rank, dtype=dy.dtype),  # s e Q
            empty("fusion" in needs, rows),  # each row's share of dfusion
            empty(wants_dh and split > 1, split, rows, rank + sub_rank),
        )
        self.after = (
            empty("b0" in needs, chunks, outputs, rank),
            empty("u" in needs, chunks, sizes.tasks, outputs, sub_rank),
            empty("v" in needs, chunks, sizes.tasks, sub_rank, rank),
            empty(adapter.task is not None and bool(needs & {"u", "v"}), chunks, sizes.tasks, dtype=torch.int32),
        )
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
            self.dy, self.x, self.h, adapter.a, adapter.b0, adapter.u, adapter.v, adapter.fusion, adapter.task,
            adapter.gate, adapter.gate_row, adapter.seed if drop_below else None,
            *(self.grads.get(name) for name in ("x", "a", "b0", "u", "v", "fusion", "gate")),
            *self.before, da_planes, *self.after, *other,
        )  # fmt: skip
        low, high = adapter.ranks or (0, sizes.rank)
        numbers = (
            self.dy.shape[0], sizes.columns, sizes.outputs, sizes.tasks, sizes.gates,
            0 if self.x is None else self.x.stride(0), self.chunk, adapter.scaling, drop_below, keep_scale(adapter.p), low, high,
        )  # fmt: skip
        constants = sizes.constants | runtime.phase_config(self.config, first, last, second is not None)
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


@dataclass(frozen=True)
class Sizes:
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
        gates = 0 if adapter.gate is None else adapter.gate.shape[0]
        return cls(adapter.a.shape[1], adapter.b0.shape[0], adapter.a.shape[0], sub_rank, tasks, gates)

    @property
    def constants(self) -> dict[str, int]:
        return {
            "R": self.rank,
            "S": self.sub_rank,
            "BLOCK_R": runtime.padded(self.rank),
            "BLOCK_S": runtime.padded(max(self.sub_rank, 1)),
        }


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def contiguous_adapter(adapter: AdapterArgs) -> AdapterArgs:
    return AdapterArgs._make(t.contiguous() if isinstance(t, Tensor) else t for t in adapter)


def run(
    kernel, device: torch.device, first: int, last: int, items: int, tensors: tuple, numbers: tuple, constants: dict
) -> None:
    """One launch of the phases first..last. A single phase has a program for each item; more need all resident at once."""
    constants = constants | {"FIRST": first, "LAST": last}
    per_processor = constants.pop("PROGRAMS", 1)
    if runtime.INTERPRETED:
        # Programs run one after another there: a barrier can wait for no more than one.
        state = barrier_state(device) if first < last else None
        kernel[(1 if first < last else 3,)](*tensors, state, *numbers, **constants)
        return
    with torch.cuda.device(device):
        state = barrier_state(device) if first < last else None
        programs = runtime.processors(device) * per_processor if first < last else max(items, 1)
        kernel[(programs,)](*tensors, state, *numbers, **constants, launch_cooperative_grid=first < last)
