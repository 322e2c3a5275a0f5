// What the launchers of both directions share: the kernel of a type and tile size, shared memory, grids.
#pragma once

#include <array>

#include "adapter.h"

namespace lilora {

constexpr int kManyRows = 128;    // of a tile
constexpr int kFewRowsUpTo = 64;  // rows of a call that is worked on in smaller tiles

// The instantiations for a type and a number of rows of a tile: pick(T{}, integral constant).
template <int kFewRows, typename Pick>
auto instantiation(Type type, int tile_rows, Pick pick) {
  using Many = std::integral_constant<int, kManyRows>;
  using Few = std::integral_constant<int, kFewRows>;
  if (type == Type::kHalf) return tile_rows == kManyRows ? pick(Half{}, Many{}) : pick(Half{}, Few{});
  return tile_rows == kManyRows ? pick(BFloat16{}, Many{}) : pick(BFloat16{}, Few{});
}

// Steps over the columns of q and of z.
inline int panel_steps(int rank, int sub_rank) {
  return static_cast<int>(ceil_div(padded(rank), kDepth) + ceil_div(padded(sub_rank), kDepth));
}

// What the products of a phase keep in shared memory, in chunks: a panel and the stages of a pipeline, two at least and
// kMostStages at best. Those of another kind of its products have no panel.
struct Need {
  int panel, stage, other_stage = 0;

  int bytes(int stages) const {
    return Workspace<kManyRows>::kListBytes + larger(panel + stages * stage, stages * other_stage) * 16;
  }
};
template <size_t kNeeds>
int bytes_for(const std::array<Need, kNeeds>& needs, int stages) {
  int most = 0;
  for (const Need& need : needs) most = larger(most, need.bytes(stages));
  return most;
}

constexpr int kAll = -1;  // in place of a phase: all of them in one launch

template <int kFirst, int kLast, typename Params, typename RunItem>
DEVICE void run_phases(const Params& p, RunItem run_item) {
  for (int item = blockIdx.x; item < p.items(kFirst); item += gridDim.x) run_item(kFirst, item);
  if constexpr (kFirst < kLast) {
    meet(p.launch.state);
    run_phases<kFirst + 1, kLast>(p, run_item);
  }
}

// What a kernel does: the items of one phase, or of all with a barrier of the grid between two.
//
// The first phase waits before it lets the next one begin: whatever was written before the call may be read in any other phase
// before that waits itself. kWaits: here, rather than in the items.
template <int kPhase, bool kWaits = true, typename Params, typename RunItem>
DEVICE void run_launch(const Params& p, RunItem run_item) {
  if (kPhase > 0) allow_next_kernel();
  if (kWaits) wait_for_previous_kernel();
  if (kPhase <= 0) allow_next_kernel();
  run_phases<kPhase == kAll ? 0 : kPhase, kPhase == kAll ? Params::kPhases - 1 : kPhase>(p, run_item);
}

// A kernel, and what the phases in it need.
template <typename Params, size_t kNeeds>
struct Kernel {
  void (*function)(Params);
  std::array<Need, kNeeds> needs;
  bool loops = true;  // over the items of a block; else each has a block

  // Bytes of shared memory of a block: for as many blocks of a processor as its registers allow and have two stages each.
  int shared() const {
    constexpr int kReserved = 1024;  // of each block
    int blocks = resident_blocks(function, kThreads, 0) / processors();
    auto room = [&] { return (largest_shared_memory() + kReserved) / blocks - kReserved; };
    while (blocks > 1 && bytes_for(needs, 2) > room()) --blocks;
    return smaller(bytes_for(needs, kMostStages), room());
  }
  int blocks() const { return resident_blocks(function, kThreads, shared()); }  // that the device holds at once

  bool launch(Params params, int items, Together together, Stream stream) const {
    const int bytes = params.launch.shared = shared();
    const int most = resident_blocks(function, kThreads, bytes);
    return lilora::launch(function, params, loops ? smaller(items, most) : items, kThreads, bytes, together, stream);
  }
};

// Those of a direction: one for each phase, and one of all.
template <typename Params>
struct Kernels {
  static constexpr int kPhases = Params::kPhases;
  std::array<void (*)(Params), kPhases> of_phase;
  void (*of_all)(Params);
  std::array<Need, kPhases> needs;
  bool last_loops = true;

  Kernel<Params, 1> phase(int i) const { return {of_phase[i], {needs[i]}, last_loops || i < kPhases - 1}; }
  Kernel<Params, kPhases> all() const { return {of_all, needs}; }

  void run(const Params& params, bool one_launch, Stream stream) const {
    int most = 1;
    for (size_t i = 0; i < kPhases; ++i) most = larger(most, params.items(i));
    if (one_launch && all().launch(params, most, Together::kCooperative, stream)) return;
    for (size_t i = 0; i < kPhases; ++i) {
      if (params.items(i) > 0) phase(i).launch(params, params.items(i), Together::kDependent, stream);
    }
  }
};

}  // namespace lilora
