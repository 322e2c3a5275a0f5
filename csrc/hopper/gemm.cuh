// The fused product out of CUTLASS's parts. Its cooperative warp-specialised kernel, its loads and its wgmma main loop
// run as they are; three things are ours: which tile comes when and how many steps it takes (TileScheduler), which
// matrices the steps load (AdapterMainloop), and dropout between the adapter's steps and those of the base
// (DropoutMainloop).
#pragma once

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <stdexcept>
#include <string>

#include "hopper/dropout.h"

namespace lilora::hopper {

using namespace cute;

using TileShape = Shape<Int<kTileM>, Int<kTileN>, Int<kTileK>>;
using ClusterShape = Shape<Int<kClusterM>, _1, _1>;
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;

// --- tiles and steps -----------------------------------------------------------------------------

// The adapter's steps of the inner dimension: `rank` of (q, B0), then `slot` of (z, U) for each slot of the rows.
struct AdapterSteps {
  int rank = 0, slot = 0;
  const int* slot_count = nullptr;  // null: no slots

  CUTLASS_DEVICE int slots(int tile_m) const { return slot_count == nullptr ? 0 : slot_count[tile_m / kClusterM]; }
};

// The steps of one tile. CUTLASS's kernel takes it for their number and hands it to load() and mma().
struct TileSteps {
  int adapter, base;
  TileIndex tile;

  CUTLASS_HOST_DEVICE operator int() const { return adapter + base; }
};

struct TileSchedulerTag {};

class TileScheduler : public cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90 {
  using Base = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;

 public:
  struct Arguments : Base::Arguments {
    AdapterSteps steps = {};
  };
  struct Params : Base::Params {
    AdapterSteps steps = {};
  };
  struct WorkTileInfo : Base::WorkTileInfo {
    int adapter_steps = 0;
  };

  template <class... Rest>
  static Params to_underlying_arguments(const Shape<int, int, int, int>& problem, TileShape tile, ClusterShape cluster,
                                        const cutlass::KernelHardwareInfo& hardware, const Arguments& arguments,
                                        Rest... rest) {
    return {Base::to_underlying_arguments(problem, tile, cluster, hardware, arguments, rest...), arguments.steps};
  }

  CUTLASS_DEVICE explicit TileScheduler(const Params& params) : Base(params), steps_(params.steps) {}

  template <class Cluster>
  CUTLASS_DEVICE WorkTileInfo initial_work_tile_info(Cluster cluster) {
    return in_order(Base::initial_work_tile_info(cluster));
  }

  template <class... Pipeline>
  CUTLASS_DEVICE auto fetch_next_work(const WorkTileInfo& work, const Pipeline&...) {
    return cute::make_tuple(in_order(get<0>(Base::fetch_next_work(work))), true);
  }

  template <class Problem, class Tile>
  CUTLASS_DEVICE static TileSteps get_work_k_tile_count(const WorkTileInfo& work, const Problem& problem, const Tile&) {
    return {work.adapter_steps, static_cast<int>(ceil_div(get<2>(problem), kTileK)), {work.M_idx, work.N_idx}};
  }

 private:
  // The base class walks row by row.
  CUTLASS_DEVICE WorkTileInfo in_order(Base::WorkTileInfo work) const {
    if (!work.is_valid()) return {work};
    const int tiles_m = scheduler_params.problem_tiles_m_, tiles_n = scheduler_params.problem_tiles_n_;
    const TileIndex at = tile_at(work.M_idx / kClusterM * tiles_n + work.N_idx, tiles_m, tiles_n);
    work.M_idx = at.m * kClusterM + work.M_idx % kClusterM;
    work.N_idx = at.n;
    return {work, steps_.rank + steps_.slots(work.M_idx) * steps_.slot};
  }

  AdapterSteps steps_;
};

}  // namespace lilora::hopper

template <class ClusterShape, uint32_t kStages>
struct cutlass::gemm::kernel::detail::TileSchedulerSelector<lilora::hopper::TileSchedulerTag, cutlass::arch::Sm90,
                                                            lilora::hopper::TileShape, ClusterShape, kStages> {
  using Scheduler = lilora::hopper::TileScheduler;
};

namespace lilora::hopper {

// --- what the steps load -------------------------------------------------------------------------

struct AdapterParams {
  AdapterSteps steps;
  int rank, sub_rank, slots_per_group;
  int batches;  // of the task pair: all slots or all tasks, whichever are more
  const int* slot_task;
  Dropout dropout;

  template <class Problem>
  CUTLASS_HOST_DEVICE auto shared_shape(const Problem& problem) const {
    return make_shape(get<0>(problem), get<1>(problem), rank, 1);
  }
  // The left operand is numbered by slots, the right one by tasks: the extent of either may be too large, not too
  // small.
  template <class Problem>
  CUTLASS_HOST_DEVICE auto task_shape(const Problem& problem) const {
    return make_shape(int{kSlotRows}, get<1>(problem), sub_rank, batches);
  }
};

// Loads three pairs of matrices one after another: the adapter's shared pair, the pair of each slot, and the base's.
template <class Base>
struct AdapterMainloop : Base {
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  using Pair = typename Base::Arguments;

  struct Arguments {
    Pair base, shared, task;
    AdapterParams adapter;
  };

  // CUTLASS's kernel reads the size of a step, the same for all pairs, from the base class.
  struct Params : Base::Params {
    typename Base::Params shared, task;
    AdapterParams adapter;
  };

  template <class Problem>
  static Params to_underlying_arguments(const Problem& problem, const Arguments& from, void*) {
    const AdapterParams& adapter = from.adapter;
    const auto shared = Base::to_underlying_arguments(adapter.shared_shape(problem), from.shared, nullptr);
    return {Base::to_underlying_arguments(problem, from.base, nullptr), shared,
            adapter.steps.slot_count == nullptr
                ? shared
                : Base::to_underlying_arguments(adapter.task_shape(problem), from.task, nullptr),
            adapter};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    Base::prefetch_tma_descriptors(params);
    Base::prefetch_tma_descriptors(params.shared);
    if (params.adapter.steps.slot_count != nullptr) Base::prefetch_tma_descriptors(params.task);
  }

  // CUTLASS's kernel reads the first two, those of the base, for the numbers of tiles.
  template <class Problem>
  CUTLASS_DEVICE auto load_init(const Problem& problem, const Params& params) const {
    return tuple_cat(Base::load_init(problem, params),
                     Base::load_init(params.adapter.shared_shape(problem), params.shared),
                     Base::load_init(params.adapter.task_shape(problem), params.task));
  }

  template <class Inputs, class Block, class Iterator>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState state, const Inputs& inputs,
                           const Block& block, Iterator, const TileSteps& steps, int thread, uint32_t rank_in_cluster,
                           TensorStorage& shared_memory) {
    const auto load_pair = [&](const typename Base::Params& pair, const auto& a, const auto& b, const auto& at,
                               int count) {
      Base::load(pair, pipeline, state, cute::make_tuple(a, b), at, make_coord_iterator(shape<3>(a)), count, thread,
                 rank_in_cluster, shared_memory);
      state.advance(count);
    };
    const AdapterParams& adapter = params.adapter;
    load_pair(params.shared, get<2>(inputs), get<3>(inputs), block, adapter.steps.rank);
    const int slots = adapter.steps.slots(steps.tile.m);
    for (int i = 0; i < slots; ++i) {
      const int slot = steps.tile.m / kClusterM * adapter.slots_per_group + i, task = adapter.slot_task[slot];
      // Base::load takes one batch index for both operands: that of the task, so the left one starts at slot - task.
      load_pair(params.task, domain_offset(make_coord(0, 0, 0, 0, slot - task), get<4>(inputs)), get<5>(inputs),
                make_coord(steps.tile.m % kClusterM, steps.tile.n, _, task), adapter.steps.slot);
    }
    load_pair(params, get<0>(inputs), get<1>(inputs), block, steps.base);
  }
};

// --- dropout -------------------------------------------------------------------------------------

// An instruction whose products are always added to the accumulators, whatever a main loop sets accumulate_ to.
template <class Instruction>
struct Accumulating : Instruction {};

struct AlwaysOne {
  template <class Value>
  CUTLASS_DEVICE AlwaysOne& operator=(Value) {
    return *this;
  }
  CUTLASS_DEVICE operator GMMA::ScaleOut() const { return GMMA::ScaleOut::One; }
};

}  // namespace lilora::hopper

template <class Instruction>
struct cute::MMA_Traits<lilora::hopper::Accumulating<Instruction>> : cute::MMA_Traits<Instruction> {
  lilora::hopper::AlwaysOne accumulate_;
};

namespace lilora::hopper {

template <class Collective>
struct AccumulatingCollective;
template <class Policy, class Tile, class A, class StrideA, class B, class StrideB, class Instruction, class... Layouts,
          class... Rest>
struct AccumulatingCollective<cutlass::gemm::collective::CollectiveMma<
    Policy, Tile, A, StrideA, B, StrideB, TiledMMA<MMA_Atom<Instruction>, Layouts...>, Rest...>> {
  using type =
      cutlass::gemm::collective::CollectiveMma<Policy, Tile, A, StrideA, B, StrideB,
                                               TiledMMA<MMA_Atom<Accumulating<Instruction>>, Layouts...>, Rest...>;
};

// Whether accumulators lie where apply_dropout takes them to be. A place is a sum of what thread and value give each,
// so all values of one thread and one value of all threads decide.
template <class Mma>
constexpr bool mask_fits(Mma mma) {
  constexpr auto place = mma.get_layoutC_TV();  // (thread, value) -> row + kTileM * column
  bool fits = size<0>(place) == 2 * cutlass::NumThreadsPerWarpGroup && size<1>(place) == kMaskBatches * 8;
  for (int thread = 0; thread < 256; ++thread) {
    for (int i = 0; i < (thread == 0 ? kMaskBatches * 8 : 1); ++i) {
      const TileIndex at = mask_place(thread, i / 8, i / 2 % 4);
      fits &= mask_accumulator(i / 8, i / 2 % 4, i % 2) == i;
      fits &= place(thread, i) == at.m + kTileM * (at.n * 8 + thread % 4 * 2 + i % 2);
    }
  }
  return fits;
}

// Runs the base's main loop twice with the mask in between.
template <class Collective>
struct DropoutMainloop : AdapterMainloop<typename AccumulatingCollective<Collective>::type> {
  using Base = typename AccumulatingCollective<Collective>::type;
  using typename AdapterMainloop<Base>::MainloopPipeline;
  using typename AdapterMainloop<Base>::PipelineState;
  using typename AdapterMainloop<Base>::TensorStorage;
  using typename AdapterMainloop<Base>::Params;

  template <class Accumulators>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState state, Accumulators& accumulators,
                          const TileSteps& steps, int thread, TensorStorage& shared_memory, const Params& params) {
    static_assert(mask_fits(typename Base::TiledMma{}));
    clear(accumulators);
    int count = steps;
    if (params.adapter.dropout.seed != nullptr) {
      Base::mma(pipeline, state, accumulators, steps.adapter, thread, shared_memory, params);
      Base::mma_tail(pipeline, state, steps.adapter);
      warpgroup_fence_operand(accumulators);
      state.advance(steps.adapter);
      apply_dropout(accumulators, params.adapter.dropout, thread, int64_t{steps.tile.m} * kTileM,
                    int64_t{steps.tile.n} * kTileN);
      count = steps.base;
    }
    Base::mma(pipeline, state, accumulators, count, thread, shared_memory, params);
  }
};

// --- kernel and launch ---------------------------------------------------------------------------

// LayoutB: row-major for a right operand [inner, N], column-major for [N, inner].
template <class Element, class LayoutB, template <class> class MainloopOf>
struct Gemm {
  static constexpr int kAlignment = 8;
  using RowMajor = cutlass::layout::RowMajor;

  // accumulators + bias; a null bias is zero
  using Output = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, Element, float, cutlass::FloatRoundStyle::round_to_nearest>,
      cutlass::epilogue::fusion::Sm90AccFetch,
      cutlass::epilogue::fusion::Sm90RowBroadcast<0, TileShape, Element, float>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, kAlignment, Element, RowMajor,
      kAlignment, cutlass::epilogue::TmaWarpSpecializedCooperative, Output>::CollectiveOp;
  using Collective = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element, LayoutB, kAlignment,
      float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Mainloop = MainloopOf<Collective>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue, TileSchedulerTag>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  static_assert(Kernel::SharedStorageSize <= cutlass::gemm::collective::detail::sm90_smem_capacity_bytes);

  using StrideB = typename Collective::StrideB;
  static StrideB stride_b(int64_t row, int64_t batch) {
    StrideB stride = {};
    get<std::is_same_v<LayoutB, RowMajor> ? 1 : 0>(stride) = row;
    get<2>(stride) = batch;
    return stride;
  }
  // a [m, inner] and b as LayoutB says, both row by row in memory.
  static typename Mainloop::Pair pair(const void* a, int64_t a_row, int64_t a_batch, const void* b, int64_t b_row,
                                      int64_t b_batch) {
    return {static_cast<const Element*>(a),
            {a_row, _1{}, a_batch},
            static_cast<const Element*>(b),
            stride_b(b_row, b_batch)};
  }

  static void run(int64_t m, int64_t n, int64_t inner, const typename Mainloop::Arguments& mainloop, const void* bias,
                  void* output, int64_t output_stride, Stream stream) {
    typename Kernel::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                         {static_cast<int>(m), static_cast<int>(n), static_cast<int>(inner), 1},
                                         mainloop};
    arguments.epilogue.thread = {{}, {static_cast<const Element*>(bias)}, {}};
    arguments.epilogue.ptr_D = static_cast<Element*>(output);
    arguments.epilogue.dD = {output_stride, _1{}, int64_t{0}};
    arguments.hw_info.sm_count = processors();
    arguments.scheduler.raster_order = TileScheduler::RasterOrderOptions::AlongN;
    arguments.scheduler.steps = mainloop.adapter.steps;
    Device device;
    const cutlass::Status status = device.run(arguments, nullptr, stream);
    if (status != cutlass::Status::kSuccess) {
      throw std::runtime_error(std::string("lilora_cuda: a Hopper product failed: ") + cutlassGetStatusString(status));
    }
  }
};

inline int steps_of(int inner) { return static_cast<int>(lilora::ceil_div(inner, kTileK)); }

template <class Element>
void forward(const ForwardParams& p, Stream stream) {
  using Product = Gemm<Element, cutlass::layout::ColumnMajor, AdapterMainloop>;
  const int r = static_cast<int>(p.r), s = static_cast<int>(p.s);
  typename Product::Mainloop::Arguments mainloop{};
  mainloop.base = Product::pair(p.x, p.x_stride, 0, p.weight, p.weight_stride, 0);
  mainloop.shared = Product::pair(p.q, p.q_stride, 0, p.b0, r, 0);
  mainloop.task = Product::pair(p.slots.z, s, int64_t{kSlotRows} * s, p.u, s, p.n * s);
  AdapterParams& adapter = mainloop.adapter;
  adapter.steps = {steps_of(r), steps_of(s), p.tasks == 0 ? nullptr : p.slots.count};
  adapter.rank = r;
  adapter.sub_rank = s;
  adapter.slots_per_group = slots_per_group(p.tasks);
  adapter.batches = larger(static_cast<int>(slot_capacity(p.m, p.tasks)), static_cast<int>(p.tasks));
  adapter.slot_task = p.slots.task;
  Product::run(p.m, p.n, p.k, mainloop, p.bias, p.y, p.y_stride, stream);
}

template <class Element>
void input_gradient(const InputGradientParams& p, Stream stream) {
  using Product = Gemm<Element, cutlass::layout::RowMajor, DropoutMainloop>;
  const int r = static_cast<int>(p.r);
  typename Product::Mainloop::Arguments mainloop{};
  mainloop.base = Product::pair(p.dy, p.dy_stride, 0, p.weight, p.weight_stride, 0);
  mainloop.shared = Product::pair(p.dh, p.dh_stride, 0, p.a, p.k, 0);
  mainloop.adapter.steps.rank = steps_of(r);
  mainloop.adapter.rank = r;
  mainloop.adapter.dropout = {p.seed, p.threshold, 65536.0f / static_cast<float>(65536 - p.threshold)};
  Product::run(p.m, p.k, p.n, mainloop, nullptr, p.dx, p.dx_stride, stream);
}

}  // namespace lilora::hopper
