// The backward of `delta`, from dy, x and h.
//
// Phase 0  f q and z of tiles of rows again, and where the tasks of each chunk of rows lie
// Phase 1  all that reads dy: shares of P = dy B0 and Q = dy U_t; shares of dB0 and dU_t
// Phase 2  dh of tiles of rows, and each row's part of the other gradients
// Phase 3  dx, and all that reads x: shares of dA; shares of dV_t; dfusion and dgate
// Phase 4  the sums of the shares of dA, dB0, dU_t and dV_t, in order
#include "finish_dh.h"
#include "gradient_sums.h"
#include "plan.h"
#include "prepare.h"

namespace lilora {

constexpr int kFewRows = 16;  // of a tile of a call of few rows
constexpr int kOuterM = 128;  // rows of a tile of a product that sums over rows
constexpr int kOuterN = 192;  // columns of such a tile
constexpr int kDxN = 128;     // columns of a tile of dx

// Columns of a tile of [P | Q].
HOST_DEVICE constexpr int wide_columns(int tile_rows) { return tile_rows == kManyRows ? 192 : 256; }
template <int kM>
constexpr int kWide = wide_columns(kM);

DEVICE Range chunk_rows(const Backward& p, int chunk) { return tile_range(chunk, p.chunk, p.adapter.rows); }

// spans[chunk, task]: the first and the last row of a task in a chunk.
PART void find_spans(const Backward& p, int chunk) {
  const Adapter& adapter = p.adapter;
  const Range rows = chunk_rows(p, chunk);
  int* spans = p.spans + static_cast<int64_t>(chunk) * adapter.tasks * 2;
  for (int t = threadIdx.x; t < adapter.tasks; t += kThreads) {
    spans[2 * t] = rows.count;
    spans[2 * t + 1] = -1;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows.count; i += kThreads) {
    const int id = task_of(adapter, rows.first + i);
    if (id < 0 || id >= adapter.tasks) continue;
    // Rows of a task mostly follow each other: only the ends of a run can be the first or the last.
    if (i == 0 || task_of(adapter, rows.first + i - 1) != id) atomicMin(spans + 2 * id, i);
    if (i == rows.count - 1 || task_of(adapter, rows.first + i + 1) != id) atomicMax(spans + 2 * id + 1, i);
  }
}

// A share of P = dy B0 and Q = dy U_t of a tile of rows, over some of the outputs.
template <typename T, int kM>
PART void shrink_dy(const Backward& p, int row_tile, int column_tile, int split) {
  using Tiles = Product<T, kM, kWide<kM>, false, true>;
  const Adapter& adapter = p.adapter;
  const Range rows = tile_range(row_tile, kM, adapter.rows);
  if (rows.count <= 0) return;
  TaskList<kM>& list = Workspace<kM>::list();
  list.fill(adapter, rows);
  const Range columns = tile_range(column_tile, kWide<kM>, adapter.width());
  const Range depth = share_range(split, p.splits, kDepth, adapter.outputs);
  Chunk* stage_memory = Workspace<kM>::panel();
  const int stages = Workspace<kM>::stages(p.launch.shared, 0, Tiles::kChunksA + Tiles::kChunksB);
  auto left_at = [&](int stage) { return typename Tiles::A{stage_memory + stage * (Tiles::kChunksA + Tiles::kChunksB)}; };
  auto right_at = [&](int stage) { return typename Tiles::B{left_at(stage).data + Tiles::kChunksA}; };
  for (int at = 0; at < list.count; ++at) {
    const int id = list.tasks[at];
    Tiles product;
    product.clear();
    pipeline(
        (depth.count + kDepth - 1) / kDepth, stages,
        [&](int step, int stage) {
          const int64_t n = depth.first + step * kDepth;
          const int left = depth.count - step * kDepth;
          load_tile<kM>(left_at(stage), p.dy, rows.first, rows.count, n, left);
          for_each_chunk<kDepth>(right_at(stage), [&](Chunk* to, int i, int j) {
            const int64_t r = columns.first + j, s = r - adapter.q_width();
            if (s < 0) {
              load_chunk<T>(to, adapter.b0, n + i, r, i < left ? adapter.rank - static_cast<int>(r) : 0);
            } else {
              load_chunk<T>(to, adapter.u, int64_t{id} * adapter.outputs + n + i, s,
                            i < left ? adapter.sub_rank - static_cast<int>(s) : 0);
            }
          });
        },
        [&](int, int stage) { product.step(left_at(stage), right_at(stage), columns.count); });
    const int width = adapter.width();
    float* const to = p.partials + (split * adapter.rows + rows.first) * width + columns.first;
    product.template for_each<4>([&](int i, int j, float (&values)[4]) {
      if (list.ids[i] == id && j < columns.count) {  // the width is a multiple of eight
        store_vector(to + int64_t{i} * width + j, values);
      }
    });
  }
}

// Products that sum over the rows of a chunk, left^T right: which gradients they are shares of.
enum class Outer { kUp, kDown, kV };  // dy^T [f q | e z] -> dB0 and dU_t; dh^T D(x) -> dA; (s e Q)^T q -> dV_t

template <typename T, int kM>
PART void outer_product(const Backward& p, Outer kind, int chunk, int left_tile, int right_tile) {
  using Tiles = Product<T, kOuterM, kOuterN, true, true>;
  const Adapter& adapter = p.adapter;
  const bool up = kind == Outer::kUp, down = kind == Outer::kDown;
  const int width = up ? adapter.width() : adapter.q_width(), z_width = padded(adapter.sub_rank);
  const Matrix left = up ? p.dy : Matrix{down ? p.dh : p.seq, down ? width : z_width, true};
  const Matrix right = down ? p.x : Matrix{up ? p.fqz : p.q, width, true};
  // The rows of C are outputs, ranks or ranks of V; for dV_t, left_tile is the task.
  const Range lefts = tile_range(kind == Outer::kV ? 0 : left_tile, kOuterM,
                                 up ? adapter.outputs : down ? adapter.rank : adapter.sub_rank);
  const Range rights = tile_range(right_tile, kOuterN, up ? width : down ? adapter.columns : adapter.rank);
  const Range rows = chunk_rows(p, chunk);
  const int* spans = p.spans + static_cast<int64_t>(chunk) * adapter.tasks * 2;
  const int first_task = kind == Outer::kV ? left_tile : 0, last_task = up ? adapter.tasks - 1 : first_task;

  Chunk* stage_memory = Workspace<kM>::panel();
  const int stages = Workspace<kM>::stages(p.launch.shared, 0, Tiles::kChunksA + Tiles::kChunksB);
  auto left_at = [&](int stage) { return typename Tiles::A{stage_memory + stage * (Tiles::kChunksA + Tiles::kChunksB)}; };
  auto right_at = [&](int stage) { return typename Tiles::B{left_at(stage).data + Tiles::kChunksA}; };
  Tiles product;
  product.clear();
  NO_UNROLL
  for (int task = first_task; task <= last_task; ++task) {
    const int low = down ? 0 : spans[2 * task], count = down ? rows.count : spans[2 * task + 1] - low + 1;
    if (count <= 0) continue;
    pipeline(
        (count + kDepth - 1) / kDepth, stages,
        [&](int step, int stage) {
          const int64_t row = rows.first + low + step * kDepth;
          const int in = count - step * kDepth;
          auto mine = [&](int i) { return down || task_of(adapter, row + i) == task; };
          load_rows<kDepth>(left_at(stage), left, row, in, lefts.first, lefts.count, mine);
          load_rows<kDepth>(right_at(stage), right, row, in, rights.first, rights.count, mine);
        },
        [&](int step, int stage) {
          if (down && adapter.seed != nullptr) {
            drop(right_at(stage), adapter, rows.first + step * kDepth, static_cast<int>(rights.first), kDepth);
            __syncthreads();
          }
          product.step(left_at(stage), right_at(stage), rights.count);
        });
    if (!up || p.du_partials == nullptr) continue;
    float* const share = p.du_partials + (int64_t{chunk} * adapter.tasks + task) * p.u_share + lefts.first * adapter.sub_rank;
    product.template for_each<4>([&](int i, int j, float (&values)[4]) {
      const int s = static_cast<int>(rights.first) + j - adapter.q_width();
      if (s < 0 || s >= adapter.sub_rank || i >= lefts.count) return;
      UNROLL
      for (float& value : values) value *= adapter.scaling;
      store(share + int64_t{i} * adapter.sub_rank + s, values, adapter.sub_rank - s);
    });
    product.clear_columns(adapter.q_width() - static_cast<int>(rights.first));
  }

  float* const to = up ? p.db0_partials : down ? p.da_partials : p.dv_partials;
  if (to == nullptr || (kind == Outer::kV && spans[2 * first_task + 1] < spans[2 * first_task])) return;
  const int columns = down ? adapter.columns : adapter.rank;
  const int64_t partial = kind == Outer::kV ? int64_t{chunk} * adapter.tasks + first_task : chunk;
  float* const share = to + partial * (up ? p.b0_share : down ? p.a_share : p.v_share) + lefts.first * columns + rights.first;
  const float scale = up ? adapter.scaling : down ? adapter.keep_scale : 1.0f;
  product.template for_each<4>([&](int i, int j, float (&values)[4]) {
    const int row = static_cast<int>(lefts.first) + i, column = static_cast<int>(rights.first) + j;
    if (i >= lefts.count || column >= columns) return;
    UNROLL
    for (int e = 0; e < 4; ++e) {
      // Ranks outside of the wanted ones get zeros, whatever the product is.
      const int rank = down ? row : column + e;
      values[e] = kind == Outer::kV || (rank >= p.low_rank && rank < p.high_rank) ? scale * values[e] : 0.0f;
    }
    store(share + int64_t{i} * columns + j, values, columns - column);
  });
}

// dx = D'(dh A) of a tile of rows and some tiles of columns.
template <typename T, int kM>
PART void input_gradient(const Backward& p, int row_tile, int group) {
  using Tiles = Product<T, kM, kDxN, false, true>;
  const Adapter& adapter = p.adapter;
  const Range rows = tile_range(row_tile, kM, adapter.rows);
  const Range tiles = share_range(group, p.groups, 1, static_cast<int>(ceil_div(adapter.columns, kDxN)));
  if (tiles.count <= 0) return;
  const int steps = static_cast<int>(ceil_div(adapter.q_width(), kDepth));
  const int panel = Workspace<kM>::panel_chunks(steps);
  Chunk* stage_memory = Workspace<kM>::panel() + panel;
  const int stages = Workspace<kM>::stages(p.launch.shared, panel, Tiles::kChunksB);
  auto panel_at = [&](int k) { return typename Tiles::A{Workspace<kM>::panel() + Workspace<kM>::panel_chunks(k)}; };
  auto right_at = [&](int stage) { return typename Tiles::B{stage_memory + stage * Tiles::kChunksB}; };
  const Matrix dh = {p.dh, adapter.q_width(), true};
  for (int k = 0; k < steps; ++k) {
    load_tile<kM>(panel_at(k), dh, rows.first, rows.count, k * kDepth, adapter.q_width() - k * kDepth);
  }
  commit_copies();
  Tiles product;
  product.clear();  // without a value it would take its registers in the whole kernel
  pipeline(
      tiles.count * steps, stages,
      [&](int step, int stage) {
        const Range columns = tile_range(static_cast<int>(tiles.first) + step / steps, kDxN, adapter.columns);
        const int r = step % steps * kDepth;
        load_tile<kDepth>(right_at(stage), adapter.a, r, adapter.rank - r, columns.first, columns.count);
      },
      [&](int step, int stage) {
        const Range columns = tile_range(static_cast<int>(tiles.first) + step / steps, kDxN, adapter.columns);
        if (step % steps == 0) product.clear();
        product.step(panel_at(step % steps), right_at(stage), columns.count);
        if (step % steps != steps - 1) return;
        const int64_t seed = adapter.seed == nullptr ? 0 : *adapter.seed;
        T* const dx = static_cast<T*>(p.dx) + rows.first * adapter.columns + columns.first;
        product.template for_each<8>([&](int i, int j, float (&values)[8]) {
          if (i >= rows.count || j >= columns.count) return;
          const uint32_t block = static_cast<uint32_t>(columns.first + j) / 8;  // of columns that share a draw
          const uint32_t keep =
              adapter.seed == nullptr ? 0xFF : keep_bits(seed, rows.first + i, block, adapter.threshold);
          UNROLL
          for (int e = 0; e < 8; ++e) values[e] = keep >> e & 1 ? values[e] * adapter.keep_scale : 0.0f;
          store(dx + int64_t{i} * adapter.columns + j, values, columns.count - j);
        });
      });
}

template <typename T, int kM>
DEVICE void run_item(const Backward& p, int phase, int item) {
  const Adapter& adapter = p.adapter;
  const Items& items = p.counts;
  if (phase == 0) {
    if (item < items.prepares) {
      T* fqz = static_cast<T*>(p.fqz);
      T* h = static_cast<T*>(const_cast<void*>(p.h.data));
      prepare<T>({&adapter, nullptr, 0, h, fqz, static_cast<T*>(p.q), adapter.q_width(), fqz + adapter.q_width(),
                  adapter.width(), 1.0f, p.launch.shared},
                 item);
    } else {
      find_spans(p, item - items.prepares);
    }
  } else if (phase == 1) {
    // The items of a chunk follow each other: the second read of its dy finds it in the L2 cache.
    const int chunk = item / (items.shrinks + items.ups);
    item %= items.shrinks + items.ups;
    if (item < items.shrinks) {
      const Coordinates at = coordinates(item, items.wide_tiles, p.splits);
      shrink_dy<T, kM>(p, chunk * (p.chunk / kM) + at.first, at.second, at.third);
    } else {
      const Coordinates at = coordinates(item - items.shrinks, 1, items.outer_width_tiles);
      outer_product<T, kM>(p, Outer::kUp, chunk, at.first, at.third);
    }
  } else if (phase == 2) {
    finish_dh<T>(p, item);
  } else if (phase == 3) {
    if (item < items.dxs) {
      const Coordinates at = coordinates(item, 1, p.groups);
      input_gradient<T, kM>(p, at.first, at.third);
    } else if ((item -= items.dxs) < items.das + items.dvs) {
      const bool down = item < items.das;
      const Coordinates at = down ? coordinates(item, items.rank_tiles, items.column_tiles)
                                  : coordinates(item - items.das, adapter.tasks, items.v_rank_tiles);
      outer_product<T, kM>(p, down ? Outer::kDown : Outer::kV, at.first, at.second, at.third);
    } else if ((item -= items.das + items.dvs) < items.fusions) {
      fusion_gradient<T>(p, item);
    } else {
      const Coordinates at = coordinates(item - items.fusions, 1, items.gate_tiles);
      gate_gradient<T>(p, at.first, at.third);
    }
  } else {
    sum_partials<T>(p, item);
  }
}

// Blocks of a processor at once, as far as registers go.
constexpr int blocks_of(int phase) { return phase % 2 == 0 ? 2 : 1; }

template <typename T, int kM, int kPhase>
KERNEL(kThreads, blocks_of(kPhase))
delta_backward(const KERNEL_PARAMETER Backward p) {
  run_launch<kPhase>(p, [&](int phase, int item) { run_item<T, kM>(p, phase, item); });
}

std::array<Need, 5> needs_of(const Backward& p, int tile_rows) {
  const Adapter& adapter = p.adapter;
  constexpr int kOuter = (kOuterM + kOuterN) * 8;
  return {{{0, (kSumRows + 128) * 8},
           {0, (tile_rows + wide_columns(tile_rows)) * 8, kOuter},
           {finish_panel(adapter.width(), panel_steps(0, adapter.sub_rank)), 128 * 8},
           {panel_steps(adapter.rank, 0) * tile_rows * 8, kDxN * 8, kOuter},
           {0, 0}}};
}

Kernels<Backward> kernels_of(const Backward& p, Type type) {
  return instantiation<kFewRows>(type, p.launch.tile_rows, [&](auto t, auto rows) -> Kernels<Backward> {
    using T = decltype(t);
    constexpr int kM = decltype(rows)::value;
    // Phases 0, 2 and 4 have tiles of their own.
    return {{&delta_backward<T, kManyRows, 0>, &delta_backward<T, kM, 1>, &delta_backward<T, kManyRows, 2>,
             &delta_backward<T, kM, 3>, &delta_backward<T, kManyRows, 4>},
            &delta_backward<T, kM, kAll>,
            needs_of(p, kM)};
  });
}

constexpr int64_t kPlaneBytes = int64_t{1} << 28;  // the shares of du may take this much before chunks grow

void plan(Backward& p, Type type, bool one_launch) {
  const Adapter& adapter = p.adapter;
  const bool many = adapter.rows > kFewRowsUpTo && bytes_for(needs_of(p, kManyRows), 2) <= largest_shared_memory();
  p.launch.tile_rows = many ? kManyRows : kFewRows;
  const Kernels<Backward> kernels = kernels_of(p, type);
  const int64_t row_tiles = ceil_div(adapter.rows, p.launch.tile_rows);
  const int wide = wide_columns(p.launch.tile_rows);
  const int steps = static_cast<int>(ceil_div(adapter.outputs, kDepth));
  const int column_tiles = static_cast<int>(ceil_div(adapter.columns, kDxN));
  p.splits = shares_for(row_tiles * ceil_div(adapter.width(), wide), processors(), steps, 2, kMostSplits);
  const int at_once = one_launch ? kernels.all().blocks() : kernels.phase(3).blocks();
  p.groups = shares_for(row_tiles, at_once, column_tiles, 1, column_tiles);
  p.chunk = adapter.rows <= 2048 ? 512 : 2048;
  auto share = [](int64_t rows, int64_t columns) { return ceil_div(rows * columns, 4) * 4; };
  p.a_share = share(adapter.rank, adapter.columns);
  p.b0_share = share(adapter.outputs, adapter.rank);
  p.u_share = share(adapter.outputs, adapter.sub_rank);
  p.v_share = share(adapter.sub_rank, adapter.rank);
  const int64_t bytes = adapter.tasks * p.u_share * 4;
  while (p.chunk < adapter.rows && ceil_div(adapter.rows, p.chunk) * bytes > kPlaneBytes) p.chunk *= 2;
}

Items items_of(const Backward& p) {
  const Adapter& adapter = p.adapter;
  Items items;
  const int64_t rank = adapter.rank, columns = adapter.columns, outputs = adapter.outputs;
  const bool ups_wanted = p.db0_partials != nullptr || p.du_partials != nullptr;
  auto tiles = [](int64_t total, int size) { return static_cast<int>(ceil_div(total, size)); };
  items.row_tiles = tiles(adapter.rows, p.launch.tile_rows);
  items.sum_tiles = tiles(adapter.rows, kSumRows);
  items.chunks = tiles(adapter.rows, p.chunk);
  items.wide_tiles = tiles(adapter.width(), wide_columns(p.launch.tile_rows));
  items.outer_width_tiles = tiles(adapter.width(), kOuterN);
  items.output_tiles = tiles(outputs, kOuterM);
  items.rank_tiles = tiles(rank, kOuterM);
  items.column_tiles = tiles(columns, kOuterN);
  items.v_rank_tiles = tiles(rank, kOuterN);
  items.gate_tiles = tiles(rank, kGateColumns);
  items.prepares = p.q != nullptr ? items.sum_tiles : 0;
  items.spans = p.spans != nullptr ? items.chunks : 0;
  items.shrinks = p.dh != nullptr ? p.chunk / p.launch.tile_rows * items.wide_tiles * p.splits : 0;
  items.ups = ups_wanted ? items.output_tiles * items.outer_width_tiles : 0;
  items.finishes = p.dh != nullptr ? items.sum_tiles : 0;
  items.dxs = p.dx != nullptr ? items.row_tiles * p.groups : 0;
  items.das = p.da_partials != nullptr ? items.chunks * items.rank_tiles * items.column_tiles : 0;
  items.dvs = p.dv_partials != nullptr ? items.chunks * adapter.tasks * items.v_rank_tiles : 0;
  items.fusions = p.dfusion != nullptr ? adapter.tasks : 0;
  items.gates = p.dgate != nullptr ? adapter.gates * items.gate_tiles : 0;
  items.a_sums = p.da_partials != nullptr ? tiles(rank * columns, kSumElements) : 0;
  items.b0_sums = p.db0_partials != nullptr ? tiles(outputs * rank, kSumElements) : 0;
  items.u_sums = p.du_partials != nullptr ? adapter.tasks * tiles(outputs * adapter.sub_rank, kSumElements) : 0;
  items.v_sums = p.dv_partials != nullptr ? adapter.tasks * tiles(rank * adapter.sub_rank, kSumElements) : 0;
  return items;
}

void run(Backward& p, Type type, bool one_launch, Stream stream) {
  p.counts = items_of(p);
  kernels_of(p, type).run(p, one_launch, stream);
}

}  // namespace lilora
