// Index arithmetic of the kernels: which work items a phase has, and which rows, columns and tasks an item stands for.
// Plain C++, the same in kernels, launchers and tests.
#pragma once

#include "platform.h"

namespace lilora {

HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HOST_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
HOST_DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }

// Ranks are padded to whole chunks in the tensors that the kernels make for themselves.
HOST_DEVICE constexpr int padded(int rank) { return (rank + 7) / 8 * 8; }

constexpr int kMostSplits = 8;  // of a sum into partial sums: when they are added, the loads of all are under way

// `count` elements from `first` on: a tile at the edge of a matrix has fewer than others.
struct Range {
  int64_t first;
  int count;
};

// Tensor cores take rows by sixteen: rows of whole such tiles, and the bits of those below a row.
HOST_DEVICE constexpr int whole_tiles(int rows) { return (rows + 15) / 16 * 16; }
HOST_DEVICE constexpr uint32_t tiles_below(int row) { return (1u << row / 16) - 1; }

// Tile number `index` of `size` elements each, of `total`.
HOST_DEVICE Range tile_range(int index, int size, int64_t total) {
  const int64_t first = int64_t{index} * size, left = total - first;
  return {first, static_cast<int>(left < size ? left : size)};
}

// Share number `index` of `shares` of a dimension of `total`, in whole steps of `step`. The last shares may be empty.
HOST_DEVICE Range share_range(int index, int shares, int step, int total) {
  const int size = ((total + step - 1) / step + shares - 1) / shares * step;
  const int first = smaller(index * size, total);
  return {first, smaller(size, total - first)};
}

// How many shares `steps` steps are split into, of `least` steps or more each and `most` at most: the number with which the
// block that has most of the items, one of each tile and share, takes the fewest steps. Two items a block are enough.
inline int shares_for(int64_t tiles, int blocks, int steps, int least, int most) {
  const int64_t enough = ceil_div(2 * int64_t{blocks}, tiles < 1 ? 1 : tiles);
  int best = 1;
  int64_t fewest = ceil_div(tiles, blocks) * steps;
  for (int shares = 2; shares <= most && shares <= enough && ceil_div(steps, shares) >= least; ++shares) {
    const int64_t taken = ceil_div(tiles * shares, blocks) * ceil_div(steps, shares);
    if (taken >= fewest) continue;
    best = shares;
    fewest = taken;
  }
  return best;
}

// An item as the coordinates of a grid of `second` by `third` under its first coordinate.
struct Coordinates {
  int first, second, third;
};
HOST_DEVICE Coordinates coordinates(int item, int second, int third) {
  return {item / third / second, item / third % second, item % third};
}

}  // namespace lilora
