// `lilora::linear`, `delta` and `delta_pair` for few rows on a CPU: every matrix is read from memory once. Formula: ops/README.md.

#include "common.h"

namespace {

constexpr int64_t kMostRows = 64, kMostSides = 2;
constexpr int64_t kFewRows = 16;  // beyond them an item is several groups of outputs
constexpr int64_t kGroups = 4;

}  // namespace

// As packed by lilora_kernels/cpu_library.py. Shapes in ops/README.md; rows of x lie x_stride apart, the rest is contiguous.
struct Call {
  // Of one call alone. No pointer: not given, of h: not wanted.
  int64_t rows, x_stride;
  const void* x;
  void *y, *h;  // in x's type
  const int32_t *task, *gate_row;
  Matrix gate;
  int64_t gates;
  // Until parameters change.
  int64_t columns, outputs, rank, sub_rank, tasks, x_type;
  Matrix weight, bias, a, b0, u, v, fusion;
  ParallelFor parallel_for;
  int64_t instructions;
  double scaling;
};
static_assert(sizeof(Call) == 33 * 8, "lilora_cpu_interface, and what packs it, have to change with it");

namespace {

// fp32 rows, padded with zeros to a multiple of 16 elements: a block of all rows, then the next one, so that no two rows of a
// block compete for a place in the cache.
struct Rows {
  float* data;
  int64_t width, count;  // width of a block: kBlock, or less where there is only one

  float& at(int64_t row, int64_t k) const { return data[(k / kBlock * count + row) * width + k % kBlock]; }
};

// The rows in the order of their tasks.
struct Work : Order<kMostRows> {
  const Call* call;
  Rows x, q, scaled_q, z;
  int64_t gate_row[kMostRows];
  float of_shared[kMostRows], of_task[kMostRows];  // f s and e s
  const char* own[kMostRows];                      // U_t of each run
};

uint16_t bfloat16(float number) {
  const uint32_t bits = bits_as<uint32_t>(number);
  return number != number ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

uint16_t half(float number) {
  const uint32_t bits = bits_as<uint32_t>(number), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x47800000) return sign | 0x7c00;
  if (magnitude < 0x38800000)  // subnormal: the addition rounds
    return sign | (bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000);
  return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
}

int64_t size_of(int64_t type) { return type == kFloat ? 4 : 2; }

void store(void* to, int64_t at, int64_t type, float number) {
  if (type == kFloat) ((float*)to)[at] = number;
  else ((uint16_t*)to)[at] = type == kBfloat16 ? bfloat16(number) : half(number);
}

// Adapters of one x. Threads share the items of both.
struct Sides {
  Work* work;
  int64_t count, first_items;  // the latter of a phase: items of side 0 come first
};

#define KERNELS "decode_kernels.h"
#include "instruction_sets.h"

// Where every row goes, and its coefficients. False for an id of no task or of no gate.
bool place_rows(Work& work) {
  const Call& call = *work.call;
  for (int64_t m = 0; call.gate_row && m < call.rows; ++m)
    if (call.gate_row[m] < 0 || call.gate_row[m] >= call.gates) return false;
  if (!work.place(call.task, call.rows, call.u.data ? call.tasks : 0)) return false;
  for (int64_t m = 0; m < call.rows; ++m) {
    work.gate_row[m] = call.gate_row ? call.gate_row[work.row[m]] : 0;
    work.of_shared[m] = work.of_task[m] = 0;
  }
  for (int64_t i = 0; i < work.runs; ++i) {
    const Run& run = work.run[i];
    const Shares shares(call.fusion, run.task, call.scaling);
    for (int64_t m = run.first; m < run.last; ++m) {
      work.of_shared[m] = shares.of_shared;
      work.of_task[m] = shares.of_task;
    }
    work.own[i] = (const char*)call.u.data + run.task * call.outputs * call.sub_rank * size_of(call.u.type);
  }
  return true;
}

}  // namespace

// Another number for every other Call or Training.
EXPORT int64_t lilora_cpu_interface() { return 5; }

// How many of the instruction sets baseline, avx2, avx512 this processor has.
EXPORT int64_t lilora_cpu_instructions() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return wide ? 3 : 2;
#else
  return 1;
#endif
}

EXPORT int32_t lilora_cpu_is_amd() {
#ifdef __x86_64__
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") != 0;
#else
  return 0;
#endif
}

// Whether it multiplies bf16 itself, as libraries then do.
EXPORT int32_t lilora_cpu_has_bf16() {
#ifdef __x86_64__
  unsigned a = 0, b = 0, c = 0, d = 0;  // old compilers do not know its name
  return lilora_cpu_instructions() == 3 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
#else
  return 0;
#endif
}

// One call, or two of the same rows of x and the same tasks. 0, or another number where nothing was computed: 1 for an id of no
// task or no gate, 2 without memory.
EXPORT int32_t lilora_cpu_decode(const Call* calls, int64_t count) {
  Work work[kMostSides];
  int64_t floats = 0, starts[kMostSides][4];
  for (int64_t side = 0; side < count; ++side) {
    const Call& call = calls[side];
    work[side].call = &call;
    if (!place_rows(work[side])) return 1;
    const int64_t lengths[] = {side == 0 ? call.columns : 0, call.rank, call.rank, call.sub_rank};
    Rows* const matrices[] = {&work[side].x, &work[side].q, &work[side].scaled_q, &work[side].z};
    for (int i = 0; i < 4; ++i) {
      const int64_t width = lengths[i] < kBlock ? (lengths[i] + 15) / 16 * 16 : kBlock;
      starts[side][i] = floats;
      *matrices[i] = {nullptr, width, call.rows};
      floats += (lengths[i] + kBlock - 1) / kBlock * width * call.rows;
    }
  }
  void* const memory = calloc(floats + 16, sizeof(float));
  if (memory == nullptr) return 2;
  float* const aligned = (float*)(((uintptr_t)memory + 63) / 64 * 64);
  for (int64_t side = 0; side < count; ++side) {
    Rows* const matrices[] = {&work[side].x, &work[side].q, &work[side].scaled_q, &work[side].z};
    for (int i = 0; i < 4; ++i) matrices[i]->data = aligned + starts[side][i];
    work[side].x = work[0].x;
  }
  Sides sides = {work, count, 0};
  BY_INSTRUCTIONS(calls->instructions, run(sides));
  free(memory);
  return 0;
}
