// The kernels of training.cpp for one instruction set, see instruction_sets.h.

#include "vectors.h"

#define WIDE 2               // registers of a row of a tile
#define GROUP (WIDE * LANES)  // its columns
#define GROUPS 2             // at most so many tiles side by side, for which rows of the left side are read once
#define PANEL (GROUPS * GROUP)
#define LENGTH 64            // of the products that are added up before they join the sums of others: longer sums lose digits
#define TALL 6               // rows of a tile: with WIDE their sums hide an addition's latency, and 16 registers hold them

// Sums of rows of a result, and blocks of a matrix by which these columns are multiplied.
struct Sums {
  Vector of[kMostRows][GROUPS][WIDE];
  Vector block[GROUPS][LENGTH][WIDE];
};

INLINE void clear(Sums& sums, int64_t rows) { memset(sums.of, 0, rows * sizeof *sums.of); }

// Four elements of each of four rows, `row` apart, to four rows of a block.
INLINE void transpose(Vector (*to)[WIDE], int64_t at, const float* from, int64_t row) {
  Four rows[4], pairs[4], columns[4];
  for (int i = 0; i < 4; ++i) memcpy(&rows[i], from + i * row, sizeof rows[i]);
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = SHUFFLED(rows[i], rows[i + 1], 0, 4, 1, 5);
    pairs[i + 1] = SHUFFLED(rows[i], rows[i + 1], 2, 6, 3, 7);
  }
  for (int i = 0; i < 2; ++i) {
    columns[2 * i] = SHUFFLED(pairs[i], pairs[2 + i], 0, 1, 4, 5);
    columns[2 * i + 1] = SHUFFLED(pairs[i], pairs[2 + i], 2, 3, 6, 7);
  }
  for (int i = 0; i < 4; ++i) memcpy((float*)to[i] + at, &columns[i], sizeof columns[i]);
}

// Rows [j, j + length) and columns [c, c + count) of a product's right side, with zeros up to GROUP.
INLINE void pack(Vector (*block)[WIDE], const Product& of, int64_t j, int64_t length, int64_t c, int64_t count) {
  const float* from = of.right + j * of.right_row + c * of.right_step;
  int64_t i = 0;
  if (of.right_row == 1 && count == GROUP)
    for (; i + 4 <= length; i += 4, from += 4)
      for (int64_t n = 0; n < GROUP; n += 4) transpose(block + i, n, from + n * of.right_step, of.right_step);
  for (; i < length; ++i, from += of.right_row) {
    float* const to = (float*)block[i];
    if (count < GROUP) memset(to, 0, sizeof block[i]);
    if (of.right_step == 1 && count == GROUP) memcpy(to, from, sizeof block[i]);
    else
      for (int64_t n = 0; n < count; ++n) to[n] = from[n * of.right_step];
  }
}

template <int M>
INLINE void add_tile(Sums& sums, int64_t group, const float* left, int64_t row, int64_t step, int64_t length, int64_t at) {
  Vector tile[M][WIDE] = {};
  for (int64_t j = 0; j < length; ++j, left += step)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < WIDE; ++n) tile[m][n] += left[m * row] * sums.block[group][j][n];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < WIDE; ++n) sums.of[at + m][group][n] += tile[m][n];
}

template <int M>
INLINE void add_tiles(Sums& sums, int64_t groups, const float* left, int64_t row, int64_t step, int64_t length, int64_t at) {
  for (int64_t group = 0; group < groups; ++group) add_tile<M>(sums, group, left, row, step, length, at);
}

INLINE int64_t columns_of(int64_t c, int64_t all, int64_t most) { return all - c < most ? all - c : most; }

// Of the product's rows [first, last) and columns [c, c + count), added to the sums from `at` on.
TARGET static void add(Sums& sums, const Product& of, int64_t first, int64_t last, int64_t c, int64_t count, int64_t at) {
  if (first == last) return;
  const int64_t groups = (count + GROUP - 1) / GROUP;
  for (int64_t j = 0; j < of.length; j += LENGTH) {
    const int64_t length = of.length - j < LENGTH ? of.length - j : LENGTH;
    for (int64_t group = 0, n = 0; group < groups; ++group, n += GROUP)
      pack(sums.block[group], of, j, length, c + n, columns_of(n, count, GROUP));
    int64_t i = first;
    const float* const left = of.left + j * of.left_step;
    for (; i + TALL <= last; i += TALL)
      add_tiles<TALL>(sums, groups, left + i * of.left_row, of.left_row, of.left_step, length, at + i - first);
    for (; i + 2 <= last; i += 2)
      add_tiles<2>(sums, groups, left + i * of.left_row, of.left_row, of.left_step, length, at + i - first);
    for (; i < last; ++i) add_tiles<1>(sums, groups, left + i * of.left_row, of.left_row, of.left_step, length, at + i - first);
  }
}

// Into rows of a matrix of this width, row i at `row[i]`, or at i.
INLINE void store(const Sums& sums, float* to, int64_t width, const int64_t* row, int64_t first, int64_t last, int64_t c,
                  int64_t count) {
  for (int64_t i = first; i < last; ++i) {
    float* const at = to + (row ? row[i] : i) * width + c;
    if (count == PANEL) memcpy(at, sums.of[i - first], PANEL * sizeof(float));
    else memcpy(at, sums.of[i - first], count * sizeof(float));
  }
}

// Columns that are worked on together: with few rows reading the right side is the price, and two of its blocks are no help.
INLINE int64_t panel_of(int64_t rows) { return rows > 128 ? PANEL : GROUP; }

static inline int64_t items_of(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

// Rows [first, last) of a matrix of this width: a product of theirs.
TARGET static void write(Sums& sums, const Product& of, int64_t first, int64_t last, float* to, int64_t width) {
  for (int64_t i = first; i < last; i += kMostRows)
    for (int64_t c = 0; c < width; c += PANEL) {
      const int64_t end = last - i < kMostRows ? last : i + kMostRows, count = columns_of(c, width, PANEL);
      clear(sums, end - i);
      add(sums, of, i, end, c, count, 0);
      store(sums, to, width, nullptr, i, end, c, count);
    }
}

// In double: of two of them, which may all but cancel, the difference is taken.
INLINE double dot(const float* left, const float* right, int64_t count) {
  typedef double Wide __attribute__((vector_size(8 * LANES)));
  Wide sums = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    sums += __builtin_convertvector(widened(left + i), Wide) * __builtin_convertvector(widened(right + i), Wide);
  double sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
  for (; i < count; ++i) sum += (double)left[i] * right[i];
  return sum;
}

// The U_t, or V_t, of a task.
INLINE float* own(const Training& call, const float* factors, int64_t task, int64_t width) {
  return (float*)factors + task * call.sub_rank * width;
}

// h = D(x) A^T by groups of ranks.
TARGET static void shrink(int64_t begin, int64_t end, void* context) {
  const Work& work = *(const Work*)context;
  const Training& call = *work.call;
  Sums sums;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t c = group * GROUP, count = columns_of(c, call.rank, GROUP);
    clear(sums, call.rows);
    add(sums, {work.dropped, call.columns, 1, call.a, 1, call.columns, call.columns}, 0, call.rows, c, count, 0);
    for (int64_t m = 0; m < call.rows && call.keep; ++m)
      for (int n = 0; n < WIDE; ++n) sums.of[m][0][n] *= (float)call.keep_scale;
    store(sums, call.h, call.rank, work.row, 0, call.rows, c, count);
    if (work.h != call.h) store(sums, work.h, call.rank, nullptr, 0, call.rows, c, count);
  }
}

// s f h, and e s h V_t^T, of each run.
TARGET static void reduce(int64_t begin, int64_t end, void* context) {
  const Work& work = *(const Work*)context;
  const Training& call = *work.call;
  Sums sums;
  for (int64_t item = begin; item < end; ++item) {
    const Run& run = work.run[item];
    const Shares shares({call.fusion, kFloat}, run.task, call.scaling);
    for (int64_t k = run.first * call.rank; k < run.last * call.rank; ++k) work.scaled_h[k] = shares.of_shared * work.h[k];
    if (call.u == nullptr) continue;
    const Product product = {work.h, call.rank, 1, own(call, call.v, run.task, call.rank), 1, call.rank, call.rank};
    write(sums, product, run.first, run.last, work.z, call.sub_rank);
    for (int64_t k = run.first * call.sub_rank; k < run.last * call.sub_rank; ++k) work.z[k] *= shares.of_task;
  }
}

// y = x W^T + bias + s f h B0^T + e s z U_t^T by panels of outputs.
TARGET static void expand(int64_t begin, int64_t end, void* context) {
  const Work& work = *(const Work*)context;
  const Training& call = *work.call;
  const int64_t width = panel_of(call.rows);
  Sums sums;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t c = panel * width, count = columns_of(c, call.outputs, width);
    float bias[PANEL] = {};
    if (call.bias) memcpy(bias, call.bias + c, count * sizeof(float));
    for (int64_t m = 0; m < call.rows; ++m) memcpy(sums.of[m], bias, sizeof bias);
    const Product base = {work.x, call.columns, 1, call.weight, 1, call.columns, call.columns};
    if (call.weight) add(sums, base, 0, call.rows, c, count, 0);
    add(sums, {work.scaled_h, call.rank, 1, call.b0, 1, call.rank, call.rank}, 0, work.adapted, c, count, 0);
    for (int64_t i = 0; i < work.runs && call.u; ++i) {
      const Run& run = work.run[i];
      const float* const u = own(call, call.u, run.task, call.outputs);
      const Product product = {work.z, call.sub_rank, 1, u, 1, call.sub_rank, call.sub_rank};
      add(sums, product, run.first, run.last, c, count, run.first);
    }
    store(sums, call.y, call.outputs, work.row, 0, call.rows, c, count);
  }
}

TARGET static void forward(Work& work) {
  const Training& call = *work.call;
  share(call.parallel_for, shrink, &work, items_of(call.rank, GROUP), call.rows * GROUP * call.columns);
  share(call.parallel_for, reduce, &work, work.runs, call.rank * (1 + work.sub_rank));
  const int64_t length = (call.weight ? call.columns : 0) + call.rank + work.sub_rank;
  const int64_t width = panel_of(call.rows);
  share(call.parallel_for, expand, &work, items_of(call.outputs, width), call.rows * width * length);
}

// dy B0 by groups of ranks; then of each run dy U_t and z = h V_t^T.
TARGET static void through_up(int64_t begin, int64_t end, void* context) {
  const Work& work = *(const Work*)context;
  const Training& call = *work.call;
  const int64_t groups = items_of(call.rank, GROUP);
  Sums sums;
  for (int64_t item = begin; item < end; ++item) {
    if (item < groups) {
      const int64_t c = item * GROUP, count = columns_of(c, call.rank, GROUP);
      clear(sums, work.adapted);
      add(sums, {work.y, call.outputs, 1, call.b0, call.rank, 1, call.outputs}, 0, work.adapted, c, count, 0);
      store(sums, work.dh, call.rank, nullptr, 0, work.adapted, c, count);
      continue;
    }
    const Run& run = work.run[item - groups];
    const float* const u = own(call, call.u, run.task, call.outputs);
    write(sums, {work.y, call.outputs, 1, u, call.sub_rank, 1, call.outputs}, run.first, run.last, work.dz, call.sub_rank);
    if (work.h == nullptr) continue;
    const float* const v = own(call, call.v, run.task, call.rank);
    write(sums, {work.h, call.rank, 1, v, 1, call.rank, call.rank}, run.first, run.last, work.z, call.sub_rank);
  }
}

// Of each run what its coefficients scale, dh, and the gradients of V_t and fusion.
TARGET static void through_tasks(int64_t begin, int64_t end, void* context) {
  const Work& work = *(const Work*)context;
  const Training& call = *work.call;
  const int64_t rank = call.rank, sub_rank = work.sub_rank;
  Sums sums;
  for (int64_t item = begin; item < end; ++item) {
    const Run& run = work.run[item];
    const Shares shares({call.fusion, kFloat}, run.task, call.scaling);
    const int64_t first = run.first * sub_rank, last = run.last * sub_rank;
    if (call.dfusion) {
      double sum = 0;
      for (int64_t m = run.first; m < run.last; ++m)
        sum += dot(work.dh + m * rank, work.h + m * rank, rank) -
               dot(work.dz + m * sub_rank, work.z + m * sub_rank, sub_rank);
      call.dfusion[run.task] = sum * shares.f * shares.e * call.scaling;
    }
    for (int64_t k = run.first * rank; k < run.last * rank && work.h; ++k) work.scaled_h[k] = shares.of_shared * work.h[k];
    for (int64_t k = first; k < last && work.h; ++k) work.z[k] *= shares.of_task;
    for (int64_t k = first; k < last; ++k) work.dz[k] *= shares.of_task;
    if (call.dv) {
      const Product product = {work.dz + first, 1, sub_rank, work.h + run.first * rank, rank, 1, run.last - run.first};
      write(sums, product, 0, sub_rank, own(call, call.dv, run.task, rank), rank);
    }
    for (int64_t m = run.first; m < run.last; ++m) {
      float* const dh = work.dh + m * rank;
      for (int64_t r = 0; r < rank; ++r) dh[r] *= shares.of_shared * (float)call.keep_scale;
      for (int64_t s = 0; s < sub_rank; ++s) {
        const float dz = work.dz[m * sub_rank + s] * (float)call.keep_scale;
        const float* const v = own(call, call.v, run.task, rank) + s * rank;
        for (int64_t r = 0; r < rank; ++r) dh[r] += dz * v[r];
      }
    }
  }
}

// 0 where dropout takes x away.
INLINE void mask(Sums& sums, const Work& work, int64_t c, int64_t count) {
  for (int64_t m = 0; m < work.adapted; ++m) {
    const uint8_t* const keep = work.call->keep + work.row[m] * work.call->columns + c;
    for (int64_t n = 0; n < count; ++n)
      if (!keep[n]) ((float*)sums.of[m])[n] = 0;
  }
}

// dx = dy W + D'(dh A) and dA = dh^T D(x) by panels of columns; then dB0 and dU by groups of outputs.
TARGET static void to_inputs(int64_t begin, int64_t end, void* context) {
  const Work& work = *(const Work*)context;
  const Training& call = *work.call;
  const int64_t columns = call.columns, outputs = call.outputs, rank = call.rank, sub_rank = work.sub_rank;
  const int64_t width = panel_of(call.rows);
  Sums sums;
  for (int64_t item = begin; item < end; ++item) {
    if (item < work.of_columns) {
      const int64_t c = item * width, count = columns_of(c, columns, width);
      if (call.dx) {
        clear(sums, call.rows);
        add(sums, {work.dh, rank, 1, call.a, columns, 1, rank}, 0, work.adapted, c, count, 0);
        if (call.keep) mask(sums, work, c, count);
        if (call.weight) add(sums, {work.y, outputs, 1, call.weight, columns, 1, outputs}, 0, call.rows, c, count, 0);
        store(sums, call.dx, columns, work.row, 0, call.rows, c, count);
      }
      for (int64_t r = 0; r < rank && call.da; r += kMostRows) {
        const int64_t last = rank - r < kMostRows ? rank : r + kMostRows;
        clear(sums, last - r);
        add(sums, {work.dh, 1, rank, work.dropped, columns, 1, work.adapted}, r, last, c, count, 0);
        store(sums, call.da, columns, nullptr, r, last, c, count);
      }
      continue;
    }
    const int64_t first = (item - work.of_columns) * kOutputs;
    const int64_t last = outputs - first < kOutputs ? outputs : first + kOutputs;
    if (call.db0) write(sums, {work.y, 1, outputs, work.scaled_h, rank, 1, work.adapted}, first, last, call.db0, rank);
    for (int64_t i = 0; i < work.runs && call.du; ++i) {
      const Run& run = work.run[i];
      const float *const dy = work.y + run.first * outputs, *const z = work.z + run.first * sub_rank;
      const Product product = {dy, 1, outputs, z, sub_rank, 1, run.last - run.first};
      write(sums, product, first, last, own(call, call.du, run.task, outputs), sub_rank);
    }
  }
}

TARGET static void backward(Work& work) {
  const Training& call = *work.call;
  const int64_t of_tasks = call.u ? work.runs : 0, groups = items_of(call.rank, GROUP);
  share(call.parallel_for, through_up, &work, groups + of_tasks, call.rows * GROUP * call.outputs);
  share(call.parallel_for, through_tasks, &work, work.runs, call.rank * (1 + work.sub_rank) * 2);
  const int64_t width = panel_of(call.rows);
  work.of_columns = call.dx || call.da ? items_of(call.columns, width) : 0;
  const int64_t of_outputs = call.db0 || call.du ? (call.outputs + kOutputs - 1) / kOutputs : 0;
  const int64_t products = call.rows * width * (call.outputs + 2 * call.rank);
  share(call.parallel_for, to_inputs, &work, work.of_columns + of_outputs, products);
}

#undef WIDE
#undef GROUP
#undef GROUPS
#undef PANEL
#undef LENGTH
#undef TALL
