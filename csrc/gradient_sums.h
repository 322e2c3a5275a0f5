// Sums over rows and over shares, in an order that nothing changes: dfusion and dgate of the backward's phase 3, and phase 4.
#pragma once

#include "adapter.h"

namespace lilora {

constexpr int kGateColumns = 32;            // of an item of dgate
constexpr int kSumElements = 8 * kThreads;  // of an item of phase 4

template <typename T>
DEVICE void store_gradient(void* to, bool wide, int64_t at, float value) {
  if (wide) {
    static_cast<float*>(to)[at] = value;
  } else {
    static_cast<T*>(to)[at] = rounded<T>(value);
  }
}

// The sum of one number of each thread, by halves; thread 0 gets it.
DEVICE float block_sum(float value) {
  float* values = reinterpret_cast<float*>(shared_memory());
  __syncthreads();
  values[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) values[threadIdx.x] += values[threadIdx.x + half];
    __syncthreads();
  }
  return values[0];
}

// The sum of value(row) over rows first, first + step, ... that are wanted, in order, with several loads under way.
template <typename Wanted, typename Value>
DEVICE float sum_of_rows(int64_t first, int step, int64_t rows, Wanted wanted, Value value) {
  float sum = 0;
  for (int64_t row = first; row < rows; row += kMostSplits * step) {
    float values[kMostSplits] = {};
    UNROLL
    for (int i = 0; i < kMostSplits; ++i) {
      if (row + i * step < rows && wanted(row + i * step)) values[i] = value(row + i * step);
    }
    UNROLL
    for (int i = 0; i < kMostSplits; ++i) sum += values[i];
  }
  return sum;
}

template <typename T>
PART void fusion_gradient(const Backward& p, int task) {
  const float sum = block_sum(sum_of_rows(
      threadIdx.x, kThreads, p.adapter.rows, [&](int64_t row) { return task_of(p.adapter, row) == task; },
      [&](int64_t row) { return p.dfusion_rows[row]; }));
  if (threadIdx.x == 0) store_gradient<T>(p.dfusion, p.wide_fusion, task, sum);
}

template <typename T>
PART void gate_gradient(const Backward& p, int gate, int column_tile) {
  const Adapter& adapter = p.adapter;
  constexpr int kLines = kThreads / kGateColumns;
  const int line = threadIdx.x / kGateColumns, column = threadIdx.x % kGateColumns;
  const int r = column_tile * kGateColumns + column;
  float sum = 0;
  if (r < adapter.rank) {
    sum = sum_of_rows(
        line, kLines, adapter.rows,
        [&](int64_t row) { return adapter.gate_row == nullptr || adapter.gate_row[row] == gate; },
        [&](int64_t row) { return p.dq_h[row * adapter.rank + r]; });
  }
  float* values = reinterpret_cast<float*>(shared_memory());
  __syncthreads();
  values[threadIdx.x] = sum;
  __syncthreads();
  if (line == 0 && r < adapter.rank) {
    for (int other = 1; other < kLines; ++other) sum += values[other * kGateColumns + column];
    store_gradient<T>(p.dgate, p.wide_gate, int64_t{gate} * adapter.rank + r, sum);
  }
  __syncthreads();
}

// out [T, size] is the sum over the chunks of partials [chunks, T, share]; those of tasks without rows were never written.
struct Sum {
  const float* partials;
  int64_t share;
  void* out;
  bool wide, by_task;
  int64_t size;
};

template <typename T>
DEVICE void sum_partials(const Backward& p, int item) {
  const Items& items = p.counts;
  const int64_t k = p.adapter.columns, n = p.adapter.outputs, r = p.adapter.rank, s = p.adapter.sub_rank;
  Sum of = {p.da_partials, p.a_share, p.da, p.wide_a, false, r * k};
  if (item >= items.a_sums) {
    of = {p.db0_partials, p.b0_share, p.db0, p.wide_b0, false, n * r};
    item -= items.a_sums;
    if (item >= items.b0_sums) {
      of = {p.du_partials, p.u_share, p.du, p.wide_u, true, n * s};
      item -= items.b0_sums;
      if (item >= items.u_sums) {
        of = {p.dv_partials, p.v_share, p.dv, p.wide_v, true, s * r};
        item -= items.u_sums;
      }
    }
  }
  const int tasks = of.by_task ? p.adapter.tasks : 1;
  const int64_t size = of.size;
  const int chunks = static_cast<int>(ceil_div(p.adapter.rows, p.chunk));
  const int64_t per_task = ceil_div(size, kSumElements), task = item / per_task, first = item % per_task * kSumElements;
  NO_UNROLL
  for (int64_t at = first + 4 * threadIdx.x; at < size && at < first + kSumElements; at += 4 * kThreads) {
    Vector<float, 4> sum = {};
    NO_UNROLL
    for (int chunk = 0; chunk < chunks; chunk += kMostSplits) {
      Vector<float, 4> parts[kMostSplits] = {};
      UNROLL
      for (int i = 0; i < kMostSplits; ++i) {
        const int64_t partial = (chunk + int64_t{i}) * tasks + task;
        if (chunk + i >= chunks || (of.by_task && p.spans[2 * partial + 1] < p.spans[2 * partial])) continue;
        parts[i] = *reinterpret_cast<const Vector<float, 4>*>(of.partials + partial * of.share + at);
      }
      UNROLL
      for (int i = 0; i < kMostSplits; ++i) {
        UNROLL
        for (int j = 0; j < 4; ++j) sum.values[j] += parts[i].values[j];
      }
    }
    const int64_t to = task * size + at;
    const int count = static_cast<int>(size - at < 4 ? size - at : 4);
    if (of.wide) {
      store(static_cast<float*>(of.out) + to, sum.values, count);
    } else {
      store(static_cast<T*>(of.out) + to, sum.values, count);
    }
  }
}

}  // namespace lilora
