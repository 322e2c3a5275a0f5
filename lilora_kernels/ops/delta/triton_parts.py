"""The composed plan's own kernels: both passes over x with dropout, and all between the tasks' factors and M_t."""

from collections.abc import Sequence
from operator import attrgetter

import torch
import triton.language as tl
from torch import Tensor

from .. import triton_runtime as runtime
from ..philox import threshold
from ..schema import AdapterArgs
from ..triton_launcher import Launch, current, launch
from . import composed_kernels as kernels
from . import eager
from .task_rows import Layout
from .triton_jobs import Backward, Forward, Sizes, ceil, scratch, staged_adapter

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
PROGRAMS = 128  # that sum over the outputs of all tasks: about as many as a large GPU has processors
ONE_FACTOR = dict.fromkeys(("u", "v", "fusion", "task", "gate", "gate_row"))
_launches: dict[tuple, Launch] = {}


def shrink(x: Tensor, adapters: Sequence[AdapterArgs]) -> list[Tensor]:
    if threshold(adapters[0].p) == 0:
        return eager.shrink(x, adapters)
    pair, works = len(adapters) > 1, []
    for adapter in reversed(adapters):
        works.append(Forward(x, None, adapter._replace(**ONE_FACTOR), other=works[0] if works else None, pair=pair))
    works[-1].shrink()
    return [work.h for work in reversed(works)]


def down(
    x: Tensor | None,
    dhs: Sequence[Tensor | None],
    adapters: Sequence[AdapterArgs],
    needs: Sequence[frozenset[str]],
) -> list[dict[str, Tensor]]:
    if threshold(adapters[0].p) == 0:
        return eager.down(x, dhs, adapters, needs)
    grads: list[dict[str, Tensor]] = [{} for _ in dhs]
    works: list[Backward] = []
    for i, (dh, adapter, wanted) in enumerate(zip(dhs, adapters, needs, strict=True)):
        if wanted := wanted & {"x", "a"}:
            first = works[0] if works else None
            works.append(Backward(dh, x, None, adapter._replace(**ONE_FACTOR), wanted, first=first, from_dh=True))
            grads[i] = works[-1].grads
    for work in works:
        for job in work.jobs:
            job(work)
    return grads


def expand_by_m(q: Tensor, adapter: AdapterArgs, layout: Layout, bias: Tensor | None) -> Tensor:
    if q.dtype not in TYPES:  # exact products in registers would not fit
        return eager.expand_by_m(q, adapter, layout, bias)
    m = compose(adapter, layout, q.dtype)
    if layout.stretches is None:
        order, groups = layout.order, zip(layout.groups, of_groups(m, layout), strict=True)
    else:
        at = {run.tasks: i for i, run in enumerate(layout.runs)}
        order, groups = None, [(run, m[at[run.tasks]]) for run in layout.stretches]
    q = q if order is None else q[order]
    y = q.new_empty(len(q), len(adapter.b0))
    if layout.bare:
        y[:] = 0 if bias is None else bias
    for group, own in groups:
        eager.product(group.of(q), own.mT, adapter.scaling, bias, out=group.of(y))
    return y if order is None else layout.restored(y)


def through_m(
    dy: Tensor, q: Tensor | None, adapter: AdapterArgs, layout: Layout, needs: frozenset[str], wants_dq: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    if dy.dtype not in TYPES:
        return eager.through_m(dy, q, adapter, layout, needs, wants_dq)
    dq = None
    if wants_dq:
        dq = dy.new_empty(dy.shape[0], adapter.a.shape[0])
        if layout.bare:
            dq.zero_()
        for group, own in zip(layout.groups, of_groups(compose(adapter, layout, dy.dtype), layout), strict=True):
            eager.product(group.of(dy), own, adapter.scaling, out=group.of(dq))
    needs = needs & {"b0", "u", "v", "fusion"}
    if not needs or not layout.runs:
        return {}, dq
    dm = dy.new_empty(len(layout.runs), *adapter.b0.shape, dtype=torch.float32)
    for group, own in zip(layout.groups, of_groups(dm, layout), strict=True):
        eager.wide_product(group.of(dy).mT, group.of(q), out=own)
    return gradients(dm, adapter, layout, needs, dy.dtype), dq


def forms_m(rows: Tensor, layout: Layout, adapter: AdapterArgs) -> bool:
    """As `eager.forms_m`. M_t costs the same bytes whatever the rows, and the kernels that do without it another pass over y or
    dy for each. bench.model, gate and up, both directions over the base by M_t / by phase: 8 tasks 2048 rows 1.30 / 1.38, 1024
    rows 1.50 / 1.52; 32 tasks 8192 rows 1.26 / 1.28."""
    return rows.shape[0] >= 2 * adapter.a.shape[0] * len(layout.runs) and layout.is_seen


TRITON = eager.Parts(shrink, expand_by_m, through_m, down, forms_m, attrgetter("dtype"))


def of_groups(m: Tensor, layout: Layout) -> list[Tensor]:
    """Of m [tasks, N, R] that of each group of rows, [N, R] or [count, N, R]."""
    parts = m.split([group.count for group in layout.groups]) if layout.groups else ()
    return [part[0] if group.count == 1 else part for group, part in zip(layout.groups, parts, strict=True)]


def compose(adapter: AdapterArgs, layout: Layout, dtype: torch.dtype) -> Tensor:
    """M_t of the tasks that have rows, [tasks, N, R]."""
    adapter, sizes, tasks = staged_adapter(adapter), Sizes.of(adapter), len(layout.runs)
    m = adapter.b0.new_empty(tasks, sizes.outputs, sizes.rank, dtype=dtype)
    tensors = adapter.b0, adapter.u, adapter.v, adapter.fusion, layout.present, m
    run(kernels.compose, (ceil(sizes.outputs, tile(sizes.rank)), tasks, 1), tensors, (sizes.outputs,), sizes)
    return m


def gradients(
    dm: Tensor, adapter: AdapterArgs, layout: Layout, needs: frozenset[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Those of b0, u, v and fusion from dm [tasks, N, R] of the tasks that have rows; zeros for the others'."""
    adapter, sizes, tasks = staged_adapter(adapter), Sizes.of(adapter), len(layout.runs)
    make = torch.empty_like if tasks == sizes.tasks else torch.zeros_like
    grads = {name: (torch.empty_like if name == "b0" else make)(getattr(adapter, name)) for name in needs}
    tiles = ceil(sizes.outputs, tile(sizes.rank))
    share = tile(sizes.rank) * ceil(tiles, ceil(PROGRAMS, tasks))
    splits, columns = ceil(sizes.outputs, share), ceil(sizes.rank, kernels.COLUMNS.value)
    of_v, of_fusion = scratch(
        dm,
        splits * tasks * sizes.sub_rank * sizes.rank if "v" in needs else None,
        splits * tasks * columns if "fusion" in needs else None,
    )
    scaling, (b0, u, v, fusion), present = float(adapter.scaling), adapter[1:5], layout.present
    if "u" in needs:
        tensors = dm, v, fusion, present, grads["u"]
        run(kernels.u_gradient, (tiles, tasks, 1), tensors, (sizes.outputs, scaling), sizes, dtype)
    if needs & {"v", "fusion"}:
        tensors = dm, b0, u, v, present, of_v, of_fusion
        run(kernels.v_gradient_partials, (splits, tasks, columns), tensors, (sizes.outputs, share), sizes, dtype)
    if needs & {"b0", "v", "fusion"}:
        block = kernels.SUM_BLOCK.value
        programs = ceil(sizes.outputs * sizes.rank, block) if "b0" in needs else 0
        programs += tasks * ceil(sizes.sub_rank * sizes.rank, block) if "v" in needs else 0
        programs += tasks if "fusion" in needs else 0
        tensors = dm, fusion, present, of_v, of_fusion, *(grads.get(name) for name in ("b0", "v", "fusion"))
        numbers = sizes.outputs, splits, columns, tasks, scaling, *(adapter.ranks or (0, sizes.rank))
        run(kernels.sum_gradients, (programs, 1, 1), tensors, numbers, sizes)
    return grads


def run(
    kernel,
    programs: tuple[int, int, int],
    tensors: tuple,
    numbers: tuple,
    sizes: Sizes,
    dtype: torch.dtype | None = None,
) -> None:
    if 0 in programs:
        return
    key = kernel, sizes.rank, sizes.sub_rank, dtype
    if key not in _launches:
        _launches[key] = Launch(kernel, constants_of(kernel, sizes.rank, sizes.sub_rank, dtype))
    with current(tensors[0].device):
        launch(_launches[key], programs, tensors, numbers)


def tile(rank: int) -> int:
    """How many outputs a program works on at once: all ranks lie in registers."""
    return 64 if rank <= 128 else 32


def constants_of(kernel, rank: int, sub_rank: int, dtype: torch.dtype | None) -> dict[str, object]:
    """Products are made in `dtype`."""
    block_r, block_s = runtime.padded(rank), runtime.padded(sub_rank)
    constants = {"R": rank, "S": sub_rank, "BLOCK_R": block_r, "BLOCK_S": block_s, "BLOCK_N": tile(rank)}
    constants |= {"BLOCK_C": min(block_r, kernels.COLUMNS.value), "TYPE": TYPES.get(dtype)}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return constants | {"num_warps": 8, "num_stages": 2}
