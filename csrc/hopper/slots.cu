// Slots: which tasks occur in each group of rows, and their rows of z.

#include "hopper/checks.h"
#include "hopper/index.h"

namespace lilora::hopper {
namespace {

constexpr int kThreads = kSlotRows;  // one for each row of a group
constexpr int kMostParts = 8;        // blocks that share the copies of one group

struct Launch {
  SlotsParams slots;
  int parts;
};

struct Shared {
  int task[kSlotRows], first[kSlotRows], slot[kSlotRows];
  bool exists[kSlotRows];
};

KERNEL(kThreads, 1) fill(Launch launched) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const SlotsParams& p = launched.slots;
  const int i = threadIdx.x, tasks = static_cast<int>(p.tasks), parts = launched.parts;
  const int64_t group = blockIdx.x / parts;
  const int part = blockIdx.x % parts;
  const int64_t first_row = group * kSlotRows, first_slot = group * slots_per_group(tasks);

  const int id = first_row + i >= p.m ? -1 : p.task == nullptr ? 0 : p.task[first_row + i];
  shared.task[i] = slot_task(id, tasks);
  shared.exists[i] = id < tasks;
  __syncthreads();
  shared.first[i] = first_of_task(shared.task, i);
  __syncthreads();
  const int first = shared.first[i], count = slots_before(shared.first, kSlotRows);
  const int slot = first < 0 ? -1 : slots_before(shared.first, first);
  shared.slot[i] = slot;
  if (part == 0) {
    if (i == 0) p.slots.count[group] = count;
    if (first == i) p.slots.task[first_slot + slot] = shared.task[i];
  }
  __syncthreads();

  const int chunks = static_cast<int>(p.s) / kPerChunk;  // of a row
  Chunk* to = static_cast<Chunk*>(p.slots.z) + first_slot * kSlotRows * chunks;
  for (int c = part * kThreads + i; c < count * kSlotRows * chunks; c += parts * kThreads) {
    const int row = c / chunks % kSlotRows;
    Chunk chunk = {};
    if (shared.slot[row] == c / chunks / kSlotRows) {
      const Half* z = static_cast<const Half*>(p.z) + (first_row + row) * p.z_stride;
      constexpr uint32_t kNaN = 0x7FFF7FFFu;  // two of either element type
      chunk = shared.exists[row] ? reinterpret_cast<const Chunk*>(z)[c % chunks] : Chunk{{kNaN, kNaN, kNaN, kNaN}};
    }
    to[c] = chunk;
  }
}

}  // namespace

int64_t slot_rows() { return kSlotRows; }
int64_t slot_groups(int64_t m) { return ceil_div(m, kSlotRows); }
int64_t slot_capacity(int64_t m, int64_t tasks) { return slot_groups(m) * slots_per_group(tasks); }

void fill_slots(const SlotsParams& params, void* stream) {
  require_multiples_of_8({{"S", params.s}, {"z's row stride", params.z_stride}});
  require_aligned({{"z", params.z}, {"slots.z", params.slots.z}});
  if (params.m == 0) return;
  const int parts = smaller(slots_per_group(params.tasks), kMostParts);
  const int blocks = static_cast<int>(slot_groups(params.m)) * parts;
  launch(fill, Launch{params, parts}, blocks, kThreads, sizeof(Shared), Together::kNo, static_cast<Stream>(stream));
}

}  // namespace lilora::hopper
