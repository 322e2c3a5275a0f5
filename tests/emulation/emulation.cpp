// The device of emulation.h: threads, memory, tensor cores.
#include "emulation.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <cstdlib>
#include <deque>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "platform.h"

namespace lilora {
namespace emulation {

Indices indices;
int processors = 3, largest_shared = 227 << 10;
unsigned order = 0;
Copies copies = Copies::kLate;
int launches = 0;
bool launches_nothing = false;
int64_t launched_blocks = 0, copied = 0, stored = 0;
const uint8_t* watched = nullptr;
int64_t watched_size = 0, watched_bytes = 0;
std::string missing_code;

namespace {

constexpr int kLanes = 32, kGroupLanes = 128;  // of a warp, of a warpgroup
constexpr size_t kStack = 256 << 10;
constexpr int kPoison = 0xFF;  // NaN in every type

struct Copy {
  uint8_t* to;
  const uint8_t* from;
  int bytes, group;
};

// A thread. Between launches it waits in run_fiber; its stack stays.
struct Fiber {
  jmp_buf state;
  ucontext_t start;
  uint8_t* stack;
  unsigned block, thread;
  bool started = false;
  bool waited;  // for the kernel before this one
  uint32_t published;  // the time of its last publish_shared
  int committed;
  std::vector<Copy> copies;  // under way
};

// Threads that wait for each other, and what they brought.
struct Meeting {
  std::vector<Fiber*> waiting;
  const void* brought[kGroupLanes][3];
};

// Who touched an element last, and when: times count barriers and fences.
struct Actor {
  uint16_t block, thread;
};
constexpr uint16_t kAtomic = 0xFFFD, kSeveral = 0xFFFE;  // in place of a thread, or of a block
struct Cell {
  uint32_t wrote = 0, read = 0;
  Actor writer, reader;
};

// What a launch leaves in cells is older than the next one.
struct Block {
  std::vector<uint8_t> shared;
  std::vector<Cell> pairs, bytes;  // of shared memory by two bytes, and by one for what is accessed so
  uint32_t since;  // the time of the last barrier
  std::vector<Fiber*> fibers;
  Meeting all;
  std::vector<Meeting> warps, groups;
  std::vector<std::array<float, 96>> products;  // of each thread, between begin_products and end_products
};

std::deque<Block> blocks;  // kept for the next launch, as threads are

struct Grid {
  std::deque<Fiber*> ready;
  std::vector<Fiber*> meeting;  // at the barrier of the grid
  int* arrived = nullptr;       // of the state of that barrier
  unsigned schedule;            // who of them goes on: 0 the one that waits longest, 1 the last one, 2 any
  uint32_t begin;               // its time
  uint32_t since;               // the time of the last barrier of the grid
  int alive, threads;
  void (*body)(const void*, const void*);
  const void *kernel, *params;
  size_t params_size;
  bool dependent;
  bool allowed_early = false;  // the next kernel, before it had waited itself
  std::string error;
  jmp_buf finished;
};
Grid* grid = nullptr;
Fiber* self = nullptr;  // whose turn it is; null while no kernel runs
Block* home = nullptr;  // its block
uint32_t now = 0;  // the time
uint32_t ordered_since = 0;  // what was written before this time has been waited for; 0: nothing has

unsigned random() {
  order = order * 1664525u + 1013904223u;
  return order >> 8;
}

[[noreturn]] void fail(const std::string& what) {
  const std::string where = ": block " + std::to_string(self->block) + ", thread " + std::to_string(self->thread);
  grid->error = what + where;
  _longjmp(grid->finished, 1);
}

// A store to what another thread of the block has written: no race if it changes nothing, which is seen afterwards.
struct SecondStore {
  const void* at = nullptr;
  uint64_t before;
  size_t size;
  Actor actor, other;
} second_store;

// --- turns -----------------------------------------------------------------------------------------------------------

void land(Fiber& fiber, size_t i);
void check_second_store();

[[noreturn]] void run_next() {
  if (second_store.at != nullptr) check_second_store();
  if (grid->ready.empty()) fail("threads wait for others that have ended or wait elsewhere; the last one to wait");
  auto& ready = grid->ready;
  if (grid->schedule == 2) std::swap(ready.front(), ready[random() % ready.size()]);
  if (grid->schedule == 1) {
    self = ready.back();
    ready.pop_back();
  } else {
    self = ready.front();
    ready.pop_front();
  }
  home = &blocks[self->block];
  indices.thread.x = self->thread;
  indices.block.x = self->block;
  if (self->started) _longjmp(self->state, 1);
  self->started = true;
  setcontext(&self->start);
  std::abort();
}

void run_fiber() {
  while (true) {
    grid->body(grid->kernel, grid->params);
    if (!self->copies.empty()) fail("a thread ends without waiting for its copies");
    if (--grid->alive == 0) {
      if (_setjmp(self->state) == 0) _longjmp(grid->finished, 1);
    } else if (_setjmp(self->state) == 0) {
      run_next();
    }
  }
}

// Lets others run until somebody wakes this thread.
void wait_in(std::vector<Fiber*>& waiting) {
  waiting.push_back(self);
  if (copies == Copies::kRandom) {
    for (size_t i = self->copies.size(); i-- > 0;) {
      if (random() % 4 == 0) land(*self, i);
    }
  }
  if (_setjmp(self->state) == 0) run_next();
}

void wake(std::vector<Fiber*>& waiting) {
  if (order != 0) {
    for (size_t i = waiting.size(); i-- > 1;) std::swap(waiting[i], waiting[random() % (i + 1)]);
  }
  grid->ready.insert(grid->ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

// The last of `count` to arrive runs `act`, then all go on.
template <typename Act>
void meet(std::vector<Fiber*>& waiting, int count, Act act) {
  if (static_cast<int>(waiting.size()) + 1 < count) return wait_in(waiting);
  act();
  wake(waiting);
}

// Collective of a warp or warpgroup: act(brought), where brought[lane] are the pointers that the lanes gave.
template <typename Act>
void together(std::vector<Meeting>& meetings, int lanes, const void* a, const void* b, const void* c, Act act) {
  Meeting& meeting = meetings[self->thread / lanes];
  const void** mine = meeting.brought[self->thread % lanes];
  mine[0] = a;
  mine[1] = b;
  mine[2] = c;
  meet(meeting.waiting, lanes, [&] { act(meeting.brought); });
}
template <typename Act>
void warp(const void* a, const void* b, const void* c, Act act) {
  together(home->warps, kLanes, a, b, c, act);
}
template <typename Act>
void warpgroup(const void* a, const void* b, const void* c, Act act) {
  together(home->groups, kGroupLanes, a, b, c, act);
}

// --- memory ----------------------------------------------------------------------------------------------------------

// Global memory that kernels touched, by pages.
constexpr uintptr_t kPage = 4096;
struct Page {
  Cell pairs[kPage / 2], bytes[kPage];
};
std::unordered_map<uintptr_t, Page*> pages;
std::array<std::pair<uintptr_t, Page*>, 256> recent_pages;

Page& page_of(uintptr_t at) {
  const uintptr_t number = at / kPage;
  auto& recent = recent_pages[number % recent_pages.size()];
  if (recent.first != number || recent.second == nullptr) {
    Page*& page = pages[number];
    if (page == nullptr) page = new Page();
    recent = {number, page};
  }
  return *recent.second;
}

// An address in terms of what the kernel was given: the parameter that points closest below it.
std::string named(uintptr_t at) {
  uintptr_t closest = 0;
  size_t offset = 0;
  for (size_t i = 0; i + 8 <= grid->params_size; i += 8) {
    uintptr_t value;
    std::memcpy(&value, static_cast<const uint8_t*>(grid->params) + i, 8);
    if (value <= at && value > closest) {
      closest = value;
      offset = i;
    }
  }
  return "global memory " + std::to_string(at - closest) + " bytes behind the pointer at byte " + std::to_string(offset) +
         " of the parameters";
}
std::string named(const Actor& actor) {
  const std::string thread = actor.thread == kSeveral  ? "several threads"
                             : actor.thread == kAtomic ? "an atomic operation"
                                                       : "thread " + std::to_string(actor.thread);
  return actor.block == kSeveral ? "several blocks" : thread + " of block " + std::to_string(actor.block);
}

// Whether what `other` did at `time` may still be under way for `actor`.
bool unordered(uint32_t time, const Actor& other, const Actor& actor) {
  if (other.block != actor.block) return time >= grid->since;
  return time >= blocks[actor.block].since && (other.thread != actor.thread || other.thread == kSeveral);
}

[[noreturn]] void fail_race(uintptr_t at, bool write, const Actor& actor, bool other_wrote, const Actor& other) {
  const uintptr_t in_shared = at - reinterpret_cast<uintptr_t>(blocks[actor.block].shared.data());
  fail((in_shared < blocks[actor.block].shared.size() ? "byte " + std::to_string(in_shared) + " of shared memory"
                                                            : named(at)) +
       " is " + (write ? "written" : "read") + " by " + named(actor) + " and " + (other_wrote ? "written" : "read") + " by " +
       named(other) + " without a barrier in between");
}

void check_second_store() {
  const SecondStore store = second_store;
  second_store.at = nullptr;
  if (std::memcmp(store.at, &store.before, store.size) != 0) {
    fail_race(reinterpret_cast<uintptr_t>(store.at), true, store.actor, true, store.other);
  }
}

// since: what is older is ordered before everything that happens now.
[[gnu::always_inline]] inline void touch(Cell* cells, size_t count, bool write, const Actor& actor, uintptr_t at, size_t size, uint32_t since) {
  for (Cell* cell = cells; cell < cells + count; ++cell) {
    if (cell->wrote >= since && unordered(cell->wrote, cell->writer, actor)) {
      if (!write || size > 8 || cell->writer.block != actor.block) fail_race(at, write, actor, true, cell->writer);
      second_store = {reinterpret_cast<const void*>(at), 0, size, actor, cell->writer};
      std::memcpy(&second_store.before, second_store.at, size);
    }
    if (write && cell->read >= since && unordered(cell->read, cell->reader, actor)) fail_race(at, true, actor, false, cell->reader);
    if (write) {
      cell->wrote = now;
      cell->writer = actor;
    } else {
      // A reader that still counts stays one of those who read.
      if (cell->read < since) {
        cell->reader = actor;
      } else if (cell->reader.block != actor.block) {
        cell->reader = {kSeveral, kSeveral};
      } else if (cell->reader.thread != actor.thread) {
        cell->reader.thread = cell->read < home->since ? actor.thread : kSeveral;
      }
      cell->read = now;
    }
  }
}

// For what is read before this thread has waited for the kernel before.
void check_early(const Cell* cells, size_t count, uintptr_t at) {
  for (const Cell* cell = cells; cell < cells + count; ++cell) {
    if (cell->wrote >= ordered_since) fail(named(at) + " is read before the kernel that writes it has ended");
  }
}

void access_global(uintptr_t at, size_t size, bool write, const Actor& actor) {
  if (at - reinterpret_cast<uintptr_t>(grid->params) < grid->params_size) return;
  if (at - reinterpret_cast<uintptr_t>(&indices) < sizeof(indices)) return;
  const bool early = grid->dependent && !self->waited;
  if (early && (write || ordered_since == 0)) fail(named(at) + " is touched before the kernel before this one has ended");
  if (size == 1) {
    if (early) check_early(&page_of(at).bytes[at % kPage], 1, at);
    return touch(&page_of(at).bytes[at % kPage], 1, write, actor, at, 1, grid->since);
  }
  while (size > 0) {
    const size_t first = at % kPage, part = size < kPage - first ? size : kPage - first;
    if (early) check_early(&page_of(at).pairs[first / 2], part / 2, at);
    touch(&page_of(at).pairs[first / 2], part / 2, write, actor, at, part, grid->since);
    at += part;
    size -= part;
  }
}

[[gnu::always_inline]] inline void access(const void* p, size_t size, bool write, uint16_t thread) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at - reinterpret_cast<uintptr_t>(self->stack) < kStack) return;
  if (second_store.at != nullptr) check_second_store();
  const Actor actor = {static_cast<uint16_t>(self->block), thread};
  const uintptr_t in_shared = at - reinterpret_cast<uintptr_t>(home->shared.data());
  if (in_shared >= home->shared.size()) return access_global(at, size, write, actor);
  if (in_shared + size > home->shared.size()) fail("an access leaves shared memory");
  if (size == 1) return touch(&home->bytes[in_shared], 1, write, actor, at, size, home->since);
  touch(&home->pairs[in_shared / 2], size / 2, write, actor, at, size, home->since);
}

void land(Fiber& fiber, size_t i) {
  const Copy copy = fiber.copies[i];
  fiber.copies.erase(fiber.copies.begin() + static_cast<std::ptrdiff_t>(i));
  if (copy.bytes > 0) access(copy.from, copy.bytes, false, static_cast<uint16_t>(fiber.thread));
  access(copy.to, 16, true, static_cast<uint16_t>(fiber.thread));
  std::memset(copy.to, 0, 16);
  if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
}

// --- tensor cores ----------------------------------------------------------------------------------------------------

void widen(bool half, float* to, const void* from, int count) {
  const uint16_t* bits = static_cast<const uint16_t*>(from);
  for (int i = 0; i < count; ++i) to[i] = half ? half_to_float(bits[i]) : bfloat16_to_float(bits[i]);
}

// What wgmma reads: [16, rows], from the bits of a descriptor of 128-byte swizzle of a matrix [rows, 16]. It sees what
// whoever wrote it has published since.
void read_operand(bool half, bool transposed, uint64_t descriptor, int rows, float* values) {
  auto bytes = [&](int first_bit) { return static_cast<uint32_t>(descriptor >> first_bit & 0x3FFF) * 16; };
  const uint32_t start = bytes(0), leading = bytes(16), stride = bytes(32);
  if ((descriptor & ~uint64_t{0x3FFF3FFF3FFF}) != uint64_t{1} << 62) fail("a descriptor is not one of 128-byte swizzle");
  Block& mine = *home;
  for (int i = 0; i < rows * 2; ++i) {  // chunks of eight
    const int row = transposed ? i / 16 * 8 : i / 2, k = transposed ? i % 16 : i % 2 * 8;
    uint32_t at = start + (transposed ? row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                                      : row / 8 * stride + row % 8 * 128 + k * 2);
    at ^= (at >> 7 & 7) << 4;
    if (at + 16 > mine.shared.size()) fail("a descriptor leaves shared memory");
    access(&mine.shared[at], 16, false, kSeveral);
    for (uint32_t pair = at / 2; pair < at / 2 + 8; ++pair) {
      const Cell& cell = mine.pairs[pair];
      if (cell.wrote >= grid->begin && cell.wrote > home->fibers[cell.writer.thread]->published) {
        fail("a product by a warpgroup reads what " + named(cell.writer) + " wrote behind its last fence");
      }
    }
    float eight[8];
    widen(half, eight, &mine.shared[at], 8);
    for (int j = 0; j < 8; ++j) values[(transposed ? k * rows + row + j : (k + j) * rows + row)] = eight[j];
  }
}

}  // namespace

float half_to_float(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (unsigned i = 0; i < values.size(); ++i) {
      const uint16_t each = static_cast<uint16_t>(i);
      _Float16 x;
      std::memcpy(&x, &each, 2);
      values[i] = static_cast<float>(x);
    }
    return values;
  }();
  return table[bits];
}
uint16_t float_to_half(float x) {
  const _Float16 narrow = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &narrow, 2);
  return bits;
}

uint8_t* shared_memory() { return home->shared.data(); }

void begin_call() { ordered_since = 0; }

void sync_block() {
  Block& mine = *home;
  meet(mine.all.waiting, grid->threads, [&] { mine.since = ++now; });
}

void load_matrices(bool transposed, uint32_t* r, const void* row) {
  access(row, 16, false, static_cast<uint16_t>(self->thread));
  warp(r, row, nullptr, [&](const void* (*brought)[3]) {
    uint16_t rows[kLanes][8];
    for (int i = 0; i < kLanes; ++i) std::memcpy(rows[i], brought[i][1], 16);
    for (int i = 0; i < kLanes; ++i) {
      uint16_t out[8];
      for (int m = 0; m < 4; ++m) {
        for (int j = 0; j < 2; ++j) {
          const int across = i % 4 * 2 + j, down = i / 4;
          out[2 * m + j] = transposed ? rows[8 * m + across][down] : rows[8 * m + down][across];
        }
      }
      std::memcpy(const_cast<void*>(brought[i][0]), out, 16);
    }
  });
}

void multiply(bool half, float* c, const uint32_t* a, const uint32_t* b) {
  warp(c, a, b, [&](const void* (*brought)[3]) {
    float left[16][16], right[16][8], sums[16][8];
    auto place = [](int i, int j) { return std::make_pair(i / 4 + j / 2 * 8, i % 4 * 2 + j % 2); };  // of element j of c
    for (int i = 0; i < kLanes; ++i) {
      float x[8], y[4];
      widen(half, x, brought[i][1], 8);
      widen(half, y, brought[i][2], 4);
      const int group = i / 4, pair = i % 4 * 2;
      for (int j = 0; j < 8; ++j) left[group + j / 2 % 2 * 8][pair + j % 2 + j / 4 * 8] = x[j];
      for (int j = 0; j < 4; ++j) right[pair + j % 2 + j / 2 * 8][group] = y[j];
      for (int j = 0; j < 4; ++j) sums[place(i, j).first][place(i, j).second] = static_cast<const float*>(brought[i][0])[j];
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) sums[row][column] += left[row][k] * right[k][column];
      }
    }
    for (int i = 0; i < kLanes; ++i) {
      float* out = static_cast<float*>(const_cast<void*>(brought[i][0]));
      for (int j = 0; j < 4; ++j) out[j] = sums[place(i, j).first][place(i, j).second];
    }
  });
}

void begin_products(float* c, int count) {
  std::memcpy(home->products[self->thread].data(), c, count * sizeof(float));
  std::memset(c, kPoison, count * sizeof(float));
}
void end_products(float* c, int count) {
  std::memcpy(c, home->products[self->thread].data(), count * sizeof(float));
}

void multiply_warpgroup(bool half, bool a_transposed, bool b_transposed, int tiles_n, uint64_t a, uint64_t b) {
  const uint64_t given[2] = {a, b};
  warpgroup(given, nullptr, nullptr, [&](const void* (*brought)[3]) {
    const int columns = 8 * tiles_n;
    static float left[16 * 64], right[16 * 192], sums[192];
    read_operand(half, a_transposed, a, 64, left);
    read_operand(half, b_transposed, b, columns, right);
    for (int i = 0; i < kGroupLanes; ++i) {
      if (std::memcmp(brought[i][0], given, sizeof(given)) != 0) {
        fail("the threads of a warpgroup gave different descriptors");
      }
    }
    auto* products = &home->products[self->thread / kGroupLanes * kGroupLanes];
    for (int row = 0; row < 64; ++row) {
      // Four lanes hold a row, two neighbours of each eight columns.
      const int first = row / 16 * 32 + row % 8 * 4, half_row = row / 8 % 2 * 2;
      for (int n = 0; n < columns; ++n) sums[n] = products[first + n % 8 / 2][n / 8 * 4 + half_row + n % 2];
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < columns; ++n) sums[n] += left[k * 64 + row] * right[k * columns + n];
      }
      for (int n = 0; n < columns; ++n) products[first + n % 8 / 2][n / 8 * 4 + half_row + n % 2] = sums[n];
    }
  });
}

// --- launches --------------------------------------------------------------------------------------------------------

namespace {

// The threads of a grid; their stacks are kept for the next one. `anew`: of a grid that was stopped.
std::deque<Fiber>& fibers_for(size_t count, bool anew) {
  static std::deque<Fiber> fibers;
  if (anew) {
    for (Fiber& fiber : fibers) fiber.started = false;
  }
  if (fibers.size() < count) {
    const size_t more = count - fibers.size();
    void* const stacks =
        mmap(nullptr, more * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) throw std::runtime_error("no memory for the threads of a grid");
    for (size_t i = 0; i < more; ++i) {
      fibers.emplace_back();
      fibers.back().stack = static_cast<uint8_t*>(stacks) + i * kStack;
    }
  }
  return fibers;
}

std::string name_of(const void* kernel) {
  Dl_info found;
  if (dladdr(kernel, &found) == 0 || found.dli_sname == nullptr) return "a kernel";
  char* const readable = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, nullptr);
  const std::string name = readable == nullptr ? found.dli_sname : readable;
  std::free(readable);
  return name;
}

}  // namespace

void launch(void (*body)(const void*, const void*), const void* kernel, const void* params, size_t params_size, int count,
            int threads, int shared, Together together) {
  ++launches;
  if (launches_nothing) return;
  launched_blocks += count;
  static bool stopped = false;  // the grid before
  const unsigned seed = order;
  std::deque<Fiber>& fibers = fibers_for(static_cast<size_t>(count) * threads, stopped);
  stopped = false;
  Grid all;
  grid = &all;
  all.schedule = order == 0 ? 0 : random() % 3;
  all.threads = threads;
  all.alive = count * threads;
  all.begin = all.since = ++now;
  all.body = body;
  all.kernel = kernel;
  all.params = params;
  all.params_size = params_size;
  all.dependent = together == Together::kDependent;
  while (static_cast<int>(blocks.size()) < count) blocks.emplace_back();
  for (int i = 0; i < count; ++i) {
    Block& b = blocks[i];
    b.shared.assign(shared, kPoison);
    if (b.bytes.size() < b.shared.size()) {
      b.pairs.resize(shared / 2 + 1);
      b.bytes.resize(shared);
    }
    b.since = now;
    b.fibers.clear();
    b.all = {};
    b.warps.assign(threads / kLanes, {});
    b.groups.assign(threads / kGroupLanes, {});
    b.products.resize(threads);
  }
  std::vector<Fiber*> begin;
  for (int i = 0; i < count * threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.block = static_cast<unsigned>(i / threads);
    fiber.thread = static_cast<unsigned>(i % threads);
    fiber.waited = false;
    fiber.published = 0;
    fiber.committed = 0;
    fiber.copies.clear();
    if (!fiber.started) {
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack;
      fiber.start.uc_stack.ss_size = kStack;
      makecontext(&fiber.start, run_fiber, 0);
    }
    blocks[fiber.block].fibers.push_back(&fiber);
    begin.push_back(&fiber);
  }
  wake(begin);
  indices.grid.x = static_cast<unsigned>(count);
  if (_setjmp(all.finished) == 0) run_next();
  if (!all.dependent || !all.allowed_early) ordered_since = ordered_since == 0 ? all.begin : ordered_since;
  grid = nullptr;
  self = nullptr;
  if (!all.error.empty()) {
    stopped = true;
    if (all.arrived != nullptr) *all.arrived = 0;  // the next launch has the same state
    throw std::runtime_error(name_of(kernel) + ": " + all.error + "; order " + std::to_string(seed));
  }
}

}  // namespace emulation

using emulation::self;

static void count_load(const void* from, int bytes) {
  emulation::copied += bytes;
  const int64_t offset = static_cast<const uint8_t*>(from) - emulation::watched;
  if (offset >= 0 && offset < emulation::watched_size) emulation::watched_bytes += bytes;
}

Chunk load_words(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Chunk) != 0) emulation::fail("a load of sixteen bytes is misaligned");
  count_load(from, sizeof(Chunk));
  emulation::access(from, sizeof(Chunk), false, static_cast<uint16_t>(self->thread));
  Chunk chunk;
  std::memcpy(&chunk, from, sizeof(Chunk));
  return chunk;
}

void copy_async(Chunk* to, const void* from, int bytes) {
  count_load(from, bytes);
  using namespace emulation;
  const uint16_t thread = static_cast<uint16_t>(self->thread);
  if (bytes > 0) access(from, bytes, false, thread);
  access(to, 16, true, thread);
  std::memset(static_cast<void*>(to), kPoison, 16);
  self->copies.push_back({reinterpret_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), bytes, self->committed});
  if (copies == Copies::kNow) land(*self, self->copies.size() - 1);
}
void commit_copies() { ++self->committed; }
void wait_copies(int pending) {
  for (size_t i = 0; i < self->copies.size();) {
    if (self->copies[i].group < self->committed - pending) {
      emulation::land(*self, i);
    } else {
      ++i;
    }
  }
}
void publish_shared() { self->published = emulation::now++; }
void store_words(void* to, const uint32_t* words, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) emulation::fail("a store of " + std::to_string(bytes) + " bytes is misaligned");
  emulation::stored += bytes;
  emulation::access(to, bytes, true, static_cast<uint16_t>(self->thread));
  std::memcpy(to, words, bytes);
}

float sum_of_four(float x) {
  float result = 0;
  emulation::warp(&x, &result, nullptr, [](const void* (*brought)[3]) {
    for (int i = 0; i < emulation::kLanes; ++i) {
      const int first = i / 4 * 4;
      auto given = [&](int j) { return *static_cast<const float*>(brought[first + j][0]); };
      const int j = i % 4;
      *static_cast<float*>(const_cast<void*>(brought[i][1])) = (given(j) + given(j ^ 1)) + (given(j ^ 2) + given(j ^ 3));
    }
  });
  return result;
}

uint32_t shuffle_words(uint32_t x, int lane) {
  uint32_t result = 0;
  emulation::warp(&x, &result, &lane, [](const void* (*brought)[3]) {
    for (int i = 0; i < emulation::kLanes; ++i) {
      const int from = *static_cast<const int*>(brought[i][2]);
      *static_cast<uint32_t*>(const_cast<void*>(brought[i][1])) = *static_cast<const uint32_t*>(brought[from][0]);
    }
  });
  return result;
}

void atomicMin(int* p, int x) {
  emulation::access(p, 4, true, emulation::kAtomic);
  *p = x < *p ? x : *p;
}
void atomicMax(int* p, int x) {
  emulation::access(p, 4, true, emulation::kAtomic);
  *p = x > *p ? x : *p;
}

void meet(int* state) {
  using namespace emulation;
  sync_block();
  if (self->thread == 0) {
    grid->arrived = state;
    if (++state[0] == static_cast<int>(indices.grid.x)) {
      state[0] = 0;
      ++state[1];
      grid->since = ++now;
      wake(grid->meeting);
    } else {
      wait_in(grid->meeting);
    }
  }
  sync_block();
}

void wait_for_previous_kernel() { self->waited = true; }
void allow_next_kernel() { emulation::grid->allowed_early |= !self->waited; }

int resident_blocks(int shared) {
  if (shared > emulation::largest_shared) throw std::runtime_error("a kernel wants too much shared memory");
  return emulation::processors;
}

}  // namespace lilora

// What g++ -fsanitize=thread has a kernel call before each access to memory.
extern "C" {
#define ACCESS(name, size, write)                                                                       \
  void __tsan_##name(const void* p) {                                                                   \
    if (lilora::emulation::self == nullptr) return;                                                     \
    lilora::emulation::access(p, size, write, static_cast<uint16_t>(lilora::emulation::self->thread)); \
  }
#define ACCESSES(size)                     \
  ACCESS(read##size, size, false)          \
  ACCESS(write##size, size, true)          \
  ACCESS(unaligned_read##size, size, false) \
  ACCESS(unaligned_write##size, size, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
#undef ACCESS
#undef ACCESSES
void __tsan_read_range(const void* p, size_t size) {
  if (lilora::emulation::self == nullptr) return;
  lilora::emulation::access(p, size, false, static_cast<uint16_t>(lilora::emulation::self->thread));
}
void __tsan_write_range(const void* p, size_t size) {
  if (lilora::emulation::self == nullptr) return;
  lilora::emulation::access(p, size, true, static_cast<uint16_t>(lilora::emulation::self->thread));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
}
