// From the shares of P = dy B0 and Q = dy U_t: dh, and each row's part of the other gradients. Phase 2 of the backward.
#pragma once

#include "prepare.h"

namespace lilora {

// The sums of the shares of P and Q of a tile of rows lie in shared memory: floats of a row, so that eight rows lie in
// different banks.
HOST_DEVICE constexpr int sums_stride(int width) { return (width + 31) / 32 * 32 + 8; }
HOST_DEVICE constexpr int finish_panel(int width, int steps) {  // in chunks, with the rows of Q
  return kSumRows * (steps * 8 + sums_stride(width) / 4);
}

// From the shares of P and Q: dh of a tile of rows, and what the gradients of v, fusion and gate sum up.
template <typename T>
PART void finish_dh(const Backward& p, int row_tile) {
  constexpr int kM = kSumRows;
  using Tiles = Product<T, kM, 128, false, true>;
  const Adapter& adapter = p.adapter;
  const Range rows = tile_range(row_tile, kM, adapter.rows);
  const int width = adapter.width(), q_width = adapter.q_width(), z_width = padded(adapter.sub_rank);
  TaskList<kM>& list = Workspace<kM>::list();
  list.fill(adapter, rows);
  const int steps = static_cast<int>(ceil_div(z_width, kDepth)), stride = sums_stride(width);
  const int panel = finish_panel(width, steps);
  float* sums = reinterpret_cast<float*>(Workspace<kM>::panel() + Workspace<kM>::panel_chunks(steps));  // [kM, stride]
  Chunk* stage_memory = Workspace<kM>::panel() + panel;
  float* row_sums = reinterpret_cast<float*>(stage_memory);  // [kM, kWarpsN], between products
  const int stages = Workspace<kM>::stages(p.launch.shared, panel, Tiles::kChunksB);
  auto panel_at = [&](int k) { return typename Tiles::A{Workspace<kM>::panel() + Workspace<kM>::panel_chunks(k)}; };
  auto right_at = [&](int stage) { return typename Tiles::B{stage_memory + stage * Tiles::kChunksB}; };

  for (int at = threadIdx.x; at < kM * width / 4; at += kThreads) {
    const int i = at / (width / 4), column = at % (width / 4) * 4;
    Vector<float, 4> sum = {};
    if (i < rows.count && list.exists(adapter, i)) {  // others have none
      sum = sum_of_splits<4>(p.partials + (rows.first + i) * width + column, adapter.rows * width, p.splits);
    }
    *reinterpret_cast<Vector<float, 4>*>(sums + i * stride + column) = sum;
  }
  __syncthreads();

  // Q in the type of activations, and s e Q for dV.
  for (int at = threadIdx.x; at < kM * steps * kDepth; at += kThreads) {
    const int i = at / (steps * kDepth), s = at % (steps * kDepth);
    const float q_u = s < z_width ? sums[i * stride + q_width + s] : 0.0f;
    panel_at(s / kDepth).at(i, s % kDepth) = rounded<T>(q_u);
    if (p.seq != nullptr && i < rows.count && s < z_width) {
      const float e = list.exists(adapter, i) ? share_of_uv<T>(adapter, list.ids[i]) : 0.0f;
      static_cast<T*>(p.seq)[(rows.first + i) * z_width + s] = rounded<T>(adapter.scaling * e * q_u);
    }
  }
  // Rows without a task that exists.
  for (int at = threadIdx.x; at < rows.count * q_width; at += kThreads) {
    const int i = at / q_width, r = at % q_width;
    if (list.exists(adapter, i)) continue;
    const float missing = list.missing(i);
    static_cast<T*>(p.dh)[(rows.first + i) * q_width + r] = rounded<T>(r < adapter.rank ? missing : 0.0f);
    if (p.dq_h != nullptr && r < adapter.rank) p.dq_h[(rows.first + i) * adapter.rank + r] = missing;
  }
  __syncthreads();

  for (int task = 0; task < list.count; ++task) {
    const int id = list.tasks[task];
    const float f = share_of_b0<T>(adapter, id), e = share_of_uv<T>(adapter, id);
    float dfusion[Tiles::kTilesM][2] = {};
    for (int first = 0; first < q_width; first += 128) {
      Tiles product;
      product.clear();
      pipeline(
          steps, stages,
          [&](int step, int stage) {
            const int s = step * kDepth;
            load_tile<kDepth>(right_at(stage), adapter.v, int64_t{id} * adapter.sub_rank + s, adapter.sub_rank - s,
                                 first, adapter.rank - first);
          },
          [&](int step, int stage) { product.step(panel_at(step), right_at(stage), adapter.rank - first); });
      UNROLL
      for (int m = 0; m < Tiles::kTilesM; ++m) {
        UNROLL
        for (int half = 0; half < 2; ++half) {
          const int i = Tiles::row(m, half);
          if (list.ids[i] != id) continue;
          const int64_t row = rows.first + i;
          UNROLL
          for (int j = 0; j < Tiles::kTilesN; ++j) {
            const int r = first + Tiles::column(j);
            if (r >= q_width) continue;  // the width is even
            UNROLL
            for (int next = 0; next < 2; ++next) {
              const int at = r + next;
              float& value = product.c[m][j][2 * half + next];
              const float b0_part = sums[i * stride + at], uv_part = value;
              const float dq = adapter.scaling * (f * b0_part + e * uv_part);
              value = 0;
              if (at < adapter.rank) {
                if (p.dfusion_rows != nullptr) {
                  dfusion[m][half] += (b0_part - uv_part) * to_float(static_cast<const T*>(p.q)[row * q_width + at]);
                }
                if (p.dq_h != nullptr) {
                  p.dq_h[row * adapter.rank + at] = dq * element<T>(p.h, row * p.h.stride + at);
                }
                value = dq * gate_of<T>(adapter, row, at);
              }
            }
          }
        }
      }
      product.template for_each<8>([&](int i, int r, float (&dh)[8]) {
        if (list.ids[i] == id && first + r < q_width) {
          store_vector(static_cast<T*>(p.dh) + (rows.first + i) * q_width + first + r, dh);
        }
      });
    }
    if (p.dfusion_rows == nullptr) continue;
    UNROLL
    for (int m = 0; m < Tiles::kTilesM; ++m) {
      UNROLL
      for (int half = 0; half < 2; ++half) {
        const float of_warp = sum_of_four(dfusion[m][half]);
        row_sums[Tiles::row(m, half) * Tiles::kWarpsN + threadIdx.x / 32 % Tiles::kWarpsN] = of_warp;
      }
    }
    __syncthreads();
    if (const int i = threadIdx.x; i < kM && list.ids[i] == id) {
      float total = 0;
      for (int warp = 0; warp < Tiles::kWarpsN; ++warp) total += row_sums[i * Tiles::kWarpsN + warp];
      p.dfusion_rows[rows.first + i] = adapter.scaling * f * e * total;
    }
    __syncthreads();
  }
}

}  // namespace lilora
