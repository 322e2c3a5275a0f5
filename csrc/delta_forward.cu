// The forward of `delta`: y = bias + s (f q B0^T + z U_t^T), h = D(x) A^T, q = h * g, z = e q V_t^T; and for few rows
// the base product x W^T as well.
//
// Phase 0  shares of h
// Phase 1  h, q and z of tiles of rows
// Phase 2  y by tiles of rows and of outputs; of few rows the base product before it waits for q and z
#include "plan.h"
#include "prepare.h"
#include "stream.h"

namespace lilora {

constexpr int kTileN = 128;
constexpr int kFewRows = kMostBaseRows;  // of a tile of a call of few rows: one tile, so that the base's weight is read once
constexpr int kFewestRows = 16;          // of a tile beside the base's weight, where there are no more

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

// The base product's memory behind the panel of [q | z]: partial sums of half as many slices of the depth as there are, in rows
// of base_width() floats.
HOST_DEVICE int base_chunks(const Forward& p, int rows) { return rows * p.base_columns / 4; }
DEVICE int base_width(int outputs) { return (outputs + 31) / 32 * 32; }

// y of a tile of rows and of `columns`, from [q | z] and, where there is a base product, its sums.
template <typename T, int kM, bool kBase>
struct Expansion {
  using Tiles = Product<T, kM, kTileN, false, false>;
  // Where a tile of rows has several tasks each takes a pass of its own, whose result only its rows keep: so a row gets
  // the same sum in any company, and what is not finite in one task's factors stays there. Small tiles may have as many
  // tasks as rows: they keep the product with B0 between the passes, beside the base's where there is one.
  static constexpr bool kKeep = kM <= kFewRows;

  const Forward& p;
  const Adapter& adapter;
  const TaskList<kM>& list;
  Range rows, columns;
  int q_steps, z_steps, panel, stage_chunks, stages;
  int again, of_tile, steps;  // steps of each pass but the first, of a tile of outputs, of all

  // The list of tasks is there.
  DEVICE Expansion(const Forward& forward, Range tile, Range outputs)
      : p(forward), adapter(forward.adapter), list(Workspace<kM>::list()), rows(tile), columns(outputs) {
    q_steps = static_cast<int>(ceil_div(adapter.q_width(), kDepth));
    z_steps = static_cast<int>(ceil_div(padded(adapter.sub_rank), kDepth));
    panel = Workspace<kM>::panel_chunks(q_steps + z_steps);
    stage_chunks = kBase ? p.base_columns * Tiles::B::kChunks : Tiles::kChunksB;
    stages = Workspace<kM>::stages(p.launch.shared, behind_panel(), stage_chunks);
    again = kKeep ? z_steps : q_steps + z_steps;
    of_tile = q_steps + z_steps + (larger(list.count, 1) - 1) * again;
    steps = static_cast<int>(ceil_div(columns.count, kTileN)) * of_tile;
  }

  DEVICE int behind_panel() const { return panel + (kBase ? base_chunks(p, kM) : 0); }
  DEVICE typename Tiles::A panel_at(int k) const { return {Workspace<kM>::panel() + Workspace<kM>::panel_chunks(k)}; }
  DEVICE typename Tiles::B right_at(int stage) const {
    return {Workspace<kM>::panel() + behind_panel() + stage * stage_chunks};
  }
  DEVICE float* sums() const { return reinterpret_cast<float*>(Workspace<kM>::panel() + panel); }

  struct Position {
    Range columns;
    int pass, k;
  };
  DEVICE Position position(int step) const {
    Range tile = tile_range(step / of_tile, kTileN, columns.count);
    tile.first += columns.first;
    const int first = step % of_tile, later = first - q_steps - z_steps;
    if (later < 0) return {tile, 0, first};
    return {tile, 1 + later / again, (kKeep ? q_steps : 0) + later % again};
  }

  // The rows of [q | z] stay; the tiles of parameters pass by.
  DEVICE void load_panel() const {
    wait_for_previous_kernel();
    const Matrix qz = {p.qz, adapter.width(), true};
    const int filled = whole_tiles(rows.count);
    for (int k = 0; k < q_steps; ++k) {
      load_tile<kM>(panel_at(k), qz, rows.first, rows.count, k * kDepth, adapter.q_width() - k * kDepth, filled);
    }
    for (int k = 0; k < z_steps; ++k) {
      load_tile<kM>(panel_at(q_steps + k), qz, rows.first, rows.count, adapter.q_width() + k * kDepth,
                    padded(adapter.sub_rank) - k * kDepth, filled);
    }
  }

  DEVICE void load(int step, int stage) const {
    const Position at = position(step);
    const int filled = whole_tiles(at.columns.count);
    if (at.k < q_steps) {
      load_tile<kTileN>(right_at(stage), adapter.b0, at.columns.first, at.columns.count, at.k * kDepth,
                        adapter.rank - at.k * kDepth, filled);
    } else {
      // Without a task in the tile its rows take nothing of this.
      const int64_t task = list.count > 0 ? list.tasks[at.pass] : 0;
      const int s = (at.k - q_steps) * kDepth;
      load_tile<kTileN>(right_at(stage), adapter.u, task * adapter.outputs + at.columns.first,
                        list.count > 0 ? at.columns.count : 0, s, adapter.sub_rank - s, filled);
    }
  }

  // The product with B0 is there: times the share of B0; with a base it is added to that one's sums.
  DEVICE void finish_b0(Tiles& product) const {
    const int width = base_width(columns.count);
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
            float* const to = sums() + row * width + Tiles::column(j);
            to[0] += adapter.scaling * f * pair[0];
            to[1] += adapter.scaling * f * pair[1];
          }
        }
      }
    }
  }

  DEVICE void store_pass(Tiles& product, const Position& at) const {
    const int width = base_width(columns.count);
    product.template for_each<8>([&](int i, int j, float (&values)[8]) {
      const bool exists = list.exists(adapter, i);
      if (i >= rows.count || j >= at.columns.count || (exists ? list.ids[i] != list.tasks[at.pass] : at.pass > 0)) return;
      const int64_t row = rows.first + i, column = at.columns.first + j;
      const int count = at.columns.count - j;
      Vector<float, 8> of_base = {};
      if (kBase) of_base = *reinterpret_cast<const Vector<float, 8>*>(sums() + i * width + j);
      UNROLL
      for (int e = 0; e < 8; ++e) {
        values[e] = exists ? values[e] * adapter.scaling : list.missing(i);
        values[e] += of_base.values[e];
        if (p.bias.data != nullptr && e < count) values[e] += element<T>(p.bias, column + e);
      }
      store(static_cast<T*>(p.y) + row * adapter.outputs + column, values, count);
    });
  }

  // With a base the first loads, and those of the panel, are under way.
  DEVICE void run() const {
    Tiles product, kept;
    product.clear();  // without a value it would take its registers in the whole kernel
    pipeline(
        steps, stages,
        [&](int step, int stage) {
          load(step, stage);
          if (!kBase && step == 0) load_panel();
        },
        [&](int step, int stage) {
          const Position at = position(step);
          if (at.k == 0 || (kBase && at.k == q_steps)) product.clear();
          if (kKeep && !kBase && at.pass > 0 && at.k == q_steps) product = kept;
          const bool for_all = kKeep && at.k < q_steps;  // else only the rows of the task are kept
          product.step(panel_at(at.k), right_at(stage), at.columns.count,
                       for_all ? tiles_below(whole_tiles(rows.count)) : list.count > 0 ? list.tiles[at.pass] : 0);
          if (at.k == q_steps - 1) {
            if (kBase || adapter.fusion.data != nullptr) finish_b0(product);
            if (kBase) product.clear();
            if (kBase && z_steps == 0) __syncthreads();  // else the next step has one
            if (kKeep && !kBase) kept = product;
          }
          if (at.k == q_steps + z_steps - 1) store_pass(product, at);
        },
        kBase);
  }
};

// While the base's weight comes: the list of tasks, and the first loads for them.
template <typename T, int kM>
DEVICE void begin_expansion(const Forward& p, Range rows, Range columns) {
  Workspace<kM>::list().fill(p.adapter, rows);
  const Expansion<T, kM, true> expansion(p, rows, columns);
  begin_pipeline(expansion.steps, expansion.stages, [&](int step, int stage) { expansion.load(step, stage); });
}

// The base product x W^T of a tile of outputs, after which its memory begins with the sums. meanwhile() runs while the first loads
// are under way. Each warp has 32 outputs; where there are more warps they share the depth in an even number of slices.
template <typename T, int kM, typename Meanwhile>
DEVICE void base_product(const Forward& p, Range rows, Range outputs, Meanwhile meanwhile) {
  using Product = StreamedProduct<T, kM>;
  const int width = base_width(outputs.count), across = width / Product::kOutputs;
  const int warp = threadIdx.x / 32, first = warp % across * Product::kOutputs, slice = warp / across;
  int slices = kThreads / 32;
  while (slices * width > 2 * p.base_columns) slices /= 2;
  const Range own = {outputs.first + first, smaller(outputs.count - first, Product::kOutputs)};
  Product product{p.x, p.weight, rows, own, {}};
  product.add(slice < slices ? share_range(slice, slices, Product::kDepth, p.adapter.columns) : Range{0, 0}, meanwhile);

  float* const sums = Expansion<T, kM, true>(p, rows, outputs).sums();
  const int plane = rows.count * width, half = slices / 2;  // a warp of either half has the same place in a plane
  auto for_each_pair = [&](auto f) {
    UNROLL
    for (int i = 0; i < 2 * Product::kTilesM; ++i) {
      const int row = Product::row(i / 2, i % 2);
      if (row >= rows.count) continue;
      UNROLL
      for (int j = 0; j < Product::kTilesN; ++j) {
        float* const to = sums + slice % half * plane + row * width + first + Product::column(j);
        f(*reinterpret_cast<Vector<float, 2>*>(to), &product.c[i / 2][j][2 * (i % 2)]);
      }
    }
  };
  if (slice >= half && slice < slices) {
    for_each_pair([](Vector<float, 2>& sum, const float* c) { sum = {{c[0], c[1]}}; });
  }
  __syncthreads();
  if (slice < half) {
    for_each_pair([](Vector<float, 2>& sum, const float* c) { sum = {{c[0] + sum.values[0], c[1] + sum.values[1]}}; });
  }
  __syncthreads();
  for (int i = threadIdx.x * 4; i < plane; i += kThreads * 4) {
    *reinterpret_cast<Vector<float, 4>*>(sums + i) = sum_of_splits<4>(sums + i, plane, half);
  }
  __syncthreads();
}

template <typename T, int kM>
PART void expand(const Forward& p, int row_tile, int group) {
  const Range rows = tile_range(row_tile, kM, p.adapter.rows), share = share_range(group, p.groups, kTileN, p.adapter.outputs);
  if (share.count <= 0) return;
  Workspace<kM>::list().fill(p.adapter, rows);
  Expansion<T, kM, false>(p, rows, share).run();
}

template <typename T, int kM>
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
    expand<T, kM>(p, at.first, at.third);
  }
}

// Blocks of a processor at once, as far as registers go.
constexpr int blocks_of(int tile_rows, int phase) {
  return phase == 0 || phase == 1 || (phase == 2 && kHasWgmma && tile_rows > kFewRows) ? 2 : 1;
}

template <typename T, int kM, int kPhase>
KERNEL(kThreads, blocks_of(kM, kPhase))
delta_forward(const KERNEL_PARAMETER Forward p) {
  run_launch<kPhase, kPhase != 2>(p, [&](int phase, int item) { run_item<T, kM>(p, phase, item); });
}

// The last phase with the base product, for one tile of rows: a block for each group of outputs, as in a loop over them the
// compiler keeps more than there are registers for. Of the fewest rows it has one of phase 0 beside it.
template <typename T, int kM>
KERNEL(kThreads, kHasWgmma && kM == kFewestRows ? 2 : 1)
delta_forward_with_base(const KERNEL_PARAMETER Forward p) {
  allow_next_kernel();
  const Range rows = {0, static_cast<int>(p.adapter.rows)}, share = share_range(blockIdx.x, p.groups, kPerChunk, p.adapter.outputs);
  if (share.count <= 0) return;
  base_product<T, kM>(p, rows, share, [&] { begin_expansion<T, kM>(p, rows, share); });
  const Expansion<T, kM, true> expansion(p, rows, share);
  expansion.load_panel();
  commit_copies();
  wait_copies(0);
  expansion.run();
}

std::string missing_code_on_current_device() { return missing_code(&delta_forward<Half, kFewRows, kAll>); }

int base_rows(const Forward& p) { return p.adapter.rows <= kFewestRows ? kFewestRows : kFewRows; }

Need expand_need(const Forward& p, int rows) {
  const bool base = p.weight.data != nullptr;
  const int panel = rows * panel_steps(p.adapter.rank, p.adapter.sub_rank) * 8;
  return {panel + (base ? base_chunks(p, rows) : 0), (base ? p.base_columns : kTileN) * 8};
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
      expand = base_rows(p) == kFewRows ? &delta_forward_with_base<T, kFewRows> : &delta_forward_with_base<T, kFewestRows>;
    }
    // Phase 1 has tiles of its own.
    return {{&delta_forward<T, kM, 0>, &delta_forward<T, kManyRows, 1>, expand},
            &delta_forward<T, kM, kAll>,
            needs_of(p, kM),
            p.weight.data == nullptr};
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
  if (base) {  // a range for each processor, or several, of whole chunks
    const int64_t chunks = ceil_div(adapter.outputs, kPerChunk), most = blocks * (p.base_columns / kPerChunk);
    p.groups = static_cast<int>(ceil_div(chunks, ceil_div(chunks, blocks * ceil_div(chunks, most))));
  }
}

void run(const Forward& p, Type type, bool one_launch, Stream stream) { kernels_of(p, type).run(p, one_launch, stream); }

}  // namespace lilora
