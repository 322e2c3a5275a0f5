// Runs CUDA kernels on a CPU, for tests: every thread of every block of a grid is a fiber of its own, and all blocks are
// resident at once. Threads switch only where they wait for each other.
//
// What a device leaves open is used against the kernel. Which thread that can go on does so is drawn from a seed. Fresh
// shared memory, the target of a copy under way and the accumulators of a product under way hold NaN; a copy is done as
// late as allowed, at once, or in between. The kernels are compiled with g++ -fsanitize=thread over functions of our own,
// so every load and store of theirs is seen: two threads that touch the same memory, one of them to write, with no barrier
// in between are an error, whichever comes first; so is a launch that, before it has waited for the one
// before it, writes to memory or reads what may still be written then, and wgmma that reads what its writer has not
// published. Not seen: a thread that overwrites the source of its
// own copy, whether memory that the caller allocated was ever written, fences of memory order, CUTLASS's own code.
//
// Offers the names that csrc/platform.h offers under nvcc; the tensor-core instructions follow the layouts of the PTX ISA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#define HOST_DEVICE inline
#define DEVICE inline
#define PART inline
#define KERNEL_PARAMETER
#define KERNEL(threads, blocks) void
#define UNROLL
#define NO_UNROLL
#define __syncthreads() ::lilora::emulation::sync_block()

namespace lilora {

struct Half;
struct BFloat16;
struct Chunk;
using Stream = void*;
enum class Together { kNo, kCooperative, kDependent };

namespace emulation {

struct Index {
  unsigned x;
};
struct Indices {
  Index thread, block, grid;
};
extern Indices indices;  // of the thread whose turn it is

enum class Copies { kLate, kNow, kRandom };  // when asynchronous copies are done: in the wait for them, at once, whenever

// The settings of the device. order: 0, or a seed for the order in which threads take their turns.
extern int processors, largest_shared;
extern unsigned order;
extern Copies copies;
extern int launches;
extern bool launches_nothing;     // to measure what the host does
extern int64_t launched_blocks, copied, stored;  // of all launches, and bytes: loaded and stored by several words at once
extern const uint8_t* watched;    // global memory of which the bytes that are loaded so are counted
extern int64_t watched_size, watched_bytes;
extern std::string missing_code;  // what a device without the code says

void begin_call();  // what is written between two calls, by others, is not seen
void sync_block();
uint8_t* shared_memory();
void multiply(bool half, float* c, const uint32_t* a, const uint32_t* b);
void begin_products(float* c, int count);
void multiply_warpgroup(bool half, bool a_transposed, bool b_transposed, int tiles_n, uint64_t a, uint64_t b);
void end_products(float* c, int count);
void load_matrices(bool transposed, uint32_t* r, const void* row);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
inline uint16_t float_to_bfloat16(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  if (std::isnan(x)) return 0x7FFF;
  return static_cast<uint16_t>((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
}

template <typename T>
constexpr bool kIsHalf = false;
template <>
inline constexpr bool kIsHalf<Half> = true;

// What a thread runs. Reading what it is given is no access of the kernel.
template <typename Params>
__attribute__((no_sanitize("thread"))) void run(const void* kernel, const void* params) {
  reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel))(*static_cast<const Params*>(params));
}

// Each thread calls body(kernel, params). Throws what a thread was stopped for.
void launch(void (*body)(const void*, const void*), const void* kernel, const void* params, size_t params_size, int blocks,
            int threads, int shared, Together together);

}  // namespace emulation

#define threadIdx ::lilora::emulation::indices.thread
#define blockIdx ::lilora::emulation::indices.block
#define gridDim ::lilora::emulation::indices.grid

inline float to_float(float x) { return x; }
inline float to_float(Half x);
inline float to_float(BFloat16 x);
template <typename T>
T rounded(float x);

inline uint8_t* shared_memory() { return emulation::shared_memory(); }
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - shared_memory());
}

void copy_async(Chunk* to, const void* from, int bytes);
void commit_copies();
void wait_copies(int pending);
void publish_shared();
Chunk load_words(const void* from);
void store_words(void* to, const uint32_t* words, int bytes);
template <int kWords>
void store_words(void* to, const uint32_t (&words)[kWords]) {
  store_words(to, words, 4 * kWords);
}

template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], const Chunk* row) {
  emulation::load_matrices(kTransposed, r, row);
}

template <typename T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emulation::multiply(emulation::kIsHalf<T>, c, a, b);
}

template <int kTilesN>
void begin_products(float (&c)[kTilesN][4]) {
  emulation::begin_products(c[0], 4 * kTilesN);
}
template <typename T, bool kATransposed, bool kBTransposed, int kTilesN>
void multiply_warpgroup(float (&)[kTilesN][4], uint64_t a, uint64_t b) {
  emulation::multiply_warpgroup(emulation::kIsHalf<T>, kATransposed, kBTransposed, kTilesN, a, b);
}
template <int kTilesN>
void end_products(float (&c)[kTilesN][4]) {
  emulation::end_products(c[0], 4 * kTilesN);
}

float sum_of_four(float x);
uint32_t shuffle_words(uint32_t x, int lane);
template <typename T>
T shuffle(T x, int lane) {
  uint32_t word;
  static_assert(sizeof x == sizeof word);
  std::memcpy(&word, &x, sizeof x);
  word = shuffle_words(word, lane);
  std::memcpy(&x, &word, sizeof x);
  return x;
}
void atomicMin(int* p, int x);
void atomicMax(int* p, int x);
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
inline float not_a_number() { return NAN; }

void meet(int* state);
void wait_for_previous_kernel();
void allow_next_kernel();
inline int largest_shared_memory() { return emulation::largest_shared; }
inline int processors() { return emulation::processors; }

template <typename Params>
std::string missing_code(void (*)(Params)) {
  return emulation::missing_code;
}
int resident_blocks(int shared);
template <typename Params>
int resident_blocks(void (*)(Params), int, int shared) {
  return resident_blocks(shared);
}

template <typename Params>
bool launch(void (*kernel)(Params), const Params& params, int blocks, int threads, int shared, Together together, Stream) {
  emulation::launch(emulation::run<Params>, reinterpret_cast<const void*>(kernel), &params, sizeof(Params), blocks,
                    threads, shared, together);
  return true;
}

}  // namespace lilora
