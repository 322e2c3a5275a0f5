// Index arithmetic of the fused Hopper product: tiles and the order they are computed in, slots, and which thread draws
// which word of the dropout mask. Plain C++, the same in kernels, launchers and tests.
#pragma once

#include "hopper/fused_linear.h"
#include "work.h"

namespace lilora::hopper {

// One block computes kTileM x kTileN of the output in steps of kTileK. kClusterM blocks, one below the other, share a
// tile of the weight, hence take the same steps, hence have the same tasks: those of kSlotRows rows.
constexpr int kTileM = 128, kTileN = 256, kTileK = 64, kClusterM = 2;
constexpr int kSlotRows = kTileM * kClusterM;

// Rows of clusters that are walked together, column by column, so that what they read stays in the L2 cache.
constexpr int kBandRows = 8;

struct TileIndex {
  int m, n;
};

// Place number `index` in the order in which a grid of tiles_m by tiles_n clusters is computed.
HOST_DEVICE TileIndex tile_at(int index, int tiles_m, int tiles_n) {
  const int band = index / (kBandRows * tiles_n), within = index % (kBandRows * tiles_n);
  const int rows = smaller(kBandRows, tiles_m - band * kBandRows);
  return {band * kBandRows + within % rows, within / rows};
}

// --- slots ---------------------------------------------------------------------------------------

HOST_DEVICE constexpr int slots_per_group(int64_t tasks) {
  return tasks < kSlotRows ? static_cast<int>(tasks) : kSlotRows;
}

// The task in whose slot a row is; -1 for none. An id that does not exist has its NaN in the slot of the last task.
HOST_DEVICE constexpr int slot_task(int id, int tasks) { return id < 0 ? -1 : smaller(id, tasks - 1); }

// The first row of a group that has the task of row `row`; -1 for a row without one. task [kSlotRows].
HOST_DEVICE int first_of_task(const int* task, int row) {
  if (task[row] < 0) return -1;
  int first = 0;
  while (task[first] != task[row]) ++first;
  return first;
}

// How many tasks occur first before row `row`: the slot of the one that occurs first in it. first [kSlotRows].
HOST_DEVICE int slots_before(const int* first, int row) {
  int count = 0;
  for (int i = 0; i < row; ++i) count += first[i] == i;
  return count;
}

// --- dropout on accumulators ---------------------------------------------------------------------
//
// The two warp groups of a block hold 64 rows each. The four lanes of a quad hold the 8 columns of a block of a row,
// two each: lane i needs word i of its draw. So each lane draws for another of four places (two rows, two blocks of
// columns), and the quad transposes the words.

constexpr int kMaskBatches = kTileN / 16;

// Row within the tile, and block of 8 columns, of place 0..3 in a batch.
HOST_DEVICE constexpr TileIndex mask_place(int thread, int batch, int place) {
  return {thread / 32 * 16 + thread % 32 / 4 + place % 2 * 8, batch * 2 + place / 2};
}

// The accumulator that holds element 0 or 1 of what the thread has of that place.
HOST_DEVICE constexpr int mask_accumulator(int batch, int place, int element) {
  return batch * 8 + place * 2 + element;
}

}  // namespace lilora::hopper
