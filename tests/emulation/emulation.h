// Runs CUDA kernels on a CPU, for tests: every thread of every block of a grid is a fiber of its own, and all blocks are
// resident at once. Threads switch only where they wait for each other. Fresh shared memory is poisoned.
//
// Offers the names that csrc/platform.h offers under nvcc; the tensor-core instructions follow the layouts of the PTX ISA.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define HOST_DEVICE inline
#define DEVICE inline
#define PART inline
#define KERNEL_PARAMETER
#define KERNEL(threads) void
#define UNROLL
#define NO_UNROLL
#define __syncthreads() ::lilora::emulation::sync_block()

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace lilora {

struct Half;
struct BFloat16;
struct Chunk;
using Stream = void*;

namespace emulation {

constexpr int kLanes = 32, kGroupLanes = 128;  // of a warp, of a warpgroup
constexpr size_t kStack = 256 << 10;

// Lanes that wait for each other, and what they brought.
struct Meeting {
  int arrived = 0;
  uint64_t generation = 0;
  void* brought[kGroupLanes][3];
};

struct Block {
  std::vector<uint8_t> shared;
  std::vector<uint8_t> published;  // as all threads had left it when the last one called publish_shared
  int publishers = 0;
  Meeting all;
  std::vector<Meeting> warps, groups;
  std::vector<std::array<float, 96>> products;  // of each thread, between begin_products and end_products
};

struct Fiber {
  jmp_buf state;
  ucontext_t start;
  void* stack;
  unsigned block, thread;
  bool started = false, done = false;
};

struct Grid {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<int> order;  // in which fibers take their turns
  size_t turn = 0;
  int alive = 0;
  int threads = 0;
  std::function<void()> body;
  jmp_buf finished;
};
inline Grid* grid = nullptr;

inline Fiber& self() { return grid->fibers[grid->order[grid->turn]]; }
inline Block& block() { return grid->blocks[blockIdx.x]; }

// Whose turn is next: the one after this in order that has not ended.
inline size_t next_turn() {
  size_t next = grid->turn;
  do {
    next = (next + 1) % grid->fibers.size();
  } while (grid->fibers[grid->order[next]].done);
  return next;
}

[[noreturn]] inline void resume(size_t turn) {
  grid->turn = turn;
  Fiber& fiber = self();
  threadIdx.x = fiber.thread;
  blockIdx.x = fiber.block;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
  std::abort();
}

inline void run_fiber() {
  grid->body();
  self().done = true;
  if (--grid->alive == 0) _longjmp(grid->finished, 1);
  resume(next_turn());
}

// Lets all others run until the turn comes back.
inline void yield() {
  const size_t next = next_turn();
  if (next == grid->turn) throw std::logic_error("the last thread waits for others that have ended");
  if (_setjmp(self().state) == 0) resume(next);
}

// The last of `count` to arrive runs `act`, then all go on.
template <typename Act>
void meet(Meeting& meeting, int count, Act act) {
  const uint64_t generation = meeting.generation;
  if (++meeting.arrived == count) {
    act();
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  while (meeting.generation == generation) yield();
}

inline void sync_block() {
  meet(block().all, grid->threads, [] {});
}

// Collective of a warp or warpgroup: act(brought), where brought[lane] are the pointers that the lanes gave.
template <typename Act>
void together(std::vector<Meeting>& meetings, int lanes, void* a, void* b, void* c, Act act) {
  Meeting& meeting = meetings[threadIdx.x / lanes];
  void** mine = meeting.brought[threadIdx.x % lanes];
  mine[0] = a;
  mine[1] = b;
  mine[2] = c;
  meet(meeting, lanes, [&] { act(meeting.brought); });
}
template <typename Act>
void warp(void* a, void* b, void* c, Act act) {
  together(block().warps, kLanes, a, b, c, act);
}
template <typename Act>
void warpgroup(void* a, void* b, void* c, Act act) {
  together(block().groups, kGroupLanes, a, b, c, act);
}

inline float half_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}
inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
inline uint16_t float_to_half(float x) {
  const _Float16 narrow = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &narrow, 2);
  return bits;
}
inline uint16_t float_to_bfloat16(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  if (std::isnan(x)) return 0x7FFF;
  return static_cast<uint16_t>((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
}

inline unsigned random_state = 0;  // 0: threads take turns in order
inline int processors = 3;
inline int largest_shared = 227 << 10;
inline int launches = 0;
inline int64_t launched_blocks = 0, copied = 0;  // of all launches, and the bytes that they have copied
inline bool launches_nothing = false;  // to measure what the host does
inline const uint8_t* watched = nullptr;  // global memory of which the bytes that are copied are counted
inline int64_t watched_size = 0, watched_bytes = 0;
inline std::string missing_code;  // what a device without the code says

}  // namespace emulation

inline float to_float(float x) { return x; }
inline float to_float(Half x);
inline float to_float(BFloat16 x);
template <typename T>
T rounded(float x);

inline uint8_t* shared_memory() { return emulation::block().shared.data(); }
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - shared_memory());
}
inline int opaque(int x) { return x; }

inline void copy_async(Chunk* to, const void* from, int bytes) {
  emulation::copied += bytes;
  std::memset(static_cast<void*>(to), 0, 16);
  const int64_t at = static_cast<const uint8_t*>(from) - emulation::watched;
  if (at >= 0 && at < emulation::watched_size) emulation::watched_bytes += bytes;
  if (bytes > 0) std::memcpy(static_cast<void*>(to), from, bytes);
}
inline void commit_copies() {}
inline void wait_copies(int) {}
inline void publish_shared() {
  emulation::Block& block = emulation::block();
  if (++block.publishers < emulation::grid->threads) return;
  block.publishers = 0;
  block.published = block.shared;
}

template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], const Chunk* row) {
  emulation::warp(r, const_cast<Chunk*>(row), nullptr, [](void* (*brought)[3]) {
    uint16_t rows[emulation::kLanes][8];
    for (int i = 0; i < emulation::kLanes; ++i) std::memcpy(rows[i], brought[i][1], 16);
    for (int i = 0; i < emulation::kLanes; ++i) {
      uint16_t* out = static_cast<uint16_t*>(brought[i][0]);
      for (int m = 0; m < 4; ++m) {
        for (int j = 0; j < 2; ++j) {
          const int across = i % 4 * 2 + j, down = i / 4;
          out[2 * m + j] = kTransposed ? rows[8 * m + across][down] : rows[8 * m + down][across];
        }
      }
    }
  });
}

template <typename T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t b[2] = {b0, b1};
  emulation::warp(c, const_cast<uint32_t*>(a), b, [](void* (*brought)[3]) {
    float left[16][16], right[16][8];
    for (int i = 0; i < emulation::kLanes; ++i) {
      T x[8], y[4];
      std::memcpy(x, brought[i][1], 16);
      std::memcpy(y, brought[i][2], 8);
      const int group = i / 4, pair = i % 4 * 2;
      for (int j = 0; j < 8; ++j) left[group + j / 2 % 2 * 8][pair + j % 2 + j / 4 * 8] = to_float(x[j]);
      for (int j = 0; j < 4; ++j) right[pair + j % 2 + j / 2 * 8][group] = to_float(y[j]);
    }
    for (int i = 0; i < emulation::kLanes; ++i) {
      float* out = static_cast<float*>(brought[i][0]);
      for (int j = 0; j < 4; ++j) {
        const int row = i / 4 + j / 2 * 8, column = i % 4 * 2 + j % 2;
        float sum = out[j];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        out[j] = sum;
      }
    }
  });
}

template <int kTilesN>
void begin_products(float (&c)[kTilesN][4]) {
  std::memcpy(emulation::block().products[threadIdx.x].data(), c, sizeof(c));
}
template <int kTilesN>
void end_products(float (&c)[kTilesN][4]) {
  std::memcpy(c, emulation::block().products[threadIdx.x].data(), sizeof(c));
}

namespace emulation {

// What wgmma reads: [rows, 16], from the bits of a descriptor of 128-byte swizzle. Of what was written to shared memory it
// sees what was published.
template <typename T>
std::vector<float> operand(uint64_t descriptor, bool transposed, int rows) {
  auto bytes = [&](int first_bit) { return static_cast<uint32_t>(descriptor >> first_bit & 0x3FFF) * 16; };
  const uint32_t start = bytes(0), leading = bytes(16), stride = bytes(32);
  if ((descriptor & ~uint64_t{0x3FFF3FFF3FFF}) != uint64_t{1} << 62) {
    throw std::logic_error("a descriptor is not one of 128-byte swizzle");
  }
  std::vector<float> values(rows * 16);
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < 16; ++k) {
      uint32_t at = start + (transposed ? row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                                        : row / 8 * stride + row % 8 * 128 + k * 2);
      at ^= (at >> 7 & 7) << 4;
      T value;
      if (at + sizeof(T) > block().published.size()) throw std::logic_error("a descriptor leaves shared memory");
      std::memcpy(&value, block().published.data() + at, sizeof(T));
      values[row * 16 + k] = to_float(value);
    }
  }
  return values;
}

}  // namespace emulation

template <typename T, bool kATransposed, bool kBTransposed, int kTilesN>
void multiply_warpgroup(float (&)[kTilesN][4], uint64_t a, uint64_t b) {
  emulation::warpgroup(&a, &b, nullptr, [](void* (*brought)[3]) {
    const uint64_t a = *static_cast<uint64_t*>(brought[0][0]), b = *static_cast<uint64_t*>(brought[0][1]);
    const std::vector<float> left = emulation::operand<T>(a, kATransposed, 64);
    const std::vector<float> right = emulation::operand<T>(b, kBTransposed, 8 * kTilesN);
    auto* products = &emulation::block().products[threadIdx.x / emulation::kGroupLanes * emulation::kGroupLanes];
    for (int i = 0; i < emulation::kGroupLanes; ++i) {
      if (*static_cast<uint64_t*>(brought[i][0]) != a || *static_cast<uint64_t*>(brought[i][1]) != b) {
        throw std::logic_error("the threads of a warpgroup gave different descriptors");
      }
      for (int j = 0; j < 4 * kTilesN; ++j) {
        const float* row = &left[(i / 32 * 16 + i / 4 % 8 + j / 2 % 2 * 8) * 16];
        const float* column = &right[(j / 4 * 8 + i % 4 * 2 + j % 2) * 16];
        for (int k = 0; k < 16; ++k) products[i][j] += row[k] * column[k];
      }
    }
  });
}

inline float sum_of_four(float x) {
  float result = 0;
  emulation::warp(&x, &result, nullptr, [](void* (*brought)[3]) {
    for (int i = 0; i < emulation::kLanes; ++i) {
      const int first = i / 4 * 4;
      auto given = [&](int j) { return *static_cast<float*>(brought[first + j][0]); };
      const int j = i % 4;
      *static_cast<float*>(brought[i][1]) = (given(j) + given(j ^ 1)) + (given(j ^ 2) + given(j ^ 3));
    }
  });
  return result;
}

inline uint32_t shuffle(uint32_t x, int lane) {
  uint32_t result = 0;
  emulation::warp(&x, &result, &lane, [](void* (*brought)[3]) {
    for (int i = 0; i < emulation::kLanes; ++i) {
      const int from = *static_cast<int*>(brought[i][2]);
      *static_cast<uint32_t*>(brought[i][1]) = *static_cast<uint32_t*>(brought[from][0]);
    }
  });
  return result;
}

inline void atomicMin(int* p, int x) { *p = x < *p ? x : *p; }
inline void atomicMax(int* p, int x) { *p = x > *p ? x : *p; }

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
inline float not_a_number() { return NAN; }

inline void meet(int* state) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const int generation = state[1];
    if (state[0]++ == static_cast<int>(gridDim.x) - 1) {
      state[0] = 0;
      ++state[1];
    } else {
      while (state[1] == generation) emulation::yield();
    }
  }
  __syncthreads();
}

inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}
inline int largest_shared_memory() { return emulation::largest_shared; }

template <typename Params>
std::string missing_code(void (*)(Params)) {
  return emulation::missing_code;
}

template <typename Params>
int resident_blocks(void (*)(Params), int, int shared) {
  if (shared > emulation::largest_shared) throw std::runtime_error("a kernel wants too much shared memory");
  return emulation::processors;
}

enum class Together { kNo, kCooperative, kDependent };

template <typename Params>
bool launch(void (*kernel)(Params), const Params& params, int blocks, int threads, int shared, Together, Stream) {
  using namespace emulation;
  ++launches;
  if (launches_nothing) return true;
  launched_blocks += blocks;
  Grid all;
  grid = &all;
  all.threads = threads;
  all.alive = blocks * threads;
  all.body = [&] { kernel(params); };
  all.blocks.resize(blocks);
  for (Block& b : all.blocks) {
    b.shared.assign(shared, 0xFF);  // NaN in every type
    b.published = b.shared;
    b.warps.resize(threads / kLanes);
    b.groups.resize(threads / kGroupLanes);
    b.products.resize(threads);
  }
  all.fibers.resize(blocks * threads);
  uint8_t* stacks = static_cast<uint8_t*>(mmap(nullptr, all.fibers.size() * kStack, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) throw std::runtime_error("no memory for the threads of a grid");
  for (size_t i = 0; i < all.fibers.size(); ++i) {
    Fiber& fiber = all.fibers[i];
    fiber.block = static_cast<unsigned>(i / threads);
    fiber.thread = static_cast<unsigned>(i % threads);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks + i * kStack;
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, run_fiber, 0);
    all.order.push_back(static_cast<int>(i));
  }
  if (random_state != 0) {
    for (size_t i = all.order.size() - 1; i > 0; --i) {
      random_state = random_state * 1664525u + 1013904223u;
      std::swap(all.order[i], all.order[(random_state >> 8) % (i + 1)]);
    }
  }
  gridDim.x = static_cast<unsigned>(blocks);
  if (_setjmp(all.finished) == 0) resume(0);
  munmap(stacks, all.fibers.size() * kStack);
  grid = nullptr;
  return true;
}

}  // namespace lilora
