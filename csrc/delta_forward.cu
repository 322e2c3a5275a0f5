// The forward of `delta`: y = bias + s (f q B0^T + z U_t^T), h = D(x) A^T, q = h * g, z = e q V_t^T; and for few rows
// the base product x W^T as well.
//
// Phase 0  shares of h
// Phase 1  h, q and z of tiles of rows
// Phase 2  y by tiles of rows and of outputs; of few rows the base product before it waits for q and z
#include "plan.h"
#include "prepare.h"

namespace lilora {

constexpr int kTileN = 128;
constexpr int kFewRows = 64;  // of a tile of a call of few rows: one tile, so that the base's weight is read once
constexpr int kFewestRows = 16;  // of a tile beside the base's weight, where there are no more
constexpr int kMostSteps = 4;    // of a stage of the base product: its tiles are smaller than others
constexpr int kStreamed = 1792;  // chunks that a stage of it may have: as far as two blocks share a processor

// A share of the columns of x of h = D(x) A^T.
template <typename T, int kM>
PART void shrink(const Forward& p, Coordinates at) {
  using Tiles = Product<T, kM, kTileN, false, false>;
  const Adapter& adapter = p.adapter;
  const int share = at.third, stride = adapter.q_width();
  const Range rows = tile_range(at.first, kM, adapter.rows), columns = tile_range(at.second, kTileN, adapter.rank);
  const int filled = whole_tiles(rows.count);
  const Range depth = share_range(share, p.splits, kDepth, adapter.columns);
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
        load_tile<kTileN>(right_at(stage), adapter.a, columns.first, columns.count, k, left);
      },
      [&](int step, int stage) {
        if (adapter.seed != nullptr) {
          drop(left_at(stage), adapter, rows.first, static_cast<int>(depth.first) + step * kDepth, filled);
          __syncthreads();
        }
        product.step(left_at(stage), right_at(stage), columns.count, tiles_below(filled));
      });
  float* const to = p.partials + (share * adapter.rows + rows.first) * stride + columns.first;
  const int stored = stride - static_cast<int>(columns.first);
  product.template for_each<4>([&](int i, int j, float (&values)[4]) {
    if (i < rows.count && j < stored) store_vector(to + int64_t{i} * stride + j, values);
  });
}

// Rows of a matrix that pass by in steps, each a tile. What a thread copies lies at the same place of every step.
template <typename T>
struct PassingRows {
  static constexpr int kAtOnce = kThreads / (kDepth / kPerChunk);  // rows; the swizzle comes again after eight
  Matrix from;
  Range rows;
  int filled;  // rows from rows.count to here are zeros
  const T* own;   // this thread's first chunk
  int64_t apart;  // of its next one, in elements
  int place;      // of its first one in a tile

  DEVICE PassingRows(const Matrix& m, Range range)
      : from(m), rows(range), filled(whole_tiles(range.count)), apart(kAtOnce * m.stride) {
    own = static_cast<const T*>(m.data) + (range.first + threadIdx.x / 8) * m.stride + threadIdx.x % 8 * kPerChunk;
    place = opaque(threadIdx.x / 8 * 8 + ((threadIdx.x ^ threadIdx.x / 8) & 7));  // as Tile::chunk has it
  }

  // So many steps from column k on, whose tiles lie `stride` chunks apart: whole and aligned, else by load_tile.
  template <int kRows>
  DEVICE void load(Chunk* to, int stride, int steps, int k, int left) const {
    if (!from.aligned || left < steps * kDepth) {
      NO_UNROLL
      for (int step = 0; step < steps; ++step) {
        load_tile<kRows>(Tile<T, kRows, kDepth>{to + step * stride}, from, rows.first, rows.count, k + step * kDepth,
                         left - step * kDepth, filled);
      }
      return;
    }
    Chunk* target = to + place;
    const T* source = own + k;
    UNROLL
    for (int i = 0; i == 0 || i < kRows / kAtOnce; ++i) {
      const int row = threadIdx.x / 8 + i * kAtOnce;
      if (row < filled) {
        UNROLL
        for (int step = 0; step < kMostSteps; ++step) {
          if (step < steps) copy_async(target + step * stride, source + step * kDepth, row < rows.count ? 16 : 0);
        }
      }
      target += kThreads;
      source += apart;
    }
  }
};

// The base product x W^T of a tile of outputs: floats from `memory` on, each row of whole sixteens. `room`: chunks there.
// meanwhile() runs while the first loads are under way.
//
// Each warp has sixteen outputs. Where there are more warps, several have the same ones: each takes every so-many-th sixteen
// of the depth, and they add their sums in turn.
template <typename T, int kM, typename Meanwhile>
DEVICE void base_product(const Forward& p, Range rows, Range columns, Chunk* memory, int room, Meanwhile meanwhile) {
  using Tiles = Product<T, kM, kTileN, false, false>;
  static_assert(Tiles::kWarpsM == 1 && Tiles::kTilesN == 2);
  const int filled = whole_tiles(rows.count), width = whole_tiles(columns.count);
  const int across = width / 16, warp = threadIdx.x / 32, column = warp % across * 16, turn = warp / across;
  const int sharing = across > 4 ? 1 : across > 2 ? 2 : across == 2 ? 4 : 8;  // warps of the same outputs

  const int step_chunks = (filled + width) * Tiles::A::kChunks;
  int deep = kMostSteps;
  while (deep > 1 && room < 3 * deep * step_chunks) deep /= 2;
  const int stages = smaller(kMostStages, room / (deep * step_chunks));
  auto left_at = [&](int stage, int i) { return typename Tiles::A{memory + (stage * deep + i) * step_chunks}; };
  auto right_at = [&](int stage, int i) { return typename Tiles::B{left_at(stage, i).data + filled * Tiles::A::kChunks}; };
  const PassingRows<T> x(p.x, rows), weight(p.weight, columns);
  const int depth = p.adapter.columns, steps = static_cast<int>(ceil_div(depth, kDepth));
  auto steps_of = [&](int step) { return smaller(deep, steps - step * deep); };
  const uint32_t tiles = kM == 16 ? 1u : tiles_below(filled);
  Tiles product;
  product.clear();
  pipeline<false>(
      static_cast<int>(ceil_div(steps, deep)), stages,
      [&](int step, int stage) {
        const int k = step * deep * kDepth;
        x.template load<kM>(left_at(stage, 0).data, step_chunks, steps_of(step), k, depth - k);
        weight.template load<kTileN>(right_at(stage, 0).data, step_chunks, steps_of(step), k, depth - k);
      },
      [&](int step, int stage) {
        if (step == 0) meanwhile();
        if (turn >= sharing) return;
        UNROLL
        for (int i = 0; i < kMostSteps; ++i) {
          if (i >= steps_of(step)) break;
          if (sharing == 1) {
            product.step(left_at(stage, i), right_at(stage, i), width, tiles);
          } else if (sharing < 8 || (step * deep + i) % 2 == turn / 4) {
            const int k = turn % 4 * 16;
            product.step_of_sixteen(left_at(stage, i), right_at(stage, i), k, column, tiles);
            if (sharing == 2) product.step_of_sixteen(left_at(stage, i), right_at(stage, i), k + 32, column, tiles);
          }
        }
      });
  if (steps == 0) meanwhile();
  float* const sums = reinterpret_cast<float*>(memory);
  for (int now = 0; now < sharing; ++now) {
    if (now == turn) {
      UNROLL
      for (int i = 0; i < Tiles::kTilesM; ++i) {
        if (16 * i >= filled) continue;
        UNROLL
        for (int e = 0; e < 2 * Tiles::kTilesN; ++e) {
          const int half = e % 2, j = e / 2;
          Vector<float, 2>& to = *reinterpret_cast<Vector<float, 2>*>(
              sums + Tiles::row(i, half) * width + column + 8 * j + Tiles::lane() % 4 * 2);
          Vector<float, 2> sum = {{product.c[i][j][2 * half], product.c[i][j][2 * half + 1]}};
          if (now > 0) {
            sum.values[0] += to.values[0];
            sum.values[1] += to.values[1];
          }
          to = sum;
        }
      }
    }
    __syncthreads();
  }
}

template <typename T, int kM, bool kBase>
PART void expand(const Forward& p, int row_tile, int group) {
  using Tiles = Product<T, kM, kTileN, false, false>;
  const Adapter& adapter = p.adapter;
  const Range rows = tile_range(row_tile, kM, adapter.rows);
  const Range share = share_range(group, p.groups, kBase ? kPerChunk : kTileN, adapter.outputs);
  if (share.count <= 0) return;
  TaskList<kM>& list = Workspace<kM>::list();
  if (!kBase) list.fill(adapter, rows);

  const int q_steps = static_cast<int>(ceil_div(adapter.q_width(), kDepth));
  const int z_steps = static_cast<int>(ceil_div(padded(adapter.sub_rank), kDepth));
  const int panel = Workspace<kM>::panel_chunks(q_steps + z_steps);
  Chunk* const memory = Workspace<kM>::panel() + panel;
  float* const sums = reinterpret_cast<float*>(memory);  // of the base product, and of that with B0
  const int sum_chunks = kBase ? kM * p.base_columns / 4 : 0;
  const int stages = Workspace<kM>::stages(p.launch.shared, panel + sum_chunks, Tiles::kChunksB);
  auto panel_at = [&](int k) { return typename Tiles::A{Workspace<kM>::panel() + Workspace<kM>::panel_chunks(k)}; };
  auto right_at = [&](int stage) { return typename Tiles::B{memory + sum_chunks + stage * Tiles::kChunksB}; };

  // The rows of [q | z] stay; the tiles of parameters pass by.
  const Matrix qz = {p.qz, adapter.width(), true};
  const int filled = whole_tiles(rows.count);
  auto load_panel = [&] {
    wait_for_previous_kernel();
    for (int k = 0; k < q_steps; ++k) {
      load_tile<kM>(panel_at(k), qz, rows.first, rows.count, k * kDepth, adapter.q_width() - k * kDepth,
                    filled);
    }
    for (int k = 0; k < z_steps; ++k) {
      load_tile<kM>(panel_at(q_steps + k), qz, rows.first, rows.count, adapter.q_width() + k * kDepth,
                    padded(adapter.sub_rank) - k * kDepth, filled);
    }
  };

  // Where a tile of rows has several tasks each takes a pass of its own, whose result only its rows keep: so a row gets
  // the same sum in any company, and what is not finite in one task's factors stays there. Small tiles may have as many
  // tasks as rows: they keep the product with B0 between the passes, beside the base's where there is one.
  constexpr bool kKeep = kM <= kFewRows;
  const int again = kKeep ? z_steps : q_steps + z_steps;  // steps of each pass but the first
  const int parts = kBase ? static_cast<int>(ceil_div(share.count, p.base_columns)) : 1;  // with a base product each
  struct Position {
    Range columns;
    int pass, k;
  };
  for (int index = 0; index < parts; ++index) {
    Range part = share_range(index, parts, kPerChunk, share.count);
    part.first += share.first;
    const int width = whole_tiles(part.count);
    if constexpr (kBase) {
      const int room = (p.launch.shared - Workspace<kM>::kListBytes) / 16 - panel;
      auto fill_list = [&] {
        if (index == 0) list.fill(adapter, rows);
      };
      base_product<T, kM>(p, rows, part, memory, room, fill_list);
    }
    const int passes = larger(list.count, 1);
    const int steps = q_steps + z_steps + (passes - 1) * again;  // of one tile of outputs
    auto position = [&](int step) -> Position {
      Range columns = tile_range(step / steps, kTileN, part.count);
      columns.first += part.first;
      const int first = step % steps, later = first - q_steps - z_steps;
      if (later < 0) return {columns, 0, first};
      return {columns, 1 + later / again, (kKeep ? q_steps : 0) + later % again};
    };
    Tiles product, kept;
    product.clear();  // without a value it would take its registers in the whole kernel
    pipeline(
        static_cast<int>(ceil_div(part.count, kTileN)) * steps, stages,
        [&](int step, int stage) {
          const Position at = position(step);
          if (at.k < q_steps) {
            load_tile<kTileN>(right_at(stage), adapter.b0, at.columns.first, at.columns.count, at.k * kDepth,
                              adapter.rank - at.k * kDepth, whole_tiles(at.columns.count));
          } else {
            // Without a task in the tile its rows take nothing of this.
            const int64_t task = list.count > 0 ? list.tasks[at.pass] : 0;
            const int s = (at.k - q_steps) * kDepth;
            load_tile<kTileN>(right_at(stage), adapter.u, task * adapter.outputs + at.columns.first,
                              list.count > 0 ? at.columns.count : 0, s, adapter.sub_rank - s,
                              whole_tiles(at.columns.count));
          }
          if (index == 0 && step == 0) load_panel();
        },
        [&](int step, int stage) {
          const Position at = position(step);
          if (at.k == 0 || (kBase && at.k == q_steps)) product.clear();
          if (kKeep && !kBase && at.pass > 0 && at.k == q_steps) product = kept;
          const bool for_all = kKeep && at.k < q_steps;  // else only the rows of the task are kept
          product.step(panel_at(at.k), right_at(stage), at.columns.count,
                       for_all ? tiles_below(filled) : list.count > 0 ? list.tiles[at.pass] : 0);
          if (at.k == q_steps - 1 && (kBase || adapter.fusion.data != nullptr)) {
            UNROLL
            for (int i = 0; i < Tiles::kTilesM; ++i) {
              UNROLL
              for (int half = 0; half < 2; ++half) {
                const int row = Tiles::row(i, half);
                const bool exists = list.exists(adapter, row);
                const float f = exists ? share_of_b0<T>(adapter, list.ids[row]) : 1.0f;
                UNROLL
                for (int j = 0; j < Tiles::kTilesN; ++j) {
                  float(&pair)[2] = *reinterpret_cast<float(*)[2]>(&product.c[i][j][2 * half]);
                  if (!kBase) {
                    pair[0] *= f;
                    pair[1] *= f;
                  } else if (exists && Tiles::column(j) < width) {
                    float* const to = sums + row * width + Tiles::column(j);
                    to[0] += adapter.scaling * f * pair[0];
                    to[1] += adapter.scaling * f * pair[1];
                  }
                }
              }
            }
            if (kBase) product.clear();
            if (kBase && z_steps == 0) __syncthreads();  // else the next step has one
          }
          if (kKeep && !kBase && at.k == q_steps - 1) kept = product;
          if (at.k != q_steps + z_steps - 1) return;
          product.template for_each<8>([&](int i, int j, float (&values)[8]) {
            const bool exists = list.exists(adapter, i);
            if (i >= rows.count || j >= at.columns.count || (exists ? list.ids[i] != list.tasks[at.pass] : at.pass > 0)) return;
            const int64_t row = rows.first + i, column = at.columns.first + j;
            const int count = at.columns.count - j;
            Vector<float, 8> of_base = {};
            if (kBase) of_base = *reinterpret_cast<const Vector<float, 8>*>(sums + i * width + j);
            UNROLL
            for (int e = 0; e < 8; ++e) {
              values[e] = exists ? values[e] * adapter.scaling : list.missing(i);
              values[e] += of_base.values[e];
              if (p.bias.data != nullptr && e < count) values[e] += element<T>(p.bias, column + e);
            }
            store(static_cast<T*>(p.y) + row * adapter.outputs + column, values, count);
          });
        });
  }
}

template <typename T, int kM, bool kBase>
DEVICE void run_item(const Forward& p, int phase, int item) {
  const Adapter& adapter = p.adapter;
  if (phase == 0) {
    shrink<T, kM>(p, coordinates(item, p.rank_tiles, p.splits));
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

// Blocks of a processor at once, as far as registers go. Of the fewest rows one has one of phase 0 beside it.
constexpr int blocks_of(int tile_rows, int phase) {
  return phase == 0 || phase == 1 || (phase == 2 && kHasWgmma && tile_rows != kFewRows) ? 2 : 1;
}

template <typename T, int kM, int kPhase, bool kBase = false>
KERNEL(kThreads, blocks_of(kM, kPhase))
delta_forward(const KERNEL_PARAMETER Forward p) {
  run_launch<kPhase, kPhase != 2>(p, [&](int phase, int item) { run_item<T, kM, kBase>(p, phase, item); });
}

std::string missing_code_on_current_device() { return missing_code(&delta_forward<Half, kFewRows, kAll>); }

int base_rows(const Forward& p) { return p.adapter.rows <= kFewestRows ? kFewestRows : kFewRows; }

Need expand_need(const Forward& p, int rows) {
  const bool base = p.weight.data != nullptr;
  const int panel = panel_steps(p.adapter.rank, p.adapter.sub_rank) * 8, sums = base ? p.base_columns / 4 : 0;
  return {rows * (panel + sums), kTileN * 8, base ? kStreamed : 0};
}

std::array<Need, 3> needs_of(const Forward& p, int tile_rows) {
  const bool base = p.weight.data != nullptr;
  return {{{0, (tile_rows + kTileN) * 8}, {0, (kSumRows + 128) * 8}, expand_need(p, base ? base_rows(p) : tile_rows)}};
}

Kernels<Forward> kernels_of(const Forward& p, Type type) {
  return instantiation<kFewRows>(type, p.launch.tile_rows, [&](auto t, auto rows) -> Kernels<Forward> {
    using T = decltype(t);
    constexpr int kM = decltype(rows)::value;
    auto expand = &delta_forward<T, kM, 2>;
    if (p.weight.data != nullptr) {
      expand = base_rows(p) == kFewRows ? &delta_forward<T, kFewRows, 2, true> : &delta_forward<T, kFewestRows, 2, true>;
    }
    // Phase 1 has tiles of its own.
    return {{&delta_forward<T, kM, 0>, &delta_forward<T, kManyRows, 1>, expand},
            &delta_forward<T, kM, kAll>,
            needs_of(p, kM)};
  });
}

void plan(Forward& p, Type type, bool one_launch) {
  const Adapter& adapter = p.adapter;
  const bool base = p.weight.data != nullptr;
  p.base_columns = kTileN;
  if (expand_need(p, kFewRows).bytes(2) > largest_shared_memory()) p.base_columns = kTileN / 2;
  const bool many = adapter.rows > kFewRowsUpTo && !base && bytes_for(needs_of(p, kManyRows), 2) <= largest_shared_memory();
  p.launch.tile_rows = many ? kManyRows : kFewRows;
  const Kernels<Forward> kernels = kernels_of(p, type);
  p.row_tiles = static_cast<int>(ceil_div(adapter.rows, p.launch.tile_rows));
  p.sum_tiles = static_cast<int>(ceil_div(adapter.rows, kSumRows));
  p.rank_tiles = static_cast<int>(ceil_div(adapter.rank, kTileN));
  p.output_tiles = static_cast<int>(ceil_div(adapter.outputs, kTileN));
  const int blocks = processors(), depth = static_cast<int>(ceil_div(adapter.columns, kDepth));
  p.splits = shares_for(p.row_tiles * p.rank_tiles, blocks, depth, 2, kMostSplits);
  const int at_once = one_launch ? kernels.all().blocks() : kernels.phase(2).blocks();
  p.groups = shares_for(p.row_tiles, at_once, p.output_tiles, 1, p.output_tiles);
  if (base) {  // a range for each processor, of whole chunks
    const int64_t chunks = ceil_div(adapter.outputs, kPerChunk);
    p.groups = static_cast<int>(ceil_div(chunks, ceil_div(chunks, blocks)));
  }
}

void run(const Forward& p, Type type, bool one_launch, Stream stream) { kernels_of(p, type).run(p, one_launch, stream); }

}  // namespace lilora
