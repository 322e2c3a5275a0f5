// The fused product of csrc/hopper in plain loops over the slots: its tensor cores are not emulated, what it is given is.
#include "hopper/fused_linear.h"

#include "philox.h"

namespace lilora::hopper {
namespace {

float value(ElementType element, const void* data, int64_t at) {
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
  return element == ElementType::kFloat16 ? to_float(Half{bits}) : to_float(BFloat16{bits});
}
void store(ElementType element, void* data, int64_t at, float x) {
  static_cast<uint16_t*>(data)[at] =
      element == ElementType::kFloat16 ? rounded<Half>(x).bits : rounded<BFloat16>(x).bits;
}

}  // namespace

void linear_forward(const ForwardParams& p, void*) {
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      float sum = 0;
      for (int64_t r = 0; r < p.r; ++r) {
        sum += value(p.element, p.q, m * p.q_stride + r) * value(p.element, p.b0, n * p.r + r);
      }
      if (p.tasks > 0) {
        const int64_t group = m / slot_rows(), slots = slot_capacity(p.m, p.tasks) / slot_groups(p.m);
        for (int64_t slot = group * slots; slot < group * slots + p.slots.count[group]; ++slot) {
          for (int64_t s = 0; s < p.s; ++s) {
            sum += value(p.element, p.slots.z, (slot * slot_rows() + m % slot_rows()) * p.s + s) *
                   value(p.element, p.u, (p.slots.task[slot] * p.n + n) * p.s + s);
          }
        }
      }
      for (int64_t k = 0; k < p.k; ++k) {
        sum += value(p.element, p.x, m * p.x_stride + k) * value(p.element, p.weight, n * p.weight_stride + k);
      }
      if (p.bias != nullptr) sum += value(p.element, p.bias, n);
      store(p.element, p.y, m * p.y_stride + n, sum);
    }
  }
}

void linear_input_gradient(const InputGradientParams& p, void*) {
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t k = 0; k < p.k; ++k) {
      float sum = 0;
      for (int64_t r = 0; r < p.r; ++r) {
        sum += value(p.element, p.dh, m * p.dh_stride + r) * value(p.element, p.a, r * p.k + k);
      }
      if (p.seed != nullptr) {
        const bool kept = keep_bits(*p.seed, m, static_cast<uint32_t>(k / 8), p.threshold) >> (k % 8) & 1;
        sum = kept ? sum * 65536.0f / (65536.0f - p.threshold) : 0.0f;
      }
      for (int64_t n = 0; n < p.n; ++n) {
        sum += value(p.element, p.dy, m * p.dy_stride + n) * value(p.element, p.weight, n * p.weight_stride + k);
      }
      store(p.element, p.dx, m * p.dx_stride + k, sum);
    }
  }
}

}  // namespace lilora::hopper
