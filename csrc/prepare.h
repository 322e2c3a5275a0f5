// q = h * g, f q and z = e q V_t^T of a tile of rows: a phase of both directions.
#pragma once

#include "adapter.h"

namespace lilora {

constexpr int kSumRows = 16;  // of a tile in the phases that add partial sums: few, so that all processors have one

template <typename T>
struct Prepare {
  const Adapter* adapter;
  const float* partials;  // [splits, M, q_width] shares of h; null where h is given
  int splits;
  T* h;       // [M, R]: written where there are partials, read otherwise
  T* fq;      // scale f q in rows of `stride`, or null
  T* q;       // q in rows of q_stride
  int q_stride;
  T* z;       // scale e q V_t^T in rows of `stride`
  int stride;
  float scale;
  int shared;
};

template <typename T>
PART void prepare(const Prepare<T>& p, int row_tile) {
  constexpr int kM = kSumRows;
  using Tiles = Product<T, kM, 128, false, false>;
  const Adapter& adapter = *p.adapter;
  const Range rows = tile_range(row_tile, kM, adapter.rows);
  const int width = adapter.q_width();
  TaskList<kM>& list = Workspace<kM>::list();
  list.fill(adapter, rows);
  for (int at = threadIdx.x; at < rows.count * width / 4; at += kThreads) {
    const int i = at / (width / 4), r = at % (width / 4) * 4;
    const int64_t row = rows.first + i;
    const int count = smaller(4, adapter.rank - r);  // below 1 in the padding
    Vector<T, 4> h, q, fq;
    float gate[4];
    Vector<float, 4> sum = {};
    if (p.partials != nullptr) {
      sum = sum_of_splits<4>(p.partials + row * width + r, adapter.rows * width, p.splits);
      UNROLL
      for (float& value : sum.values) value *= adapter.keep_scale;
      store(p.h + row * adapter.rank + r, sum.values, count);
    }
    UNROLL
    for (int j = 0; j < 4; ++j) {
      h.values[j] = p.partials != nullptr || j >= count ? rounded<T>(sum.values[j]) : p.h[row * adapter.rank + r + j];
      gate[j] = j < count ? gate_of<T>(adapter, row, r + j) : 0.0f;
    }
    const bool exists = p.fq != nullptr && list.exists(adapter, i);
    const float f = exists ? p.scale * share_of_b0<T>(adapter, list.ids[i]) : 0.0f;
    UNROLL
    for (int j = 0; j < 4; ++j) {
      q.values[j] = j >= count ? rounded<T>(0.0f)
                    : adapter.gate.data == nullptr ? h.values[j] : rounded<T>(to_float(h.values[j]) * gate[j]);
      fq.values[j] = rounded<T>(exists ? f * to_float(q.values[j]) : 0.0f);  // 0 times infinity is NaN
    }
    *reinterpret_cast<Vector<T, 4>*>(p.q + row * p.q_stride + r) = q;
    if (p.fq != nullptr) *reinterpret_cast<Vector<T, 4>*>(p.fq + row * p.stride + r) = fq;
  }
  if (adapter.sub_rank == 0) return;
  __syncthreads();

  Chunk* stage_memory = Workspace<kM>::panel();
  const int stages = Workspace<kM>::stages(p.shared, 0, Tiles::kChunksA + Tiles::kChunksB);
  auto left_at = [&](int stage) { return typename Tiles::A{stage_memory + stage * (Tiles::kChunksA + Tiles::kChunksB)}; };
  auto right_at = [&](int stage) { return typename Tiles::B{left_at(stage).data + Tiles::kChunksA}; };
  const Matrix left = {p.q, p.q_stride, true};
  for (int task = 0; task < list.count; ++task) {
    const int id = list.tasks[task];
    Tiles product;
    product.clear();
    pipeline(
        (width + kDepth - 1) / kDepth, stages,
        [&](int step, int stage) {
          const int r = step * kDepth;
          load_tile<kM>(left_at(stage), left, rows.first, rows.count, r, width - r);
          load_tile<128>(right_at(stage), adapter.v, int64_t{id} * adapter.sub_rank, adapter.sub_rank, r,
                         adapter.rank - r);
        },
        [&](int, int stage) { product.step(left_at(stage), right_at(stage), adapter.sub_rank); });
    const float e = p.scale * share_of_uv<T>(adapter, id);
    T* const z = p.z + rows.first * p.stride;
    product.template for_each<8>([&](int i, int s, float (&values)[8]) {
      if (i >= rows.count || list.ids[i] != id || s >= padded(adapter.sub_rank)) return;
      UNROLL
      for (float& value : values) value *= e;
      store_vector(z + i * p.stride + s, values);
    });
  }
}

}  // namespace lilora
