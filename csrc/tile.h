// Tiles in shared memory, their loads, and products of tiles by one block of threads.
#pragma once

#include "work.h"

namespace lilora {

constexpr int kThreads = 256;
constexpr int kMostStages = 4;

constexpr int kDepth = 64;  // elements of the summed dimension that one step takes: 128 bytes of a row

// A row-major matrix in global memory. `aligned`: its rows begin at multiples of sixteen bytes.
struct Matrix {
  const void* data;
  int64_t stride;  // in elements
  bool aligned;
};

template <typename T>
DEVICE float element(const Matrix& m, int64_t at) {
  return to_float(static_cast<const T*>(m.data)[at]);
}

// kRows rows of kColumns elements, aligned to 1024 bytes: panels of eight chunks of each row, permuted so that a column
// of eight rows lies in different banks. This is the 128-byte swizzle of wgmma.
template <typename T, int kRows, int kColumns>
struct Tile {
  static constexpr int kChunks = kColumns / kPerChunk;  // of a row
  static_assert(kRows % 8 == 0 && kChunks % 8 == 0);
  Chunk* data;

  DEVICE Chunk* chunk(int row, int i) const {
    const int panel = kChunks == 8 ? 0 : i / 8;
    return data + (panel * kRows + row) * 8 + ((i ^ row) & 7);
  }
  DEVICE T& at(int row, int column) const {
    return reinterpret_cast<T*>(chunk(row, column / kPerChunk))[column % kPerChunk];
  }

  // What wgmma is told of the tile from (row, chunk i) on, both multiples of eight. It counts bytes by sixteens.
  DEVICE uint64_t descriptor(int row, int i) const {
    constexpr uint64_t kPanel = kChunks == 8 ? 1 : kRows * 8, kEightRows = 8 * 8, kSwizzle128 = 1;
    return kSwizzle128 << 62 | kEightRows << 32 | kPanel << 16 | shared_address(chunk(row, i)) / 16;
  }
};

// Copies up to kPerChunk elements from m[row, column] on, the rest of the chunk becomes zero. Complete after
// wait_copies() and a barrier.
template <typename T>
DEVICE void load_chunk(Chunk* to, const Matrix& m, int64_t row, int64_t column, int count) {
  const int64_t at = row * m.stride + column;
  if (count > kPerChunk) count = kPerChunk;
  if (count <= 0) {
    *to = Chunk{{0, 0, 0, 0}};
  } else if (m.aligned) {
    copy_async(to, static_cast<const T*>(m.data) + at, count * static_cast<int>(sizeof(T)));
  } else {
    T* elements = reinterpret_cast<T*>(to);
    NO_UNROLL
    for (int i = 0; i < kPerChunk; ++i) elements[i] = i < count ? static_cast<const T*>(m.data)[at + i] : rounded<T>(0.0f);
  }
}

// Loads the first rows of a tile: `load(to, row, column)` is called for each of their chunks.
template <int kRows, typename T, int kColumns, typename Load>
DEVICE void for_each_chunk(Tile<T, kRows, kColumns> tile, Load load, int rows = kRows) {
  NO_UNROLL
  for (int i = threadIdx.x; i < rows * tile.kChunks; i += kThreads) {
    const int row = i / tile.kChunks, c = i % tile.kChunks;
    load(tile.chunk(row, c), row, c * kPerChunk);
  }
}

// m[row + i, column + j] for i < rows and j < columns, zeros elsewhere; rows from `filled` on are left as they are.
template <int kRows, typename T, int kColumns>
DEVICE void load_tile(Tile<T, kRows, kColumns> tile, const Matrix& m, int64_t row, int rows, int64_t column,
                      int columns, int filled = kRows) {
  for_each_chunk<kRows>(
      tile,
      [&](Chunk* to, int i, int j) { load_chunk<T>(to, m, row + i, column + j, i < rows ? columns - j : 0); }, filled);
}

// The same for rows of one task alone; the others become zero. `mine(i)`: whether row i is one of them.
template <int kRows, typename T, int kColumns, typename Mine>
DEVICE void load_rows(Tile<T, kRows, kColumns> tile, const Matrix& m, int64_t row, int rows, int64_t column,
                      int columns, Mine mine) {
  for_each_chunk<kRows>(tile, [&](Chunk* to, int i, int j) {
    load_chunk<T>(to, m, row + i, column + j, i < rows && mine(i) ? columns - j : 0);
  });
}

// Loads the stages of the first steps, all but one.
template <typename Load>
DEVICE void begin_pipeline(int steps, int stages, Load load) {
  NO_UNROLL
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps) load(step, step);
    commit_copies();
  }
}

// Runs use(step, stage) for each step while the loads of later steps are under way: load(step, stage) fills a stage.
// begun: begin_pipeline() was called.
template <typename Load, typename Use>
DEVICE void pipeline(int steps, int stages, Load load, Use use, bool begun = false) {
  int loaded = begun ? stages - 1 : 0, used = 0;  // stages that come next
  NO_UNROLL
  for (int step = begun ? 0 : 1 - stages; step < steps; ++step) {
    if (step >= 0) {
      wait_copies(stages - 2);
      publish_shared();
      __syncthreads();
    }
    if (step + stages - 1 < steps) load(step + stages - 1, loaded);
    commit_copies();
    loaded = loaded + 1 == stages ? 0 : loaded + 1;
    if (step < 0) continue;
    use(step, used);
    used = used + 1 == stages ? 0 : used + 1;
  }
  __syncthreads();
}

// C [kM, kN] += A [kM, depth] B [depth, kN] by a block of eight warps, accumulators in registers.
//
// kATransposed: the tile of A is stored [depth, kM]; kBTransposed: that of B is stored [depth, kN] instead of [kN, depth].
template <typename T, int kM, int kN, bool kATransposed, bool kBTransposed>
struct Product {
  static constexpr bool kWarpgroups = kHasWgmma && kM == 128;  // two, of 64 rows each
  static constexpr int kWarpsM = kWarpgroups ? 8 : kM <= 64 ? 1 : 2, kWarpsN = kThreads / 32 / kWarpsM;
  static constexpr int kTilesM = kM / kWarpsM / 16, kTilesN = kN / kWarpsN / 8;
  static_assert(kTilesM >= 1 && kTilesN % 2 == 0);
  static constexpr int kRowsA = kATransposed ? kDepth : kM, kRowsB = kBTransposed ? kDepth : kN;
  using A = Tile<T, kRowsA, kATransposed ? kM : kDepth>;
  using B = Tile<T, kRowsB, kBTransposed ? kN : kDepth>;
  static constexpr int kChunksA = kRowsA * A::kChunks, kChunksB = kRowsB * B::kChunks;
  // Chunks between an element and the one sixteen deeper.
  static constexpr int kSixteenA = kATransposed ? 16 * 8 : 2, kSixteenB = kBTransposed ? 16 * 8 : 2;

  float c[kTilesM][kTilesN][4];

  DEVICE static int lane() { return threadIdx.x % 32; }
  DEVICE static int warp_row() { return kWarpsM == 1 ? 0 : threadIdx.x / 32 / kWarpsN * (kM / kWarpsM); }
  DEVICE static int warp_column() { return threadIdx.x / 32 % kWarpsN * (kN / kWarpsN); }

  // This thread's elements: rows row(i, half) and columns column(j) and column(j) + 1, for c[i][j][2 * half].
  DEVICE static int row(int i, int half) { return warp_row() + 16 * i + lane() / 4 + 8 * half; }
  DEVICE static int column(int j) { return warp_column() + 8 * j + lane() % 4 * 2; }

  DEVICE void clear() {
    UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      UNROLL
      for (int j = 0; j < kTilesN; ++j) {
        UNROLL
        for (int e = 0; e < 4; ++e) c[i][j][e] = 0;
      }
    }
  }

  DEVICE void clear_columns(int from) {
    UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      UNROLL
      for (int j = 0; j < kTilesN; ++j) {
        UNROLL
        for (int e = 0; e < 4; ++e) c[i][j][e] = column(j) < from ? c[i][j][e] : 0;
      }
    }
  }

  // f(row, first column, values) for each kCount neighbours of a row, 4 or 8. Two or four lanes that hold pairs of the same
  // rows exchange them, so that each gets the neighbours of a tile of eight columns of its own.
  template <int kCount, typename F>
  DEVICE void for_each(F f) {
    constexpr int kOwners = kCount / 2;
    static_assert(kTilesN % kOwners == 0 || kTilesN == 2);
    const int own = lane() % kOwners;
    UNROLL
    for (int first = 0; first < kTilesM * 2 * kTilesN; first += kOwners) {
      float values[kCount];
      UNROLL
      for (int e = 0; e < kCount; ++e) {
        const int tile = first + e / 2;
        values[e] = c[tile / kTilesN / 2][tile % kTilesN][tile / kTilesN % 2 * 2 + e % 2];
      }
      UNROLL
      for (int apart = 1; apart < kOwners; apart *= 2) {
        const bool upper = (own & apart) != 0;
        UNROLL
        for (int e = 0; e < kCount; ++e) {
          if ((e / 2 & apart) != 0) continue;
          float &low = values[e], &high = values[e + 2 * apart];
          const float other = shuffle(upper ? low : high, lane() ^ apart);
          low = upper ? other : low;
          high = upper ? high : other;
        }
      }
      const int half = first / kTilesN % 2 + (kTilesN < kOwners ? own / kTilesN : 0);
      const int j = first % kTilesN + (kTilesN < kOwners ? own % kTilesN : own);
      f(row(first / kTilesN / 2, half), warp_column() + 8 * j + lane() % 4 / kOwners * kCount, values);
    }
  }

  // One step. Columns from `columns` on are not wanted, nor are the sixteen rows of a bit that `tiles` lacks; a warpgroup
  // computes them nevertheless.
  DEVICE void step(A a, B b, int columns, uint32_t tiles = ~0u) {
    if (warp_column() >= columns) return;
    if constexpr (kWarpgroups) {
      const int m = threadIdx.x / 128 * 64;
      const uint64_t left = kATransposed ? a.descriptor(0, m / 8) : a.descriptor(m, 0), right = b.descriptor(0, 0);
      begin_products(c[0]);
      UNROLL
      for (int k = 0; k < kDepth / 16; ++k) {
        multiply_warpgroup<T, kATransposed, kBTransposed>(c[0], left + k * kSixteenA, right + k * kSixteenB);
      }
      end_products(c[0]);
    } else {
      UNROLL
      for (int k = 0; k < kDepth; k += 16) {
        uint32_t left[kTilesM][4], right[kTilesN / 2][4];
        const int which = lane() / 8, in = lane() % 8;
        UNROLL
        for (int i = 0; i < kTilesM; ++i) {
          if ((tiles >> (warp_row() / 16 + i) & 1) == 0) continue;
          const int m = warp_row() + 16 * i + which % 2 * 8, depth = k + which / 2 * 8;
          load_matrices<kATransposed>(left[i], kATransposed ? a.chunk(depth + in, m / 8) : a.chunk(m + in, depth / 8));
        }
        UNROLL
        for (int j = 0; j < kTilesN / 2; ++j) {
          const int n = warp_column() + 16 * j + which / 2 * 8, depth = k + which % 2 * 8;
          load_matrices<kBTransposed>(right[j], kBTransposed ? b.chunk(depth + in, n / 8) : b.chunk(n + in, depth / 8));
        }
        UNROLL
        for (int i = 0; i < kTilesM; ++i) {
          if ((tiles >> (warp_row() / 16 + i) & 1) == 0) continue;
          UNROLL
          for (int j = 0; j < kTilesN; ++j) {
            multiply<T>(c[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
          }
        }
      }
    }
  }
};

}  // namespace lilora
