// The forward of `delta`: y = bias + s (f q B0^T + z U_t^T), h = D(x) A^T, q = h * g, z = e q V_t^T; and for few rows
// the base product x W^T as well.
//
// Phase 0  shares of h, and of x W^T
// Phase 1  h, q and z of tiles of rows
// Phase 2  y by tiles of rows and of outputs
#include "plan.h"
#include "prepare.h"

namespace lilora {

constexpr int kTileN = 128;
constexpr int kFewRows = 64;  // of a tile of a call of few rows: one tile, so that the base's weight is read once

// A share of the columns of x: of h = D(x) A^T, or of the base product x W^T.
template <typename T, int kM>
PART void product_share(const Forward& p, bool base, Coordinates at) {
  using Tiles = Product<T, kM, kTileN, false, false>;
  const Adapter& adapter = p.adapter;
  const Matrix& right = base ? p.weight : adapter.a;
  const int rights = base ? adapter.outputs : adapter.rank, share = at.third;
  const int stride = padded(rights);
  float* partials = base ? p.base_partials : p.partials;
  const bool dropped = !base && adapter.seed != nullptr;
  const Range rows = tile_range(at.first, kM, adapter.rows), columns = tile_range(at.second, kTileN, rights);
  const int filled = whole_tiles(rows.count);
  const Range depth = share_range(share, base ? p.base_splits : p.splits, kDepth, adapter.columns);
  Chunk* stage_memory = Workspace<kM>::panel();
  const int stages = Workspace<kM>::stages(p.launch.shared, 0, Tiles::kChunksA + Tiles::kChunksB);
  auto left_at = [&](int stage) { return typename Tiles::A{stage_memory + stage * (Tiles::kChunksA + Tiles::kChunksB)}; };
  auto right_at = [&](int stage) { return typename Tiles::B{left_at(stage).data + Tiles::kChunksA}; };
  Tiles product;
  product.clear();
  pipeline(
      (depth.count + kDepth - 1) / kDepth, stages,
      [&](int step, int stage) {
        const int64_t k = depth.first + step * kDepth;
        const int left = depth.count - step * kDepth;
        load_tile<kM>(left_at(stage), p.x, rows.first, rows.count, k, left, filled);
        load_tile<kTileN>(right_at(stage), right, columns.first, columns.count, k, left);
      },
      [&](int step, int stage) {
        if (dropped) {
          drop(left_at(stage), adapter, rows.first, static_cast<int>(depth.first) + step * kDepth, filled);
          __syncthreads();
        }
        product.step(left_at(stage), right_at(stage), columns.count, tiles_below(filled));
      });
  float* const to = partials + (share * adapter.rows + rows.first) * stride + columns.first;
  const int stored = stride - static_cast<int>(columns.first);
  product.template for_each<4>([&](int i, int j, float (&values)[4]) {
    if (i < rows.count && j < stored) store_vector(to + int64_t{i} * stride + j, values);
  });
}

template <typename T, int kM, bool kBase>
PART void expand(const Forward& p, int row_tile, int group) {
  using Tiles = Product<T, kM, kTileN, false, false>;
  const Adapter& adapter = p.adapter;
  const Range rows = tile_range(row_tile, kM, adapter.rows);
  const Range tiles = share_range(group, p.groups, 1, static_cast<int>(ceil_div(adapter.outputs, kTileN)));
  if (tiles.count <= 0) return;
  TaskList<kM>& list = Workspace<kM>::list();
  list.fill(adapter, rows);

  const int q_steps = static_cast<int>(ceil_div(adapter.q_width(), kDepth));
  const int z_steps = static_cast<int>(ceil_div(padded(adapter.sub_rank), kDepth));
  const int panel = Workspace<kM>::panel_chunks(q_steps + z_steps);
  Chunk* stage_memory = Workspace<kM>::panel() + panel;
  const int stages = Workspace<kM>::stages(p.launch.shared, panel, Tiles::kChunksB);
  auto panel_at = [&](int k) { return typename Tiles::A{Workspace<kM>::panel() + Workspace<kM>::panel_chunks(k)}; };
  auto right_at = [&](int stage) { return typename Tiles::B{stage_memory + stage * Tiles::kChunksB}; };

  // The rows of [q | z] stay; the tiles of parameters pass by.
  const Matrix qz = {p.qz, adapter.width(), true};
  const int filled = whole_tiles(rows.count);
  for (int k = 0; k < q_steps; ++k) {
    load_tile<kM>(panel_at(k), qz, rows.first, rows.count, k * kDepth, adapter.q_width() - k * kDepth,
                  filled);
  }
  for (int k = 0; k < z_steps; ++k) {
    load_tile<kM>(panel_at(q_steps + k), qz, rows.first, rows.count, adapter.q_width() + k * kDepth,
                  padded(adapter.sub_rank) - k * kDepth, filled);
  }
  commit_copies();

  // Where a tile of rows has several tasks each takes a pass of its own, whose result only its rows keep: so a row gets
  // the same sum in any company, and what is not finite in one task's factors stays there. Small tiles may have as many
  // tasks as rows: they keep the product with B0 between the passes.
  constexpr bool kKeep = kM == kFewRows;
  const int passes = larger(list.count, 1);
  const int again = kKeep ? z_steps : q_steps + z_steps;  // steps of each pass but the first
  const int steps = q_steps + z_steps + (passes - 1) * again;  // of one tile of outputs
  struct Position {
    Range columns;
    int pass, k;
  };
  auto position = [&](int step) -> Position {
    const Range columns = tile_range(static_cast<int>(tiles.first) + step / steps, kTileN, adapter.outputs);
    const int first = step % steps, later = first - q_steps - z_steps;
    if (later < 0) return {columns, 0, first};
    return {columns, 1 + later / again, (kKeep ? q_steps : 0) + later % again};
  };
  const int64_t base_width = padded(adapter.outputs);
  Tiles product, kept;
  product.clear();  // without a value it would take its registers in the whole kernel
  pipeline(
      tiles.count * steps, stages,
      [&](int step, int stage) {
        const Position at = position(step);
        if (at.k < q_steps) {
          load_tile<kTileN>(right_at(stage), adapter.b0, at.columns.first, at.columns.count, at.k * kDepth,
                            adapter.rank - at.k * kDepth);
        } else {
          // Without a task in the tile its rows take nothing of this.
          const int64_t task = list.count > 0 ? list.tasks[at.pass] : 0;
          const int s = (at.k - q_steps) * kDepth;
          load_tile<kTileN>(right_at(stage), adapter.u, task * adapter.outputs + at.columns.first,
                            list.count > 0 ? at.columns.count : 0, s, adapter.sub_rank - s);
        }
      },
      [&](int step, int stage) {
        const Position at = position(step);
        if (at.k == 0) product.clear();
        if (kKeep && at.pass > 0 && at.k == q_steps) product = kept;
        const bool for_all = kKeep && at.k < q_steps;  // else only the rows of the task are kept
        product.step(panel_at(at.k), right_at(stage), at.columns.count,
                     for_all ? tiles_below(filled) : list.count > 0 ? list.tiles[at.pass] : 0);
        if (at.k == q_steps - 1 && adapter.fusion.data != nullptr) {
          UNROLL
          for (int i = 0; i < Tiles::kTilesM; ++i) {
            UNROLL
            for (int half = 0; half < 2; ++half) {
              const int row = Tiles::row(i, half);
              const float f = list.exists(adapter, row) ? share_of_b0<T>(adapter, list.ids[row]) : 1.0f;
              UNROLL
              for (int j = 0; j < Tiles::kTilesN; ++j) {
                product.c[i][j][2 * half] *= f;
                product.c[i][j][2 * half + 1] *= f;
              }
            }
          }
        }
        if (kKeep && at.k == q_steps - 1) kept = product;
        if (at.k != q_steps + z_steps - 1) return;
        product.template for_each<8>([&](int i, int j, float (&values)[8]) {
          const bool exists = list.exists(adapter, i);
          if (i >= rows.count || j >= at.columns.count || (exists ? list.ids[i] != list.tasks[at.pass] : at.pass > 0)) return;
          const int64_t row = rows.first + i, column = at.columns.first + j;
          const int count = at.columns.count - j;
          Vector<float, 8> base = {};
          if (kBase && p.base_splits > 0) {
            base = sum_of_splits<8>(p.base_partials + row * base_width + column, adapter.rows * base_width, p.base_splits);
          }
          UNROLL
          for (int e = 0; e < 8; ++e) {
            values[e] = exists ? values[e] * adapter.scaling : list.missing(i);
            values[e] += base.values[e];
            if (p.bias.data != nullptr && e < count) values[e] += element<T>(p.bias, column + e);
          }
          store(static_cast<T*>(p.y) + row * adapter.outputs + column, values, count);
        });
      });
}

template <typename T, int kM, bool kBase>
DEVICE void run_item(const Forward& p, int phase, int item) {
  const Adapter& adapter = p.adapter;
  if (phase == 0) {
    const bool base = item >= p.shrinks();
    product_share<T, kM>(p, base, base ? coordinates(item - p.shrinks(), p.output_tiles, p.base_splits)
                                       : coordinates(item, p.rank_tiles, p.splits));
  } else if (phase == 1) {
    T* qz = static_cast<T*>(p.qz);
    T* q = static_cast<T*>(p.q);
    const bool fused = q != nullptr;
    prepare<T>({&adapter, p.partials, p.splits, static_cast<T*>(p.h), fused ? qz : nullptr, fused ? q : qz,
                fused ? adapter.q_width() : adapter.width(), qz + adapter.q_width(), adapter.width(),
                fused ? adapter.scaling : 1.0f, p.launch.shared},
               item);
  } else {
    const Coordinates at = coordinates(item, 1, p.groups);
    expand<T, kM, kBase>(p, at.first, at.third);
  }
}

// Blocks of a processor at once, as far as registers go.
constexpr int blocks_of(int tile_rows, int phase) {
  return phase == 0 || phase == 1 || (phase == 2 && tile_rows == kManyRows && kHasWgmma) ? 2 : 1;
}

template <typename T, int kM, int kPhase>
KERNEL(kThreads, blocks_of(kM, kPhase))
delta_forward(const KERNEL_PARAMETER Forward p) {
  constexpr bool kBase = kM == kFewRows && kPhase != kAll;
  run_launch<kPhase>(p, [&](int phase, int item) { run_item<T, kM, kBase>(p, phase, item); });
}

std::string missing_code_on_current_device() { return missing_code(&delta_forward<Half, kFewRows, kAll>); }

std::array<Need, 3> needs_of(const Forward& p, int tile_rows) {
  const int steps = panel_steps(p.adapter.rank, p.adapter.sub_rank);
  return {{{0, (tile_rows + kTileN) * 8}, {0, (kSumRows + 128) * 8}, {steps * tile_rows * 8, kTileN * 8}}};
}

Kernels<Forward> kernels_of(const Forward& p, Type type) {
  return instantiation<kFewRows>(type, p.launch.tile_rows, [&](auto t, auto rows) -> Kernels<Forward> {
    using T = decltype(t);
    constexpr int kM = decltype(rows)::value;
    // Phase 1 has tiles of its own.
    return {{&delta_forward<T, kM, 0>, &delta_forward<T, kManyRows, 1>, &delta_forward<T, kM, 2>},
            &delta_forward<T, kM, kAll>,
            needs_of(p, kM)};
  });
}

void plan(Forward& p, Type type, bool one_launch) {
  const Adapter& adapter = p.adapter;
  const bool base = p.weight.data != nullptr;
  const bool many = adapter.rows > kFewRowsUpTo && !base && bytes_for(needs_of(p, kManyRows), 2) <= largest_shared_memory();
  p.launch.tile_rows = many ? kManyRows : kFewRows;
  const Kernels<Forward> kernels = kernels_of(p, type);
  p.row_tiles = static_cast<int>(ceil_div(adapter.rows, p.launch.tile_rows));
  p.sum_tiles = static_cast<int>(ceil_div(adapter.rows, kSumRows));
  p.rank_tiles = static_cast<int>(ceil_div(adapter.rank, kTileN));
  p.output_tiles = static_cast<int>(ceil_div(adapter.outputs, kTileN));
  const int blocks = processors(), depth = static_cast<int>(ceil_div(adapter.columns, kDepth));
  const int base_tiles = base ? p.row_tiles * p.output_tiles : 0;
  p.splits = shares_for(p.row_tiles * p.rank_tiles, blocks, depth, 2, kMostSplits);
  p.base_splits = base ? shares_for(base_tiles, blocks, depth, 8, kMostSplits) : 0;
  const int at_once = one_launch ? kernels.all().blocks() : kernels.phase(2).blocks();
  p.groups = shares_for(p.row_tiles, at_once, p.output_tiles, 1, p.output_tiles);
}

void run(const Forward& p, Type type, bool one_launch, Stream stream) { kernels_of(p, type).run(p, one_launch, stream); }

}  // namespace lilora
