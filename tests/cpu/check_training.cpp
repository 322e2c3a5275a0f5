// The CPU kernels with gradients against the formula in double, for a processor that has no Python: `make cpu-check-arm64`. Each
// gradient is held against the difference of sum(dy y) along a random direction of its input. Prints the largest error of
// y and of the gradients; fails beyond 1e-4.

#include "../../csrc/cpu/training.cpp"

#include <stdio.h>

#include <random>
#include <vector>

std::mt19937 generator(7);
typedef std::vector<float> Values;
typedef std::vector<double> Wide;
struct Sizes {
  int64_t rows, columns, outputs, rank, sub_rank, tasks;
};

Values random_values(int64_t count) {
  std::normal_distribution<float> normal;
  Values values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

// In the order of Training: x, a, b0, u, v, fusion.
Wide formula(const Sizes& n, const Wide (&of)[6], const Values& weight, const Values& bias, const std::vector<int32_t>& task) {
  const auto& [x, a, b0, u, v, fusion] = of;
  Wide y(n.rows * n.outputs);
  for (int64_t m = 0; m < n.rows; ++m) {
    const int64_t t = task[m];
    Wide h(n.rank, 0), z(n.sub_rank, 0);
    for (int64_t r = 0; r < n.rank && t >= 0; ++r)
      for (int64_t k = 0; k < n.columns; ++k) h[r] += x[m * n.columns + k] * a[r * n.columns + k];
    for (int64_t s = 0; s < n.sub_rank && t >= 0; ++s)
      for (int64_t r = 0; r < n.rank; ++r) z[s] += h[r] * v[(t * n.sub_rank + s) * n.rank + r];
    const double f = t < 0 ? 0 : sigmoid(fusion[t]);
    for (int64_t o = 0; o < n.outputs; ++o) {
      double sum = bias[o];
      for (int64_t k = 0; k < n.columns; ++k) sum += x[m * n.columns + k] * weight[o * n.columns + k];
      for (int64_t r = 0; r < n.rank; ++r) sum += 0.5 * f * h[r] * b0[o * n.rank + r];
      for (int64_t s = 0; s < n.sub_rank && t >= 0; ++s) sum += 0.5 * (1 - f) * z[s] * u[(t * n.outputs + o) * n.sub_rank + s];
      y[m * n.outputs + o] = sum;
    }
  }
  return y;
}

double dot(const Values& left, const Wide& right) {
  double sum = 0;
  for (size_t i = 0; i < left.size(); ++i) sum += left[i] * right[i];
  return sum;
}

double error(const Sizes& n) {
  const int64_t counts[6] = {n.rows * n.columns, n.rank * n.columns, n.outputs * n.rank, n.tasks * n.outputs * n.sub_rank,
                             n.tasks * n.sub_rank * n.rank, n.tasks};
  Values of[6], found[6], weight = random_values(n.outputs * n.columns), bias = random_values(n.outputs);
  Wide wide[6];
  for (int i = 0; i < 6; ++i) {
    of[i] = random_values(counts[i]);
    found[i] = Values(counts[i], NAN);
    wide[i] = Wide(of[i].begin(), of[i].end());
  }
  std::vector<int32_t> task(n.rows);
  for (auto& t : task) t = (int32_t)(generator() % (n.tasks + 1)) - 1;
  Values h(n.rows * n.rank, NAN), y(n.rows * n.outputs, NAN), dy = random_values(n.rows * n.outputs);
  Training call = {n.rows, of[0].data(), h.data(), y.data(), task.data(), nullptr, found[0].data(), found[1].data(),
                   found[2].data(), found[3].data(), found[4].data(), found[5].data(), weight.data(), bias.data(), of[1].data(),
                   of[2].data(), of[3].data(), of[4].data(), of[5].data(), n.columns, n.outputs, n.rank, n.sub_rank, n.tasks,
                   nullptr, 1, 0.5, 1};
  if (lilora_cpu_train_forward(&call) != 0) return INFINITY;
  const Wide want = formula(n, wide, weight, bias, task);
  double worst = 0, largest = 0;
  for (size_t i = 0; i < want.size(); ++i) largest = fmax(largest, fabs(want[i]));
  const auto seen = [&](double difference) { worst = difference > worst || difference != difference ? difference : worst; };
  for (size_t i = 0; i < want.size(); ++i) seen(fabs(y[i] - want[i]) / largest);
  call.y = dy.data();
  if (lilora_cpu_train_backward(&call) != 0) return INFINITY;
  for (int i = 0; i < 6; ++i) {
    const Values direction = random_values(counts[i]);
    double sums[2], step = 1e-5, scale = 1e-12;
    for (int side : {0, 1}) {
      Wide moved[6];
      for (int k = 0; k < 6; ++k) moved[k] = wide[k];
      for (int64_t k = 0; k < counts[i]; ++k) moved[i][k] += (side ? step : -step) * direction[k];
      sums[side] = dot(dy, formula(n, moved, weight, bias, task));
    }
    double got = 0;
    for (int64_t k = 0; k < counts[i]; ++k) {
      got += (double)found[i][k] * direction[k];
      scale += fabs((double)found[i][k] * direction[k]);
    }
    seen(fabs(got - (sums[1] - sums[0]) / (2 * step)) / scale);
  }
  return worst;
}

int main() {
  double worst = 0;
  for (int64_t rows : {1, 3, 8, 33})
    for (int64_t columns : {1, 15, 70})
      for (int64_t tasks : {1, 3}) {
        const double found = error({rows, columns, 11, 13, 5, tasks});
        worst = found > worst || found != found ? found : worst;
      }
  printf("training: %.1e\n", worst);
  return !(worst < 1e-4);
}
