// `lilora::linear` and `delta` on a CPU, each direction in one call: forward for up to a few hundred rows, both for sizes at which
// most of what a library's products cost is to call them. fp32. Formula: ops/README.md.

#include "common.h"

// As packed by lilora_kernels/cpu_library.py; everything is contiguous. No pointer: a gradient that is not wanted, a parameter
// that is not there, rows that no wanted gradient reads.
struct Training {
  // Of one call alone.
  int64_t rows;
  const float* x;
  float *h, *y;  // forward writes both; backward reads h, and y is its gradient
  const int32_t* task;
  const uint8_t* keep;  // [rows, columns]: 0 where dropout takes the adapter's x away
  float *dx, *da, *db0, *du, *dv, *dfusion;
  const float *weight, *bias, *a, *b0, *u, *v, *fusion;
  // Until parameters change.
  int64_t columns, outputs, rank, sub_rank, tasks;
  ParallelFor parallel_for;
  int64_t instructions;
  double scaling, keep_scale;
};
static_assert(sizeof(Training) == 28 * 8, "lilora_cpu_interface, and what packs it, have to change with it");

namespace {

constexpr int64_t kMostRows = 1024;
constexpr int64_t kOutputs = 32;  // of an item of the gradients of B0 and U

// The sum over j < length of left[i left_row + j left_step] right[j right_row + c right_step], for row i and column c.
struct Product {
  const float* left;
  int64_t left_row, left_step;
  const float* right;
  int64_t right_row, right_step, length;
};

// All rows in the order of their tasks; sub_rank 0 without factors of tasks.
struct Work : Order<kMostRows> {
  const Training* call;
  int64_t sub_rank;
  float *x, *dropped, *y, *h;       // of the call; dropped: x with zeros where dropout is
  float *dh, *dz, *z, *scaled_h;    // s f h; z = h V_t^T, in forward and in the end e s z; dz = dy U_t, in the end e s dz
  int64_t of_columns;               // items of this kind, before those of outputs
};

#define KERNELS "training_kernels.h"
#include "instruction_sets.h"

// Fills in `work` but for its scratch, of `floats` a row, and returns all memory; nullptr with `status` where that failed.
float* begin(Work& work, const Training& call, int64_t floats, bool reads_y, int32_t& status) {
  work.call = &call;
  work.sub_rank = call.u ? call.sub_rank : 0;
  status = call.rows > kMostRows || !work.place(call.task, call.rows, call.u ? call.tasks : 0) ? 1 : 0;
  if (status) return nullptr;
  bool moved = false;
  for (int64_t m = 0; m < call.rows; ++m) moved |= work.row[m] != m;
  const int64_t of_row = (moved + (call.keep != nullptr)) * call.columns + moved * (call.outputs + call.rank) + floats;
  float* const memory = (float*)malloc((call.rows * of_row + 1) * sizeof(float));
  if (memory == nullptr) return status = 2, nullptr;
  float* next = memory;
  const auto ordered = [&](const float* from, int64_t width, bool copies, const uint8_t* keep) {
    if (from == nullptr || !copies) return (float*)from;
    float* const to = next;
    next += call.rows * width;
    for (int64_t m = 0; m < call.rows; ++m) {
      const float* const row = from + work.row[m] * width;
      if (keep == nullptr) memcpy(to + m * width, row, width * sizeof(float));
      for (int64_t k = 0; keep && k < width; ++k) to[m * width + k] = keep[work.row[m] * width + k] ? row[k] : 0;
    }
    return to;
  };
  work.x = ordered(call.x, call.columns, moved, nullptr);
  work.dropped = call.keep ? ordered(call.x, call.columns, true, call.keep) : work.x;
  work.y = ordered(call.y, call.outputs, moved && reads_y, nullptr);
  work.h = ordered(call.h, call.rank, moved, nullptr);
  work.z = next;
  work.scaled_h = work.z + call.rows * work.sub_rank;
  work.dh = work.scaled_h + call.rows * call.rank;
  work.dz = work.dh + call.rows * call.rank;
  return memory;
}

}  // namespace

// Both: 0, or another number where nothing was computed: 1 for an id of no task or too many rows, 2 without memory.
EXPORT int32_t lilora_cpu_train_forward(const Training* call) {
  Work work;
  int32_t status;
  float* const memory = begin(work, *call, call->rank + call->sub_rank, false, status);
  if (memory == nullptr) return status;
  BY_INSTRUCTIONS(call->instructions, forward(work));
  free(memory);
  return 0;
}

EXPORT int32_t lilora_cpu_train_backward(const Training* call) {
  Work work;
  int32_t status;
  float* const memory = begin(work, *call, 2 * (call->rank + call->sub_rank), true, status);
  if (memory == nullptr) return status;
  if (work.runs < call->tasks) {  // tasks without rows
    if (call->du) memset(call->du, 0, call->tasks * call->outputs * work.sub_rank * sizeof(float));
    if (call->dv) memset(call->dv, 0, call->tasks * work.sub_rank * call->rank * sizeof(float));
    if (call->dfusion) memset(call->dfusion, 0, call->tasks * sizeof(float));
  }
  BY_INSTRUCTIONS(call->instructions, backward(work));
  free(memory);
  return 0;
}
