// What the launchers of both directions share: the kernel of a type and tile size, shared memory, grids.
#pragma once

#include "adapter.h"

namespace lilora {

constexpr int kManyRows = 128;    // of a tile
constexpr int kFewRowsUpTo = 64;  // rows of a call that is worked on in smaller tiles

// The instantiation for a type and a number of rows of a tile: pick(T{}, integral constant).
template <int kFewRows, typename Pick>
auto instantiation(Type type, int tile_rows, Pick pick) {
  using Many = std::integral_constant<int, kManyRows>;
  using Few = std::integral_constant<int, kFewRows>;
  if (type == Type::kHalf) return tile_rows == kManyRows ? pick(Half{}, Many{}) : pick(Half{}, Few{});
  return tile_rows == kManyRows ? pick(BFloat16{}, Many{}) : pick(BFloat16{}, Few{});
}

// Bytes of shared memory for a panel and so many stages, both in chunks.
inline int shared_bytes(int panel, int stages, int stage) {
  return Workspace<kManyRows>::kListBytes + (panel + stages * stage) * 16;
}

// Steps over the columns of q and of z.
inline int panel_steps(int rank, int sub_rank) {
  return static_cast<int>(ceil_div(padded(rank), kDepth) + ceil_div(padded(sub_rank), kDepth));
}

// A pipeline of two stages at least, of kMostStages at best, within what a block may have.
struct Need {
  int panel, stage;  // in chunks
};
template <size_t kCount>
bool fits(const Need (&needs)[kCount]) {
  for (const Need& need : needs) {
    if (shared_bytes(need.panel, 2, need.stage) > largest_shared_memory()) return false;
  }
  return true;
}
template <size_t kCount>
int shared_for(const Need (&needs)[kCount]) {
  int most = 0;
  for (const Need& need : needs) {
    most = larger(most, shared_bytes(need.panel, kMostStages, need.stage));
  }
  return smaller(most, largest_shared_memory());
}

// Runs phases first..last of `params` with `kernel`; items(phase): how much work a phase has.
template <typename Params, typename Items>
void run_phases(void (*kernel)(Params), Params params, bool one_launch, Stream stream, Items items) {
  const int first = params.launch.first, last = params.launch.last;
  auto launch_phases = [&](Together together) {
    int64_t most = 1;
    for (int phase = params.launch.first; phase <= params.launch.last; ++phase) {
      most = items(phase) > most ? items(phase) : most;
    }
    const int blocks = most < params.launch.blocks ? static_cast<int>(most) : params.launch.blocks;
    return launch(kernel, params, blocks, kThreads, params.launch.shared, together, stream);
  };
  if (one_launch && launch_phases(Together::kCooperative)) return;
  for (int phase = first; phase <= last; ++phase) {
    if (items(phase) == 0) continue;
    params.launch.first = params.launch.last = phase;
    launch_phases(Together::kDependent);
  }
}

}  // namespace lilora
