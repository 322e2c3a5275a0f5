// What the kernels for decoding and for training share: types of numbers, rows in the order of their tasks, and threads.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kBlock = 512;         // elements of a row worked on together
constexpr int64_t kProducts = 1 << 15;  // multiplications that are worth a thread

enum Type : int64_t { kFloat, kBfloat16, kHalf };
struct Bfloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

typedef float Four __attribute__((vector_size(16)));

// Of the eight elements of two vectors of four: those at these places.
#ifdef __clang__
#define SHUFFLED(left, right, ...) __builtin_shufflevector(left, right, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(16)));
#define SHUFFLED(left, right, ...) __builtin_shuffle(left, right, Places{__VA_ARGS__})
#endif

struct Matrix {
  const void* data;  // nullptr where it is not given
  int64_t type;
};

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline float value(const Matrix& matrix, int64_t at) {
  if (matrix.type == kFloat) return ((const float*)matrix.data)[at];
  const uint32_t bits = ((const uint16_t*)matrix.data)[at];
  if (matrix.type == kBfloat16) return bits_as<float>(bits << 16);
  const uint32_t magnitude = (bits & 0x7fff) << 13, special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;
  return bits_as<float>(bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f) | special | (bits & 0x8000) << 16);
}

inline double sigmoid(double t) { return t >= 0 ? 1 / (1 + exp(-t)) : exp(t) / (1 + exp(t)); }

struct Run {
  int64_t task, first, last;
};

// s f and s e of a task; s and s without fusion.
struct Shares {
  double f = 1, e = 1;
  float of_shared, of_task;

  Shares(const Matrix& fusion, int64_t task, double scaling) {
    if (fusion.data) f = sigmoid(value(fusion, task)), e = 1 - f;
    of_shared = f * scaling;
    of_task = e * scaling;
  }
};

// The rows of a call in the order of their tasks, those of no task last.
template <int64_t kMost>
struct Order {
  int64_t row[kMost];
  Run run[kMost];
  int64_t runs, adapted;

  // tasks: how many have factors; 0 where no task has, then all adapted rows are one run. False for an id of no task.
  bool place(const int32_t* task, int64_t rows, int64_t tasks) {
    int64_t id[kMost], placed = 0;
    runs = 0;
    for (int64_t m = 0; m < rows; ++m) {
      id[m] = task ? task[m] : 0;
      if (tasks == 0) id[m] = id[m] >= 0 ? 0 : -1;
      else if (id[m] < -1 || id[m] >= tasks) return false;
    }
    const auto place = [&](int64_t t) {
      for (int64_t m = 0; m < rows; ++m)
        if (id[m] == t) row[placed++] = m;
    };
    for (int64_t m = 0; m < rows; ++m) {
      bool seen = id[m] < 0;
      for (int64_t i = 0; i < runs; ++i) seen |= run[i].task == id[m];
      if (seen) continue;
      const int64_t first = placed;
      place(id[m]);
      run[runs++] = {id[m], first, placed};
    }
    adapted = placed;
    place(-1);
    return true;
  }
};

typedef void (*Items)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Items items, void* context);

// Items of so many products each, by several threads where that is worth it. No function: by one.
inline void share(ParallelFor parallel_for, Items items, void* context, int64_t count, int64_t products) {
  if (parallel_for == nullptr || count * products < 2 * kProducts) return items(0, count, context);
  parallel_for(0, count, 1 + kProducts / (1 + products), items, context);
}

}  // namespace
