// The CPU kernels against the formula in double, for a processor that has no Python: `make cpu-check-arm64`. Prints the largest
// error of each type in units of its rounding, of y relative to the sum of the absolute products; fails beyond 4.

#include "../../csrc/cpu/decode.cpp"

#include <stdio.h>

#include <random>
#include <vector>

std::mt19937 generator(7);

struct Values {
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  int64_t type;

  Values(int64_t count, int64_t type) : wide(count), narrow(count), type(type) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      store(narrow.data(), i, type == kFloat ? kHalf : type, normal(generator));
      wide[i] = type == kFloat ? normal(generator) : value({narrow.data(), type}, i);
    }
  }
  const void* data() const { return type == kFloat ? (const void*)wide.data() : narrow.data(); }
  operator Matrix() const { return {data(), type}; }
  double operator[](int64_t i) const { return wide[i]; }
};

double error(int64_t type, int64_t rows, int64_t columns, int64_t outputs, int64_t rank, int64_t sub_rank, int64_t tasks) {
  Values x(rows * columns, type), weight(outputs * columns, type), bias(outputs, type), a(rank * columns, type);
  Values b0(outputs * rank, type), u(tasks * outputs * sub_rank, type), v(tasks * sub_rank * rank, type), fusion(tasks, type);
  std::vector<int32_t> task(rows);
  for (auto& t : task) t = (int32_t)(generator() % (tasks + 1)) - 1;
  Values y(rows * outputs, type), h(rows * rank, type);
  const Call call = {rows, columns, x.data(), (void*)y.data(), (void*)h.data(), task.data(), nullptr, {}, 1,
                     columns, outputs, rank, sub_rank, tasks, type, weight, bias, a, b0, u, v, fusion,
                     nullptr, lilora_cpu_instructions(), 0.5};
  if (lilora_cpu_decode(&call, 1) != 0) return INFINITY;
  double worst = 0;
  for (int64_t m = 0; m < rows; ++m) {
    std::vector<double> q(rank, 0), z(sub_rank, 0), size(rank, 0), z_size(sub_rank, 0);
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t k = 0; k < columns; ++k) {
        q[r] += x[m * columns + k] * a[r * columns + k];
        size[r] += fabs(x[m * columns + k] * a[r * columns + k]);
      }
    const int64_t t = task[m];
    const double f = t < 0 ? 0 : sigmoid(fusion[t]), e = t < 0 ? 0 : 1 - f;
    for (int64_t s = 0; s < sub_rank && t >= 0; ++s)
      for (int64_t r = 0; r < rank; ++r) {
        z[s] += q[r] * v[(t * sub_rank + s) * rank + r];
        z_size[s] += size[r] * fabs(v[(t * sub_rank + s) * rank + r]);
      }
    for (int64_t n = 0; n < outputs; ++n) {
      double sum = bias[n], all = fabs(bias[n]);
      for (int64_t k = 0; k < columns; ++k) {
        sum += x[m * columns + k] * weight[n * columns + k];
        all += fabs(x[m * columns + k] * weight[n * columns + k]);
      }
      for (int64_t r = 0; r < rank && t >= 0; ++r) {
        sum += 0.5 * f * q[r] * b0[n * rank + r];
        all += 0.5 * f * size[r] * fabs(b0[n * rank + r]);
      }
      for (int64_t s = 0; s < sub_rank && t >= 0; ++s) {
        sum += 0.5 * e * z[s] * u[(t * outputs + n) * sub_rank + s];
        all += 0.5 * e * z_size[s] * fabs(u[(t * outputs + n) * sub_rank + s]);
      }
      const double rounding = type == kFloat ? 0x1p-24 : type == kBfloat16 ? 0x1p-8 : 0x1p-11;
      const double found = fabs(value(y, m * outputs + n) - sum) / (all * rounding);
      worst = found > worst || found != found ? found : worst;
    }
  }
  return worst;
}

int main() {
  const char* names[] = {"fp32", "bf16", "fp16"};
  bool right = true;
  for (int64_t type : {kFloat, kBfloat16, kHalf}) {
    double worst = 0;
    for (int64_t rows : {1, 2, 3, 5, 8, 32})
      for (int64_t columns : {1, 15, 64, 1100})
        for (int64_t tasks : {1, 3, 8}) {
          const double found = error(type, rows, columns, 11, 13, 5, tasks);
          worst = found > worst || found != found ? found : worst;
        }
    printf("%s: %.2f\n", names[type], worst);
    right &= worst < 4;
  }
  return !right;
}
