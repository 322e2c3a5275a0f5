"""Kernels of other projects on the same adapted linear, where their files can be found: none is part of this project.

They are looked for in the folder that the environment variable LILORA_PEERS names, then where Python looks for packages.
Only the modules listed here are loaded, without the `__init__` of the packages around them, so that these files are enough
in LILORA_PEERS, each at its place in its package, and a package may be installed without what it depends on:

    lorafusion       CentML/lorafusion at c48d7fd: lorafusion/ops/triton_ops/{config,utils,dropout,fused_lora_xw_sb,
                     fused_lora_dyw_dsa,fused_lora_dys_dyb}.py
    nemo_automodel   nemo-automodel 0.7.0: nemo_automodel/shared/import_utils.py,
                     nemo_automodel/components/_peft/lora_kernel.py
    vllm             vllm 0.26.0: vllm/utils/math_utils.py, vllm/lora/ops/triton_ops/{utils,kernel_utils,lora_shrink_op,
                     lora_expand_op,lora_kernel_metadata}.py
    sglang           sglang 0.5.15: sglang/srt/lora/triton_ops/{lora_tuning_config,chunked_sgmv_shrink,
                     chunked_sgmv_expand}.py, and csgmv_configs/ beside them

All are Triton kernels: on a CPU they run in its interpreter alone (TRITON_INTERPRET=1).
"""

import importlib
import logging
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.machinery import PathFinder
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from .peers import Built, Peer, Unavailable, lora_adapter, lora_factors, own
from .problems import SCALING, Operands, samples

# --- finding them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """Modules to load, all of one package, and what stands in for others that they import but whose work is not needed.

    stand_ins() -> attributes by module.
    """

    source: str
    modules: tuple[str, ...]
    stand_ins: Callable[[], dict[str, dict[str, object]]]

    def load(self) -> tuple[ModuleType, ...]:
        name = self.modules[0].partition(".")[0]
        try:
            return load(self, os.environ.get("LILORA_PEERS"))
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != name:
                raise Unavailable(f"{name} needs {error.name}, which is not installed") from error
            raise Unavailable(
                f"{error.name} is not found: lay the files of {self.source} that bench/external.py lists into the folder"
                " that LILORA_PEERS names"
            ) from error
        except (ImportError, AttributeError) as error:
            raise Unavailable(f"this version of {name} does not load here: {error}") from error


@cache
def load(package: Package, folder: str | None) -> tuple[ModuleType, ...]:
    """Import the modules, with empty packages around them, and leave sys.modules as it was."""
    stand_ins = package.stand_ins()
    roots = {name.partition(".")[0] for name in (*package.modules, *stand_ins)}

    def take() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in roots}

    before = take()
    try:
        for name in package.modules:
            add_parents(name, [folder, *sys.path] if folder else sys.path)
        for name, attributes in stand_ins.items():
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(attributes)
        return tuple(importlib.import_module(name) for name in package.modules)
    finally:
        take()
        sys.modules.update(before)


def add_parents(module: str, path: list[str]) -> None:
    parts = module.split(".")[:-1]
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        if name not in sys.modules:
            spec = PathFinder.find_spec(name, path)
            if spec is None or spec.submodule_search_locations is None:
                raise ModuleNotFoundError(f"No package {name!r}", name=name)
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = list(spec.submodule_search_locations)
        path = sys.modules[name].__path__


def check(s: Operands, training: bool, trains: bool = False) -> None:
    """Raise Unavailable for what no kernel of a package takes."""
    if training and not trains:
        raise Unavailable("its kernels are for inference only")
    if s.x.is_cuda and s.x.dtype == torch.float32:
        raise Unavailable("its products round fp32 to TF32 on a GPU")
    if not s.x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable("its kernels need a GPU")


def fastest(candidates: list, run: Callable[[object], object], measure: bool) -> object:
    """The candidate that run() takes least time with, those left out that this GPU is too small for; unmeasured the first."""
    if not measure:
        return candidates[0]
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def milliseconds(candidate: object) -> float:
        try:
            return do_bench(lambda: run(candidate))
        except OutOfResources:
            return float("inf")

    return min(candidates, key=milliseconds)


# --- training, one LoRA for all rows ----------------------------------------------------------------------------------

LORAFUSION = Package(
    "lorafusion (CentML/lorafusion on GitHub)",
    tuple(
        f"lorafusion.ops.triton_ops.{name}"
        for name in ("config", "utils", "dropout", "fused_lora_xw_sb", "fused_lora_dyw_dsa", "fused_lora_dys_dyb")
    ),
    lambda: {
        "loguru": {"logger": logging.getLogger("lorafusion")},
        "lorafusion.utils.common": {"get_device_short_name": None},
        "lorafusion.utils.benchmark": {"benchmark": None, "set_warmup_and_number": None},
        "lorafusion.utils.testing": {"assert_verbose_allclose_two_rounds": None},
    },
)


class LoRAFusion(torch.autograd.Function):
    """The base and one LoRA by their kernels, x W^T and dy W included; h = dropped x A^T and dA by cuBLAS."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, p: float, kernels: SimpleNamespace) -> Tensor:
        dropped, mask = (
            x,
            x.new_empty((), dtype=torch.bool).expand_as(x),
        )  # it wants a mask, which it then does not read
        if p:
            # Triton compiles anew for an integer that is 1 or a multiple of 16.
            dropped, mask = kernels.dropout(x, p, 16 * random.randrange(1 << 20) + 3, store_mask=True)
        h = dropped @ a.T
        ctx.save_for_backward(dropped, mask, weight, a, b, h)
        ctx.p, ctx.kernels = p, kernels
        return kernels.y(x, weight, h, b, SCALING)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, weight, a, b, h = ctx.saved_tensors
        db, dh = ctx.kernels.db_dh(dy, b, h, SCALING)
        dx = ctx.kernels.dx(dy, weight, dh, a, ctx.p, mask)
        return dx, None, dh.T @ dropped, db, None, None


def lorafusion(sets: list[Operands], training: bool) -> Built:
    """The kernels without TMA, whose descriptors are gone from Triton 3.6."""
    problem = sets[0].problem
    check(sets[0], training, trains=True)
    if problem.rank < 16 or problem.rank & (problem.rank - 1):
        raise Unavailable(f"its kernels take a rank that is a power of two from 16, not {problem.rank}")
    if problem.columns % 16:
        raise Unavailable(f"its kernel of dx reads beyond rows of {problem.columns} elements")
    modules = LORAFUSION.load()
    factors = [one_lora(s, training) for s in sets]
    p = problem.p if training else 0.0
    with torch.no_grad():
        kernels = lorafusion_kernels(modules, sets[0], *factors[0], p, training)
    return Built(
        lambda at: LoRAFusion.apply(sets[at].x, sets[at].weight, *factors[at], p, kernels),
        [[s.x, *pair] for s, pair in zip(sets, factors, strict=True)],
        lora_adapter(problem, 1),
    )


def lorafusion_kernels(
    modules: tuple[ModuleType, ...], s: Operands, a: Tensor, b: Tensor, p: float, training: bool
) -> SimpleNamespace:
    """Its kernels in its tiles for an H100, or on a GPU in the fastest of these and smaller ones.

    At rank 128 its own take more shared memory than an SM has. Its kernel of dx takes whole tiles of columns only.
    """
    config, _, dropout, y, dx, db_dh = modules
    tiles = config.H100_CONFIG
    h, dh, mask = s.x @ a.T, s.dy @ b, torch.ones_like(s.x, dtype=torch.bool)

    def run_y(tile: object) -> Tensor:
        return y.fused_lora_xw_sb(s.x, s.weight, h, b, SCALING, config=tile)

    def run_dx(tile: object) -> Tensor:
        return dx.fused_lora_dyw_dsa(s.dy, s.weight, dh, a, p, mask, config=tile)

    def sizes(tile: object, widest: int) -> list:
        pairs = ((tile.block_size_n, tile.num_stages), (256, 2), (128, 4), (128, 3))
        return [replace(tile, block_size_n=min(n, widest), num_stages=stages) for n, stages in pairs]

    on_gpu, columns = s.x.is_cuda, s.problem.columns
    tile_y = fastest(sizes(tiles.fused_lora_xw_sb, 256), run_y, on_gpu)
    tile_dx = fastest(sizes(tiles.fused_lora_dyw_dsa, columns & -columns), run_dx, on_gpu and training)
    return SimpleNamespace(
        dropout=dropout.seeded_dropout,
        y=partial(y.fused_lora_xw_sb, config=tile_y),
        dx=partial(dx.fused_lora_dyw_dsa, config=tile_dx),
        db_dh=partial(db_dh.fused_lora_dys_dyb, config=tiles.fused_lora_dys_dyb),
    )


def one_lora(s: Operands, training: bool) -> list[Tensor]:
    (a,), (b,) = lora_factors(s, 1)
    return [own(a, training), own(b, training)]


NEMO_AUTOMODEL = Package(
    "nemo-automodel 0.7.0",
    ("nemo_automodel.components._peft.lora_kernel", "nemo_automodel.shared.import_utils"),
    dict,
)


class NemoAutomodel(torch.autograd.Function):
    """A LoRA by their kernels, added to the base's y in place. Backward computes x A^T again."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, base: Tensor, kernels: ModuleType) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.kernels = kernels
        return kernels.lora_forward_wrapper(x, a.t(), b.t(), None, SCALING, x.dtype).add_(base)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        da, dx = ctx.kernels.lora_da_dx_update_wrapper(x.t(), dy, b, a, SCALING, x.dtype)
        db = ctx.kernels.lora_db_update_wrapper(a, x.t(), dy, SCALING, x.dtype)
        return dx, da.t(), db, dy, None


def nemo_automodel(sets: list[Operands], training: bool) -> Built:
    """Its kernels tune themselves at their first call, by K, N and R; they have to anew here, for M decides as well."""
    problem = sets[0].problem
    check(sets[0], training, trains=True)
    kernels, _ = NEMO_AUTOMODEL.load()
    for kernel in (kernels.lora_forward_kernel, kernels.lora_da_dx_kernel, kernels.lora_db_kernel):
        kernel.cache.clear()
    p = problem.p if training else 0.0
    factors = [one_lora(s, training) for s in sets]

    def forward(at: int) -> Tensor:
        x = sets[at].x
        base = F.linear(x, sets[at].weight)
        return NemoAutomodel.apply(F.dropout(x, p) if p else x, *factors[at], base, kernels)

    leaves = [[s.x, *pair] for s, pair in zip(sets, factors, strict=True)]
    return Built(forward, leaves, lora_adapter(problem, 1))


# --- inference, a LoRA per task ---------------------------------------------------------------------------------------


Stacks = list[list[Tensor]]
"""A [T, R, K] and B [T, N, R] of every task, for every set."""


def stacked(sets: list[Operands]) -> Stacks:
    return [[own(torch.stack(factors), False) for factors in lora_factors(s, s.problem.tasks)] for s in sets]


def per_task(sets: list[Operands], stacks: Stacks, run: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Built:
    """run(x, y of the base, A, B) -> y."""
    formula = lora_adapter(sets[0].problem, sets[0].problem.tasks)

    def forward(at: int) -> Tensor:
        x = sets[at].x
        return run(x, F.linear(x, sets[at].weight), *stacks[at])

    leaves = [[s.x, *stack] for s, stack in zip(sets, stacks, strict=True)]
    return Built(forward, leaves, lambda x, stack: formula(x, [*stack[0], *stack[1]]))


def vllm_stand_ins() -> dict[str, dict[str, object]]:
    import triton
    import triton.language

    log = logging.getLogger("vllm")
    log = SimpleNamespace(info_once=log.info, warning_once=log.info)
    return {
        "vllm.envs": {
            "VLLM_BATCH_INVARIANT": False,
            "VLLM_LORA_ENABLE_DUAL_STREAM": False,
            "VLLM_TUNED_CONFIG_FOLDER": os.environ.get("VLLM_TUNED_CONFIG_FOLDER"),
        },
        "vllm.logger": {"init_logger": lambda _: log},
        # Only asked whether launches can overlap, which vLLM does with its second stream alone.
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cuda=lambda: False)},
        # Without its registration as an operator a function is called as it is.
        "vllm.utils.torch_utils": {"async_tensor_h2d": None, "direct_register_custom_op": lambda **_: None},
        "vllm.triton_utils": {"triton": triton, "tl": triton.language},
    }


VLLM = Package(
    "vllm 0.26.0",
    (
        "vllm.utils.math_utils",
        *(
            f"vllm.lora.ops.triton_ops.{name}"
            for name in ("utils", "kernel_utils", "lora_shrink_op", "lora_expand_op", "lora_kernel_metadata")
        ),
    ),
    vllm_stand_ins,
)


def vllm(sets: list[Operands], training: bool) -> Built:
    """Its default tiles, or those of VLLM_TUNED_CONFIG_FOLDER; rows sorted ahead of time, a grid of the tasks that occur."""
    problem = sets[0].problem
    if problem.dtype == torch.float32:
        raise Unavailable("its kernels take float16 and bfloat16, not float32")
    check(sets[0], training)
    _, utils, _, shrink, expand, metadata = VLLM.load()
    for known in (utils._LORA_A_PTR_DICT, utils._LORA_B_PTR_DICT):
        known.clear()  # they keep the weights of every case before this one
    meta = metadata.LoRAKernelMeta.make(problem.tasks, problem.rows, sets[0].x.device)
    meta.prepare_tensors(row_tasks(sets[0]))
    arguments = meta.meta_args(problem.rows, True)

    def run(x: Tensor, y: Tensor, down: Tensor, up: Tensor) -> Tensor:
        h = x.new_empty(1, problem.rows, problem.rank, dtype=torch.float32)
        shrink.lora_shrink(x, [down], h, *arguments, SCALING)
        expand.lora_expand(h, [up], y, *arguments, 0, True)
        return y

    return per_task(sets, stacked(sets), run)


def row_tasks(s: Operands) -> Tensor:
    return s.x.new_zeros(s.problem.rows, dtype=torch.int32) if s.task is None else s.task


SGLANG = Package(
    "sglang 0.5.15",
    tuple(
        f"sglang.srt.lora.triton_ops.{name}"
        for name in ("lora_tuning_config", "chunked_sgmv_shrink", "chunked_sgmv_expand")
    ),
    lambda: {
        "sglang.srt.lora.utils": {"LoRABatchInfo": None},
        "sglang.srt.utils": {
            # Its cache of compiled kernels saves time of the host, but takes one dtype and rank for another.
            "cached_triton_kernel": lambda _: lambda kernel: kernel,
            "get_device_name": lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        },
    },
)
CHUNKS = (16, 32, 64, 128)  # what its server offers as the largest chunk


def sglang(sets: list[Operands], training: bool) -> Built:
    """Its chunked kernels (csgmv) in the tiles it knows for this shape and device; on a GPU in the fastest chunks."""
    problem = sets[0].problem
    check(sets[0], training)
    _, shrink, expand = SGLANG.load()
    stacks = stacked(sets)
    slices = torch.tensor([0, problem.outputs], dtype=torch.int32, device=sets[0].x.device)

    def in_chunks(size: int) -> Built:
        batch = sglang_batch(sets[0], size)

        def run(x: Tensor, y: Tensor, down: Tensor, up: Tensor) -> Tensor:
            h = shrink.chunked_sgmv_lora_shrink_forward(x, down, batch, 1)
            return expand.chunked_sgmv_lora_expand_forward(h, up, batch, slices, problem.outputs, y)

        return per_task(sets, stacks, run)

    return fastest([in_chunks(size) for size in CHUNKS], lambda built: built.forward(0), sets[0].x.is_cuda)


def sglang_batch(s: Operands, size: int) -> SimpleNamespace:
    """Rows of every task in chunks of at most `size`."""
    pairs = [(t, start) for t, rows in samples(s.problem) for start in range(rows.start, rows.stop, size)]
    tasks, starts = zip(*pairs, strict=True)

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=s.x.device)

    return SimpleNamespace(
        use_cuda_graph=False,
        num_segments=len(pairs),
        max_len=size,
        seg_indptr=integers([*starts, s.problem.rows]),
        weight_indices=integers(tasks),
        lora_ranks=integers([s.problem.rank] * s.problem.tasks),
        scalings=torch.full((s.problem.tasks,), SCALING, device=s.x.device),
        permutation=torch.arange(s.problem.rows, dtype=torch.int32, device=s.x.device),
    )


EXTERNAL = {
    "lorafusion": Peer("LoRAFusion's kernels, one LoRA for all rows", lorafusion),
    "nemo_automodel": Peer("nemo-automodel's LoRA kernels, one LoRA for all rows", nemo_automodel),
    "vllm": Peer("a LoRA per task by vLLM's shrink and expand", vllm),
    "sglang": Peer("a LoRA per task by SGLang's chunked shrink and expand", sglang),
}
