// A linear layer and its adapter in one product on Hopper (sm_90a): the adapter is more steps of the inner dimension.
//
// All matrices are row-major and of one 16-bit element type; strides are those of rows, in elements. Bases must be
// aligned to 16 bytes; K, N, R, S and the strides must be multiples of 8. Functions enqueue on `stream`, a cudaStream_t
// of the current device, neither wait nor allocate, and throw std::runtime_error with one sentence.
#pragma once

#include <cstdint>

namespace lilora::hopper {

enum class ElementType { kFloat16, kBFloat16 };

// Rows of different tasks need different factors U_t, yet share tiles. So rows are taken in groups of slot_rows(), and
// each task that occurs in a group has a slot: its rows of z in their places, zeros in the others.
int64_t slot_rows();
int64_t slot_groups(int64_t m);
int64_t slot_capacity(int64_t m, int64_t tasks);  // slots to allocate: enough whatever the ids are

struct Slots {
  void* z;         // [slot_capacity, slot_rows, S]
  int32_t* task;   // [slot_capacity]
  int32_t* count;  // [slot_groups]: a group uses the first ones of its slot_capacity / slot_groups
};

struct SlotsParams {
  int64_t m, s, tasks;
  const int32_t* task;  // [M]: below 0 no slot, from `tasks` on NaN in that row of the output; null: task 0 for all
  const void* z;        // [M, S], scaling and coefficient applied
  int64_t z_stride;
  Slots slots;  // written, as far as they are used
};
void fill_slots(const SlotsParams& params, void* stream);

// y = x W^T + bias + q B0^T + z_t U_t^T, rounded once.
struct ForwardParams {
  ElementType element;
  int64_t m, n, k, r, s, tasks;  // s = tasks = 0: no task factors
  const void* x;                 // [M, K]
  const void* weight;            // [N, K]
  const void* bias;              // [N] or null
  const void* q;                 // [M, R], scaling and coefficient applied
  const void* b0;                // [N, R], contiguous
  const void* u;                 // [tasks, N, S], contiguous
  Slots slots;                   // from fill_slots
  void* y;                       // [M, N]
  int64_t x_stride, weight_stride, q_stride, y_stride;
};
void linear_forward(const ForwardParams& params, void* stream);

// dx = dy W + D'(dh A), rounded once.
struct InputGradientParams {
  ElementType element;
  int64_t m, n, k, r;
  const void* dy;       // [M, N]
  const void* weight;   // [N, K]
  const void* dh;       // [M, R]
  const void* a;        // [R, K], contiguous
  const int64_t* seed;  // on the device; null: no dropout
  uint32_t threshold;   // 16-bit draws below it are dropped
  void* dx;             // [M, K]
  int64_t dy_stride, weight_stride, dh_stride, dx_stride;
};
void linear_input_gradient(const InputGradientParams& params, void* stream);

}  // namespace lilora::hopper
