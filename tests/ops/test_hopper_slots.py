"""What the fused Hopper product decides without tensor cores: slots, the order of tiles, the mask on accumulators.

The kernels are those of csrc/hopper, compiled for a CPU, where tests/emulation/emulation.h runs their threads.
"""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilora_kernels.ops.philox import keep_mask, keep_scale, threshold

ROOT = Path(__file__).parents[2]
POISON = -7
FLAGS = "-std=c++17 -O2 -U_FORTIFY_SOURCE -Wall -Wextra -Werror -Wno-clobbered -shared -fPIC"
WRAPPER = r"""
#include <stdexcept>

#include "hopper/dropout.h"
#include "hopper/slots.cu"

using namespace lilora::hopper;

struct Mask {
  Dropout dropout;
  int64_t first_row, first_column;
  float* out;  // [kTileM, kTileN]
};

void mask_tile(Mask mask) {
  float accumulators[kMaskBatches * 8];
  for (float& x : accumulators) x = 1;
  const int thread = threadIdx.x;
  apply_dropout(accumulators, mask.dropout, thread, mask.first_row, mask.first_column);
  for (int i = 0; i < kMaskBatches * 8; ++i) {
    const TileIndex at = mask_place(thread, i / 8, i / 2 % 4);
    mask.out[at.m * kTileN + at.n * 8 + thread % 4 * 2 + i % 2] = accumulators[i];
  }
}

extern "C" {
const char* fill(int64_t m, int64_t s, int64_t tasks, const int32_t* task, const void* z, int64_t z_stride, void* slots_z,
          int32_t* slots_task, int32_t* slots_count, unsigned order) {
  lilora::emulation::order = order;
  try {
    fill_slots({m, s, tasks, task, z, z_stride, {slots_z, slots_task, slots_count}}, nullptr);
  } catch (const std::runtime_error& e) {
    static std::string error;
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
int64_t capacity(int64_t m, int64_t tasks) { return slot_capacity(m, tasks); }
int64_t groups(int64_t m) { return slot_groups(m); }
void order(int tiles_m, int tiles_n, int* out) {
  for (int i = 0; i < tiles_m * tiles_n; ++i) {
    const TileIndex at = tile_at(i, tiles_m, tiles_n);
    out[2 * i] = at.m;
    out[2 * i + 1] = at.n;
  }
}
void mask(int64_t seed, unsigned threshold, float keep_scale, int64_t first_row, int64_t first_column, float* out) {
  lilora::launch(mask_tile, Mask{{&seed, threshold, keep_scale}, first_row, first_column, out}, 1, 256, 0,
                 lilora::Together::kNo, nullptr);
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hopper")
    (folder / "wrapper.cpp").write_text(WRAPPER)
    emulation = ROOT / "tests/emulation"
    command = ["g++", *FLAGS.split(), f"-I{ROOT / 'csrc'}", f"-I{emulation}"]
    subprocess.run([*command, "wrapper.cpp", emulation / "emulation.cpp", "-o", "library.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "library.so"))
    library.capacity.restype = library.groups.restype = ctypes.c_int64
    library.fill.restype = ctypes.c_char_p
    return library


def size(n):
    return ctypes.c_int64(n)


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def fill(library, z, task, tasks, order=0):
    """The slots of z [M, S]: z [groups, slots of a group, rows, S], task [groups, slots of a group], count [groups]."""
    groups, capacity = library.groups(size(len(z))), library.capacity(size(len(z)), size(tasks))
    slots = torch.full((capacity, 256, z.shape[1]), POISON, dtype=z.dtype)
    slot_task = torch.full((capacity,), POISON, dtype=torch.int32)
    count = torch.full((groups,), POISON, dtype=torch.int32)
    sizes = size(len(z)), size(z.shape[1]), size(tasks)
    results = pointer(slots), pointer(slot_task), pointer(count)
    error = library.fill(*sizes, pointer(task), pointer(z), size(z.stride(0)), *results, order)
    if error is not None:
        raise RuntimeError(error.decode())
    return slots.unflatten(0, (groups, -1)), slot_task.view(groups, -1), count


def product(slots, slot_task, count, u, rows):
    """What the adapter's steps add up: rows of z_slot U^T over the slots of their group, in fp64."""
    y = torch.zeros(len(count), 256, u.shape[1], dtype=torch.float64)
    for group, used in enumerate(count.tolist()):
        for slot, task in zip(slots[group, :used], slot_task[group, :used].tolist(), strict=True):
            y[group] += slot.double() @ u[task].double().T
    return y.flatten(0, 1)[:rows]


@st.composite
def batches(draw):
    tasks = draw(st.sampled_from([1, 2, 5, 300]))
    ids = draw(st.sampled_from(["one task", "samples", "shuffled"]))
    rows = draw(st.integers(1, 600))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if ids == "one task":
        task = None if tasks == 1 else torch.full((rows,), tasks - 1, dtype=torch.int32)
    else:
        task = torch.randint(-1, tasks + 1, (rows,), generator=generator, dtype=torch.int32)
        task = task.sort().values.roll(draw(st.integers(0, rows))) if ids == "samples" else task
    return rows, tasks, task, draw(st.sampled_from([8, 24])), generator


@settings(max_examples=25, deadline=None)
@given(batch=batches(), dtype=st.sampled_from([torch.float16, torch.bfloat16]), padding=st.sampled_from([0, 16]))
def test_slots_give_each_row_its_own_task(library, batch, dtype, padding):
    rows, tasks, task, s, generator = batch
    z = torch.randn(rows, s + padding, generator=generator).to(dtype)[:, :s]
    u = torch.randn(tasks, 8, s, generator=generator)
    slots, slot_task, count = fill(library, z, task, tasks)

    ids = torch.zeros(rows, dtype=torch.int64) if task is None else task.long()
    wanted = (u[ids.clamp(0, tasks - 1)].double() @ z.double().unsqueeze(-1)).squeeze(-1)
    wanted[ids < 0] = 0
    wanted[ids >= tasks] = float("nan")
    torch.testing.assert_close(product(slots, slot_task, count, u, rows), wanted, equal_nan=True)

    for group, used in enumerate(count.tolist()):
        present = ids[256 * group : 256 * group + 256]
        assert slot_task[group, :used].tolist() == list(
            dict.fromkeys(present[present >= 0].clamp(max=tasks - 1).tolist())
        )
        assert (slots[group, used:] == POISON).all()
        assert (slot_task[group, used:] == POISON).all()
        behind = slots[group, :used, max(0, rows - 256 * group) :]
        assert (behind == 0).all()


def test_slots_do_not_depend_on_the_order_of_threads(library):
    task = torch.randint(-1, 7, (513,), dtype=torch.int32)
    z = torch.randn(513, 16).half()
    wanted = fill(library, z, task, 7)
    for order in (1, 2, 3):
        for got, want in zip(fill(library, z, task, 7, order), wanted, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("width", "columns", "sentence"),
    [
        (32, slice(0, 12), r"S is 12, but .* needs a positive multiple of 8"),
        (36, slice(0, 16), r"z's row stride is 36"),
        (32, slice(3, 11), r"z starts 6 bytes after a multiple of 16"),
    ],
)
def test_what_cannot_be_loaded_is_refused(library, width, columns, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        fill(library, torch.zeros(4, width).half()[:, columns], None, 1)


@settings(deadline=None)
@given(tiles_m=st.integers(1, 40), tiles_n=st.integers(1, 60))
def test_every_tile_comes_once_and_bands_of_eight_rows_stay_together(library, tiles_m, tiles_n):
    tiles = torch.empty(tiles_m * tiles_n, 2, dtype=torch.int32)
    library.order(tiles_m, tiles_n, pointer(tiles))
    assert sorted(map(tuple, tiles.tolist())) == [(m, n) for m in range(tiles_m) for n in range(tiles_n)]
    assert (tiles[:, 0].div(8, rounding_mode="floor").diff() >= 0).all()


@pytest.mark.parametrize("p", [0.05, 0.7])
@pytest.mark.parametrize(("first_row", "first_column"), [(0, 0), (384, 512)])
def test_mask_on_accumulators_is_the_dropout_stream(library, p, first_row, first_column):
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    tile = torch.full((128, 256), float("nan"))
    scale = ctypes.c_float(keep_scale(p))
    library.mask(size(seed.item()), threshold(p), scale, size(first_row), size(first_column), pointer(tile))
    mask = keep_mask(seed, first_row + 128, first_column + 256, p)[first_row:, first_column:]
    torch.testing.assert_close(tile, mask * keep_scale(p))
