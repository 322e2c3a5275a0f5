// Checks of the fused Hopper product and the choice of its instance.

#include "hopper/fused_linear.h"

#include "hopper/checks.h"
#include "platform.h"

namespace cutlass {
struct half_t;
struct bfloat16_t;
}  // namespace cutlass

namespace lilora::hopper {

// In files of their own.
template <class Element>
void forward(const ForwardParams& params, Stream stream);
template <class Element>
void input_gradient(const InputGradientParams& params, Stream stream);

void linear_forward(const ForwardParams& p, void* stream) {
  require_multiples_of_8({{"K", p.k},
                          {"N", p.n},
                          {"R", p.r},
                          {"x's row stride", p.x_stride},
                          {"q's row stride", p.q_stride},
                          {"weight's row stride", p.weight_stride},
                          {"y's row stride", p.y_stride}});
  if (p.tasks > 0) require_multiples_of_8({{"S", p.s}});
  require_aligned({{"x", p.x},
                   {"weight", p.weight},
                   {"bias", p.bias},
                   {"q", p.q},
                   {"b0", p.b0},
                   {"u", p.u},
                   {"slots.z", p.slots.z},
                   {"y", p.y}});
  if (p.m == 0) return;
  const auto run = p.element == ElementType::kFloat16 ? forward<cutlass::half_t> : forward<cutlass::bfloat16_t>;
  run(p, static_cast<Stream>(stream));
}

void linear_input_gradient(const InputGradientParams& p, void* stream) {
  require_multiples_of_8({{"K", p.k},
                          {"N", p.n},
                          {"R", p.r},
                          {"dy's row stride", p.dy_stride},
                          {"dh's row stride", p.dh_stride},
                          {"weight's row stride", p.weight_stride},
                          {"dx's row stride", p.dx_stride}});
  require_aligned({{"dy", p.dy}, {"weight", p.weight}, {"dh", p.dh}, {"a", p.a}, {"dx", p.dx}});
  if (p.m == 0) return;
  const auto run =
      p.element == ElementType::kFloat16 ? input_gradient<cutlass::half_t> : input_gradient<cutlass::bfloat16_t>;
  run(p, static_cast<Stream>(stream));
}

}  // namespace lilora::hopper
