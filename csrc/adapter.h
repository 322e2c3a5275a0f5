// What the kernels of both directions do with an adapter: the tasks of a tile of rows, coefficients, dropout.
#pragma once

#include "delta.h"
#include "philox.h"

namespace lilora {

// The task of a row: below 0 none; without task factors all from 0 on are one. T and above do not exist.
DEVICE int task_of(const Adapter& adapter, int64_t row) {
  if (adapter.task == nullptr) return 0;
  const int id = adapter.task[row];
  return adapter.sub_rank == 0 && id > 0 ? 0 : id;
}

template <typename T>
DEVICE float share_of_b0(const Adapter& adapter, int task) {
  return adapter.fusion.data == nullptr ? 1.0f : sigmoid(element<T>(adapter.fusion, task));
}
template <typename T>
DEVICE float share_of_uv(const Adapter& adapter, int task) {
  return adapter.fusion.data == nullptr ? 1.0f : 1.0f - sigmoid(element<T>(adapter.fusion, task));
}

// The gate of a row; NaN for a row of gate that does not exist.
template <typename T>
DEVICE float gate_of(const Adapter& adapter, int64_t row, int r) {
  if (adapter.gate.data == nullptr) return 1.0f;
  const int i = adapter.gate_row == nullptr ? 0 : adapter.gate_row[row];
  if (i < 0 || i >= adapter.gates) return not_a_number();
  return element<T>(adapter.gate, i * adapter.gate.stride + r);
}

// The rows of a tile, and the tasks among them: kept in shared memory.
template <int kRows>
struct TaskList {
  int ids[kRows];    // of each row; -1 behind the last
  int tasks[kRows];  // those that occur and exist, ascending
  uint8_t tiles[kRows];  // of each of these, a bit for every sixteen rows that have one of it
  uint8_t first[kRows];
  int count;

  DEVICE void fill(const Adapter& adapter, Range rows) {
    __syncthreads();
    const int i = threadIdx.x;
    if (i < kRows) ids[i] = i < rows.count ? task_of(adapter, rows.first + i) : -1;
    if (i == 0) count = 0;
    __syncthreads();
    if (i < kRows) {
      bool is_first = ids[i] >= 0 && ids[i] < adapter.tasks;
      for (int j = 0; j < i && is_first; ++j) is_first = ids[j] != ids[i];
      first[i] = is_first;
    }
    __syncthreads();
    if (i < kRows && first[i]) {
      int below = 0, above = 0;
      uint32_t own = 0;
      for (int j = 0; j < kRows; ++j) {
        own |= static_cast<uint32_t>(ids[j] == ids[i]) << j / 16;
        below += first[j] && ids[j] < ids[i];
        above += first[j] && ids[j] > ids[i];
      }
      tasks[below] = ids[i];
      tiles[below] = static_cast<uint8_t>(own);
      if (above == 0) count = below + 1;
    }
    __syncthreads();
  }

  // What a row without a task gets: nothing; what one whose task does not exist gets: NaN.
  DEVICE bool exists(const Adapter& adapter, int i) const { return ids[i] >= 0 && ids[i] < adapter.tasks; }
  DEVICE float missing(int i) const { return ids[i] < 0 ? 0.0f : not_a_number(); }
};

// Dropout, in place, on the first rows of a tile of x whose first element is (row, column); column is a multiple of 8.
template <int kRows, typename T, int kColumns>
DEVICE void drop(Tile<T, kRows, kColumns> tile, const Adapter& adapter, int64_t row, int column, int rows) {
  const int64_t seed = *adapter.seed;
  for (int i = threadIdx.x; i < rows * kColumns / 8; i += kThreads) {
    const int m = i / (kColumns / 8), block = i % (kColumns / 8);
    const uint32_t keep = keep_bits(seed, row + m, column / 8 + block, adapter.threshold);
    Chunk* chunk = tile.chunk(m, block);
    union {
      Chunk chunk;
      uint16_t halves[kPerChunk];
    } value;
    value.chunk = *chunk;
    UNROLL
    for (int j = 0; j < kPerChunk; ++j) value.halves[j] = keep >> j & 1 ? value.halves[j] : uint16_t{0};
    *chunk = value.chunk;
  }
  publish_shared();
}

// Neighbours of a row that lie at a multiple of their size.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T values[kCount];
};

// Stores neighbours of a row at once.
template <typename T, int kCount>
DEVICE void store_vector(T* to, const float (&values)[kCount]) {
  union {
    T elements[kCount];
    uint32_t words[kCount * sizeof(T) / 4];
  } vector;
  UNROLL
  for (int j = 0; j < kCount; ++j) vector.elements[j] = rounded<T>(values[j]);
  store_words(to, vector.words);
}

// Stores the first `count` of them: at once where these are all, and lie at a multiple of their size.
template <typename T, int kCount>
DEVICE void store(T* to, const float (&values)[kCount], int count) {
  if (count >= kCount && reinterpret_cast<uintptr_t>(to) % (kCount * sizeof(T)) == 0) {
    store_vector(to, values);
  } else {
    UNROLL
    for (int j = 0; j < kCount; ++j) {
      if (j < count) to[j] = rounded<T>(values[j]);
    }
  }
}

// The sums of `splits` partial sums, `stride` elements apart, in order; all loads are under way at once.
template <int kCount>
DEVICE Vector<float, kCount> sum_of_splits(const float* from, int64_t stride, int splits) {
  using Part = Vector<float, kCount>;
  Part parts[kMostSplits] = {};
  UNROLL
  for (int split = 0; split < kMostSplits; ++split) {
    if (split < splits) parts[split] = *reinterpret_cast<const Part*>(from + split * stride);
  }
  UNROLL
  for (int split = 1; split < kMostSplits; ++split) {
    UNROLL
    for (int j = 0; j < kCount; ++j) parts[0].values[j] += parts[split].values[j];
  }
  return parts[0];
}

// Shared memory of a block: a list of tasks, then a panel of whole rows, then the stages of a pipeline.
template <int kRows>
struct Workspace {
  static constexpr int kListBytes = (sizeof(TaskList<kRows>) + 1023) / 1024 * 1024;  // as tiles are aligned

  DEVICE static TaskList<kRows>& list() { return *reinterpret_cast<TaskList<kRows>*>(shared_memory()); }
  DEVICE static Chunk* panel() { return reinterpret_cast<Chunk*>(shared_memory() + kListBytes); }

  HOST_DEVICE static constexpr int panel_chunks(int steps) { return steps * kRows * 8; }

  // How many stages of so many chunks fit behind the panel.
  HOST_DEVICE static int stages(int shared, int panel, int stage) {
    return smaller(kMostStages, (shared - kListBytes - panel * 16) / (stage * 16));
  }
};

}  // namespace lilora
