"""Launch configurations of the Triton kernels: a function for each, and in configs/ what tuning found better on a GPU.

A configuration has the sizes of `ForwardSizes` or `BackwardSizes` that the kernel reads, num_warps and num_stages; CHUNK (rows
of a partial sum, all kernels of a backward alike) for those that read dy; PROGRAMS of a processor for one launch of all.

What moves, in bytes asked of the L2 cache, beside what has to (x, y, dy, dx once and the parameters once):
  shrink        A for each tile of rows: M / BLOCK_M * R K; partial sums, written and read: 2 * 4 SPLIT_K M R
  expand        B0 and U_t for each tile of rows: M / BLOCK_M * N (R + S); h and z for each item: N / (BLOCK_N TILES_N) M (R + S)
  from_dy       as both for dh, with dy once more for db0 and du, and h for each tile of outputs: N / BLOCK_N * M R
  from_x        dh for each tile of columns: K / BLOCK_K * M R; A for each chunk
  add_partials  4 M / CHUNK * (R K + N R), and what the tasks have in each chunk
So tiles are as high as registers allow, and few rows are split along K or N until every processor has an item. Choices for
more than ONE_LAUNCH_ROWS rows matter for many tasks and for ids that the host does not know; the composed plan takes the others.
"""

import json
from bisect import bisect_left
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...backends import ONE_LAUNCH_ROWS
from .. import triton_runtime as runtime
from ..schema import AdapterArgs

CONFIGS = Path(__file__).parents[2] / "configs"
FEW = 128  # rows up to which a backward has tiles of 16: bench.model, gate and up, both directions, us by tiles of 16 / of 64:
# 96 rows 94 / 92 (8 tasks 124 / 121), 128 rows 100 / 99 (118 / 128), 160 rows 108 / 98 (138 / 127). A forward has up to 255 rows.
ROWS = FEW, ONE_LAUNCH_ROWS, 1024, 4096  # up to so many rows have a configuration; more have one too
MANY = 16384  # what the latter is made for
ITEMS = 256  # about two for each processor of a large GPU
LARGE_BLOCKS = {"sm_80", "sm_90", "sm_100"}  # whose blocks may have more than 99 KB of shared memory


def shrink(rows: int, sm_90: bool, pair: bool = False) -> dict[str, int]:
    if rows <= ONE_LAUNCH_ROWS:
        tiles = {"BLOCK_M": 16, "BLOCK_K": 32 if sm_90 else 64, "num_warps": 4, "num_stages": 5 if sm_90 else 3}
    else:
        height, deep = 32 if pair and not sm_90 else 64, sm_90 and rows > 4096 and not pair
        tiles = {"BLOCK_M": height, "BLOCK_K": 64, "num_warps": 8, "num_stages": 5 if deep else 3}
    return tiles | {"SPLIT_K": splits(rows, tiles["BLOCK_M"])}


def splits(rows: int, height: int) -> int:
    """A power of two up to 16, so that there are about ITEMS items: the last to arrive adds up what all have.

    One number for all that is computed in one launch: the order of a row's sums, and so its bits, depend on no other row there.
    """
    return 16 if rows <= ONE_LAUNCH_ROWS else min(16, 1 << max(1, ITEMS * height // rows).bit_length() - 1)


def expand(rows: int, sm_90: bool, pair: bool = False) -> dict[str, int]:
    if rows <= ONE_LAUNCH_ROWS:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "TILES_N": 1, "num_warps": 4, "num_stages": 3}
    if rows <= 4096:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "TILES_N": 4, "num_warps": 8, "num_stages": 3}
    if sm_90:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "TILES_N": 8, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "TILES_N": 16, "num_warps": 8, "num_stages": 3}


def delta_forward(rows: int, sm_90: bool, pair: bool = False) -> dict[str, int]:
    if rows <= ONE_LAUNCH_ROWS:
        return expand(rows, sm_90) | shrink(rows, sm_90) | {"PROGRAMS": 3 if sm_90 else 1}
    return expand(1024, sm_90) | shrink(rows, sm_90) | {"num_stages": 3}


def from_dy(rows: int, sm_90: bool, pair: bool = False) -> dict[str, int]:
    if rows <= FEW:
        tiles = {"BLOCK_M": 16, "BLOCK_N": 32, "SPLIT_N": 16 if sm_90 else 8, "CHUNK": 256}
    else:
        height, chunk = 64 if sm_90 else 32, 512 if rows <= 4096 else 2048
        tiles = {"BLOCK_M": height, "BLOCK_N": 64, "SPLIT_N": min(4, max(2, splits(rows, height))), "CHUNK": chunk}
    return tiles | {"num_warps": 8, "num_stages": 2}


def from_x(rows: int, sm_90: bool, pair: bool = False) -> dict[str, int]:
    if rows <= FEW:
        tiles = {"BLOCK_M": 16, "BLOCK_K": 64}
    else:
        tiles = dict.fromkeys(("BLOCK_M", "BLOCK_K"), 64 if sm_90 and not pair else 32)
    return tiles | {"num_warps": 8, "num_stages": 2}


def add_partials(rows: int, sm_90: bool, pair: bool = False) -> dict[str, int]:
    return {"num_warps": 4, "num_stages": 2}


def delta_backward(rows: int, sm_90: bool, pair: bool = False) -> dict[str, int]:
    sizes = from_x(rows, sm_90) | from_dy(rows, sm_90)
    return sizes if sm_90 else sizes | {"BLOCK_N": 32}  # all phases hold registers: 64 spills on sm_80


HEURISTICS = {
    function.__name__: function
    for function in (shrink, expand, delta_forward, from_dy, from_x, add_partials, delta_backward)
}


class Configuration(dict):
    """Of a kernel for calls of one kind. `launches` belongs to the backend, which makes each launch of it once."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__(sizes)
        self.launches = {}


def configuration(kernel: str, x: Tensor, adapter: AdapterArgs, pair: bool = False) -> Configuration:
    """That of a kernel, by its name, for the rows of x [M, K] or dy [M, N]; `pair`: it serves two adapters of one x."""
    return _configuration(runtime.device_names(x.device), kernel, bucket(x.shape[0]), pair, *widths(x, adapter))


@cache
def _configuration(names: tuple[str, ...], kernel: str, rows: int, pair: bool, *widths: int) -> Configuration:
    return Configuration(shrink_tiles(chosen(names, kernel, rows, pair), names, *widths))


def widths(x: Tensor, adapter: AdapterArgs) -> tuple[int, int, int, int]:
    """Bytes of an element of x, and of the widest of x and the parameters; the ranks and sub-ranks that lie in a tile."""
    widest = max([t.element_size() for t in (x, *adapter[:4]) if t is not None])
    rank, sub_rank = adapter.rank_sizes
    return x.element_size(), widest, runtime.padded(rank), runtime.padded(sub_rank) if sub_rank else 0


def chosen(names: tuple[str, ...], kernel: str, rows: int, pair: bool = False) -> dict[str, int]:
    """For 2-byte elements and ranks up to 128: what tuning found for a GPU of these names, or the kernel's function."""
    sizes = HEURISTICS[kernel](rows, "sm_90" in names, pair)
    sizes = sizes if pair else sizes | tuned(names).get(kernel, {}).get(str(rows), {})
    if sizes.get("CHUNK", 0) % sizes.get("BLOCK_M", 1):
        raise ValueError(
            f"{CONFIGS}: {kernel} {rows} has CHUNK {sizes['CHUNK']}; give a multiple of BLOCK_M {sizes['BLOCK_M']}"
        )
    return sizes


@cache
def tuned(names: tuple[str, ...]) -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {rows: sizes}} of the first of configs/<name>.json that exists."""
    found = [path for name in names if (path := CONFIGS / f"{name}.json").is_file()]
    return json.loads(found[0].read_text()) if found else {}


def bucket(rows: int) -> int:
    return (*ROWS, MANY)[bisect_left(ROWS, rows)]


def bucket_rows(device: torch.device) -> list[int]:
    """Numbers of rows that together meet every configuration up to 64 thousand rows, and those where `linear` changes its plan.

    One row is among them because cuBLAS has kernels of its own for it.
    """
    return [1, *sorted({*ROWS, ONE_LAUNCH_ROWS + 1, ROWS[-1] + 1})]


def shrink_tiles(
    sizes: dict[str, int], names: tuple[str, ...], activation: int, parameter: int, block_r: int, block_s: int
) -> dict[str, int]:
    """Smaller tiles for wider elements and ranks above 128, shallower pipelines for what fills their stages; of `widths`."""
    narrower = (activation > 2) + (block_r > 128)
    shallower = parameter > activation  # fp32 masters
    full = block_r == block_s == 128 and not narrower and sizes.get("BLOCK_N", 0) * sizes.get("TILES_N", 0) > 32
    shallower += full and LARGE_BLOCKS.isdisjoint(names)  # B0 beside U_t
    if not narrower and not shallower:
        return sizes
    fit = {name: max(16, size >> narrower) if name.startswith("BLOCK_") else size for name, size in sizes.items()}
    fit["num_stages"] = max(1, fit["num_stages"] - shallower)
    return {name: size for name, size in fit.items() if name != "PROGRAMS"}
