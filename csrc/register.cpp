// The operations lilora_cuda::*, which the Python operations lilora::* call. Registered through torch's stable ABI: one
// binary serves every torch from 2.10 on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "delta.h"
#ifdef LILORA_HOPPER
#include "hopper/fused_linear.h"
#endif

namespace lilora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "lilora_cuda: x must be float16 or bfloat16");
  }
}

#ifdef LILORA_HOPPER
hopper::ElementType element_type(Type type) {
  return type == Type::kHalf ? hopper::ElementType::kFloat16 : hopper::ElementType::kBFloat16;
}
#endif

// A tensor of one to three dimensions as rows of its last one, of the type of the activations.
Matrix matrix(const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), "lilora_cuda: a parameter must have the type of the activations");
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims < 1 || t.stride(dims - 1) == 1 || t.size(dims - 1) <= 1,
                  "lilora_cuda: the last dimension of a tensor must be contiguous");
  // A dimension of one element may have any stride.
  const int64_t stride = dims < 2 ? t.numel() : dims == 2 && t.size(0) > 1 ? t.stride(0) : t.size(dims - 1);
  STD_TORCH_CHECK(dims < 3 || t.is_contiguous(), "lilora_cuda: u and v must be contiguous");
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  const void* data = t.data_ptr();
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * bytes % 16 == 0;
  return {data, stride, aligned};
}
Matrix matrix(const Optional& t, const Tensor& like) { return t ? matrix(*t, like) : Matrix{nullptr, 0, false}; }

template <typename T>
const T* data(const Optional& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

struct Parameters {
  const Tensor &a, &b0;
  const Optional &u, &v, &fusion, &task, &gate, &gate_row, &seed;
  double scaling, keep_scale;
  int64_t threshold;
};

Adapter adapter_of(const Parameters& p, const Tensor& like, int64_t rows) {
  Adapter adapter = {};
  adapter.a = matrix(p.a, like);
  adapter.b0 = matrix(p.b0, like);
  adapter.u = matrix(p.u, like);
  adapter.v = matrix(p.v, like);
  adapter.fusion = matrix(p.fusion, like);
  adapter.gate = matrix(p.gate, like);
  adapter.task = data<int>(p.task);
  adapter.gate_row = data<int>(p.gate_row);
  adapter.seed = p.threshold > 0 ? data<int64_t>(p.seed) : nullptr;
  adapter.threshold = static_cast<uint32_t>(p.threshold);
  adapter.keep_scale = static_cast<float>(p.keep_scale);
  adapter.scaling = static_cast<float>(p.scaling);
  adapter.rows = rows;
  adapter.columns = static_cast<int>(p.a.size(1));
  adapter.outputs = static_cast<int>(p.b0.size(0));
  adapter.rank = static_cast<int>(p.a.size(0));
  adapter.sub_rank = p.u ? static_cast<int>(p.u->size(2)) : 0;
  adapter.tasks = p.u ? static_cast<int>(p.u->size(0)) : 1;
  adapter.gates = p.gate ? static_cast<int>(p.gate->size(0)) : 0;
  return adapter;
}

#ifdef __CUDACC__
Stream current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}
using Guard = torch::stable::accelerator::DeviceGuard;
#else
Stream current_stream(const Tensor&) { return nullptr; }
struct Guard {
  explicit Guard(int device) {
    if (device > 0) throw std::runtime_error("there is one emulated device");
    emulation::begin_call();
  }
};
#endif

// New tensors of the device of `like`.
struct Allocate {
  const Tensor& like;
  std::vector<Tensor> kept;  // until the launch is queued

  Tensor tensor(std::vector<int64_t> shape, ScalarType type) const { return torch::stable::new_empty(like, shape, type); }
  void* activation(bool wanted, std::vector<int64_t> shape) { return keep(wanted, shape, like.scalar_type()); }
  float* floats(bool wanted, std::vector<int64_t> shape) {
    return static_cast<float*>(keep(wanted, shape, ScalarType::Float));
  }
  int* integers(bool wanted, std::vector<int64_t> shape) {
    return static_cast<int*>(keep(wanted, shape, ScalarType::Int));
  }

 private:
  void* keep(bool wanted, const std::vector<int64_t>& shape, ScalarType type) {
    if (!wanted) return nullptr;
    kept.push_back(tensor(shape, type));
    return kept.back().data_ptr();
  }
};

// What both forwards give to the kernels, and their results.
struct ForwardCall {
  Forward p = {};
  Tensor y, h;
};
ForwardCall forward_call(const Tensor& x, const Optional& bias, const Parameters& parameters, const Allocate& make) {
  ForwardCall call;
  Forward& p = call.p;
  p.adapter = adapter_of(parameters, x, x.size(0));
  p.x = matrix(x, x);
  p.bias = matrix(bias, x);
  call.y = make.tensor({x.size(0), p.adapter.outputs}, x.scalar_type());
  call.h = make.tensor({x.size(0), p.adapter.rank}, x.scalar_type());
  p.y = call.y.data_ptr();
  p.h = call.h.data_ptr();
  return call;
}

// y [M, N] = bias + delta, and h [M, R]; with weight the base product is added too.
std::tuple<Tensor, Tensor> delta_forward(Tensor x, Optional weight, Optional bias, Tensor a, Tensor b0, Optional u,
                                         Optional v, Optional fusion, Optional task, Optional gate, Optional gate_row,
                                         Optional seed, Optional state, double scaling, int64_t threshold,
                                         double keep_scale, bool one_launch) {
  const Guard guard(x.get_device_index());
  const Type type = type_of(x);
  const int64_t rows = x.size(0);
  Allocate make{x, {}};
  const Parameters parameters = {a, b0, u, v, fusion, task, gate, gate_row, seed, scaling, keep_scale, threshold};
  ForwardCall call = forward_call(x, bias, parameters, make);
  Forward& p = call.p;
  p.launch.state = const_cast<int*>(data<int>(state));
  if (rows == 0 || p.adapter.outputs == 0) return {call.y, torch::stable::zero_(call.h)};
  p.weight = matrix(weight, x);
  STD_TORCH_CHECK(!weight || rows <= kMostBaseRows, "lilora_cuda: with weight x may have up to ", kMostBaseRows, " rows, not ", rows);
  STD_TORCH_CHECK(!weight || (p.x.aligned && p.weight.aligned && x.size(1) % 8 == 0),
                  "lilora_cuda: x and weight must have rows of a multiple of 8 elements that begin at multiples of 16 bytes");
  one_launch = one_launch && !weight;
  plan(p, type, one_launch);
  p.qz = make.activation(true, {rows, p.adapter.width()});
  p.partials = make.floats(true, {p.splits, rows, p.adapter.q_width()});
  run(p, type, one_launch, current_stream(x));
  return {call.y, call.h};
}

constexpr int kGradients = 7;  // of x, a, b0, u, v, fusion, gate

// The gradients whose bit is set in `needs`, in order; in fp32 where it is set in `wide`. With weight, dx is that of base
// and adapter, by the fused product; else without the part through the base.
std::vector<Tensor> delta_backward(Tensor dy, Optional weight, Optional x, Optional h, Tensor a, Tensor b0, Optional u, Optional v,
                                   Optional fusion, Optional task, Optional gate, Optional gate_row, Optional seed,
                                   Optional state, double scaling, int64_t threshold, double keep_scale, int64_t low_rank,
                                   int64_t high_rank, int64_t needs, int64_t wide, bool one_launch) {
  const Guard guard(dy.get_device_index());
  const Type type = type_of(dy);
  const int64_t rows = dy.size(0);
  Backward p = {};
  p.adapter = adapter_of({a, b0, u, v, fusion, task, gate, gate_row, seed, scaling, keep_scale, threshold}, dy, rows);
  const Adapter& adapter = p.adapter;
  p.dy = matrix(dy, dy);
  p.x = matrix(x, dy);
  p.h = matrix(h, dy);
  p.launch.state = const_cast<int*>(data<int>(state));
  p.low_rank = static_cast<int>(low_rank);
  p.high_rank = static_cast<int>(high_rank);

  Allocate make{dy, {}};
  std::vector<Tensor> gradients;
  const Optional inputs[kGradients] = {std::nullopt, a, b0, u, v, fusion, gate};
  void** const to[kGradients] = {&p.dx, &p.da, &p.db0, &p.du, &p.dv, &p.dfusion, &p.dgate};
  bool* const is_wide[kGradients] = {nullptr, &p.wide_a, &p.wide_b0, &p.wide_u, &p.wide_v, &p.wide_fusion, &p.wide_gate};
  for (int i = 0; i < kGradients; ++i) {
    if ((needs >> i & 1) == 0) continue;
    if (i == 0) {
      gradients.push_back(make.tensor({rows, adapter.columns}, dy.scalar_type()));
    } else {
      std::vector<int64_t> shape;
      for (int64_t d = 0; d < inputs[i]->dim(); ++d) shape.push_back(inputs[i]->size(d));
      *is_wide[i] = wide >> i & 1;
      gradients.push_back(make.tensor(shape, *is_wide[i] ? ScalarType::Float : dy.scalar_type()));
    }
    *to[i] = gradients.back().data_ptr();
  }
  if (rows == 0) {
    for (Tensor& gradient : gradients) torch::stable::zero_(gradient);
    return gradients;
  }
  const int64_t rank = adapter.rank, tasks = adapter.tasks;
  const bool da = p.da != nullptr, db0 = p.db0 != nullptr, du = p.du != nullptr, dv = p.dv != nullptr;
  const bool dfusion = p.dfusion != nullptr, dgate = p.dgate != nullptr;
  const bool dh = p.dx != nullptr || da || dv || dfusion || dgate;
  plan(p, type, one_launch);
  const int64_t chunks = ceil_div(rows, p.chunk);
  p.fqz = make.activation(db0 || du || dv || dfusion, {rows, adapter.width()});
  p.q = make.activation(p.fqz != nullptr, {rows, adapter.q_width()});
  p.spans = make.integers(db0 || du || dv, {chunks, tasks, 2});
  p.dh = make.activation(dh, {rows, adapter.q_width()});
  p.partials = make.floats(dh, {p.splits, rows, adapter.width()});
  p.seq = make.activation(dv, {rows, padded(adapter.sub_rank)});
  p.dq_h = make.floats(dgate, {rows, rank});
  p.dfusion_rows = make.floats(dfusion, {rows});
  p.da_partials = make.floats(da, {chunks, p.a_share});
  p.db0_partials = make.floats(db0, {chunks, p.b0_share});
  p.du_partials = make.floats(du, {chunks, tasks, p.u_share});
  p.dv_partials = make.floats(dv, {chunks, tasks, p.v_share});
  void* const dx = p.dx;
  if (weight && dx != nullptr) p.dx = nullptr;
  run(p, type, one_launch, current_stream(dy));
  if (weight && dx != nullptr) {
#ifdef LILORA_HOPPER
    const Matrix w = matrix(*weight, dy);
    hopper::linear_input_gradient({element_type(type), rows, adapter.outputs, adapter.columns, adapter.rank, p.dy.data,
                                   w.data, p.dh, adapter.a.data, adapter.seed, adapter.threshold, dx, p.dy.stride,
                                   w.stride, adapter.q_width(), adapter.columns},
                                  current_stream(dy));
#else
    STD_TORCH_CHECK(false, "lilora_cuda: this build has no code for 9.0a, which the fused product needs");
#endif
  }
  return gradients;
}

#ifdef LILORA_HOPPER
// y [M, N] = x W^T + bias + delta in one product after the one that makes h [M, R].
std::tuple<Tensor, Tensor> fused_linear_forward(Tensor x, Tensor weight, Optional bias, Tensor a, Tensor b0, Optional u,
                                                Optional v, Optional fusion, Optional task, Optional gate,
                                                Optional gate_row, Optional seed, double scaling, int64_t threshold,
                                                double keep_scale) {
  const Guard guard(x.get_device_index());
  const Type type = type_of(x);
  const int64_t rows = x.size(0);
  const Stream stream = current_stream(x);
  Allocate make{x, {}};
  const Parameters parameters = {a, b0, u, v, fusion, task, gate, gate_row, seed, scaling, keep_scale, threshold};
  ForwardCall call = forward_call(x, bias, parameters, make);
  Forward& p = call.p;
  const Adapter& adapter = p.adapter;
  if (rows == 0 || adapter.outputs == 0) return {call.y, torch::stable::zero_(call.h)};
  plan(p, type, false);
  p.qz = make.activation(true, {rows, adapter.width()});
  p.q = make.activation(true, {rows, adapter.q_width()});
  p.partials = make.floats(true, {p.splits, rows, adapter.q_width()});
  run(p, type, false, stream);

  const int64_t sub_rank = adapter.sub_rank, tasks = u ? adapter.tasks : 0;
  hopper::Slots slots = {};
  if (u) {
    const int64_t capacity = hopper::slot_capacity(rows, tasks);
    slots.z = make.activation(true, {capacity, hopper::slot_rows(), sub_rank});
    slots.task = make.integers(true, {capacity});
    slots.count = make.integers(true, {hopper::slot_groups(rows)});
    const void* z = static_cast<uint16_t*>(p.qz) + adapter.q_width();
    hopper::fill_slots({rows, sub_rank, tasks, adapter.task, z, adapter.width(), slots}, stream);
  }
  const Matrix w = matrix(weight, x);
  hopper::linear_forward({element_type(type), rows, adapter.outputs, adapter.columns, adapter.rank, sub_rank, tasks,
                          p.x.data, w.data, p.bias.data, p.qz, adapter.b0.data, adapter.u.data, slots, p.y, p.x.stride,
                          w.stride, adapter.width(), adapter.outputs},
                         stream);
  return {call.y, call.h};
}

// Slots for all tasks that may occur: bytes.
int64_t slot_bytes(int64_t rows, int64_t tasks, int64_t sub_rank) {
  return hopper::slot_capacity(rows, tasks) * hopper::slot_rows() * sub_rank * 2;
}
#endif

// Why a device cannot run this binary's code; empty if it can. Never throws: another backend may be able to.
std::string missing_code_on(int64_t device) {
  try {
    const Guard guard(static_cast<int>(device));
    return missing_code_on_current_device();
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace
}  // namespace lilora

#ifdef __CUDACC__
#define LILORA_DEVICE CUDA
#else
#define LILORA_DEVICE CPU
#endif

STABLE_TORCH_LIBRARY(lilora_cuda, m) {
  m.def(
      "delta_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor a, Tensor b0, Tensor? u, Tensor? v, Tensor? fusion, "
      "Tensor? task, Tensor? gate, Tensor? gate_row, Tensor? seed, Tensor? state, float scaling, int threshold, "
      "float keep_scale, bool one_launch) -> (Tensor, Tensor)");
  m.def(
      "delta_backward(Tensor dy, Tensor? weight, Tensor? x, Tensor? h, Tensor a, Tensor b0, Tensor? u, Tensor? v, Tensor? fusion, "
      "Tensor? task, Tensor? gate, Tensor? gate_row, Tensor? seed, Tensor? state, float scaling, int threshold, "
      "float keep_scale, int low_rank, int high_rank, int needs, int wide, bool one_launch) -> Tensor[]");
  m.def("missing_code(int device) -> str");
#ifdef LILORA_HOPPER
  m.def(
      "fused_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b0, Tensor? u, Tensor? v, "
      "Tensor? fusion, Tensor? task, Tensor? gate, Tensor? gate_row, Tensor? seed, float scaling, int threshold, "
      "float keep_scale) -> (Tensor, Tensor)");
  m.def("slot_bytes(int rows, int tasks, int sub_rank) -> int");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(lilora_cuda, LILORA_DEVICE, m) {
  m.impl("delta_forward", TORCH_BOX(&lilora::delta_forward));
  m.impl("delta_backward", TORCH_BOX(&lilora::delta_backward));
#ifdef LILORA_HOPPER
  m.impl("fused_linear_forward", TORCH_BOX(&lilora::fused_linear_forward));
#endif
}

STABLE_TORCH_LIBRARY_IMPL(lilora_cuda, CompositeExplicitAutograd, m) {
  m.impl("missing_code", TORCH_BOX(&lilora::missing_code_on));
#ifdef LILORA_HOPPER
  m.impl("slot_bytes", TORCH_BOX(&lilora::slot_bytes));
#endif
}
