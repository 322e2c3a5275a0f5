// The kernels of decode for one instruction set, see instruction_sets.h.

#include "vectors.h"

typedef Vector Sums[kMostRows][COLUMNS];

// The loops over m and n have to be unrolled early, or their sums are copied through the stack.
template <int M, int N, class T>
INLINE void add(Vector (&s)[M][N], const float* x, int64_t x_stride, const T* w, int64_t w_stride) {
  Vector column[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) column[n] = widened(w + n * w_stride);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const Vector row = widened(x + m * x_stride);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) s[m][n] += row * column[n];
  }
}

// sums[m][n] += x[m] . w[n] over `length` elements, m < M, n < N. Every sum has a register of its own: its order, hence its
// bits, depend on neither M nor N.
template <int M, int N, class T>
TARGET static void add_tile(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t length, int64_t ahead,
                            Vector (*sums)[COLUMNS]) {
  constexpr int64_t kLine = 64 / sizeof(T) > LANES ? 64 / sizeof(T) : LANES;
  Vector s[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) s[m][n] = sums[m][n];
  int64_t k = 0;
  for (; k + kLine <= length; k += kLine) {
#pragma GCC unroll 8
    for (int n = 0; ahead && n < N; ++n) __builtin_prefetch(w + n * w_stride + ahead + k, 0, 2);  // into the second cache
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLine; i += LANES) add<M, N>(s, x + k + i, x_stride, w + k + i, w_stride);
  }
  for (; k + LANES <= length; k += LANES) add<M, N>(s, x + k, x_stride, w + k, w_stride);
  if (k < length) {
    T last[N][LANES] = {};
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) memcpy(last[n], w + n * w_stride + k, (length - k) * sizeof(T));
    add<M, N>(s, x + k, x_stride, last[0], LANES);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n] = s[m][n];
}

// Pieces of memory that are asked for between products, so many lines at a time.
struct Pieces {
  const char* const* starts;
  int64_t offset, bytes, left, lines, at;
};

INLINE void ask(Pieces& pieces) {
  for (int64_t line = 0; line < pieces.lines && pieces.left > 0; ++line) {
    __builtin_prefetch(*pieces.starts + pieces.offset + pieces.at, 0, 2);
    pieces.at += 64;
    if (pieces.at < pieces.bytes) continue;
    pieces.at = 0;
    ++pieces.starts;
    --pieces.left;
  }
}

// The same for M rows and so many groups of N columns.
template <int M, int N, class T>
INLINE void add_tiles(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t length, int64_t ahead,
                      int64_t groups, Pieces& pieces, int64_t m, Sums* sums) {
  for (int64_t group = 0; group < groups; ++group) {
    add_tile<M, N>(x, x_stride, w + group * N * w_stride, w_stride, length, ahead, sums[group] + m);
    ask(pieces);
  }
}

// The same for rows [first, last) of x, by blocks of elements that stay in the first cache. `ahead` elements further on are the
// next item's.
template <int N, class T>
TARGET static void add_rows(const Rows& x, int64_t first, int64_t last, const T* w, int64_t length, int64_t ahead,
                            int64_t groups, Pieces& pieces, Sums* sums) {
  for (int64_t k = 0; k < length; k += kBlock) {
    const int64_t block = length - k < kBlock ? length - k : kBlock;
    int64_t m = first;
    for (; m + ROWS <= last; m += ROWS)
      add_tiles<ROWS, N>(&x.at(m, k), x.width, w + k, length, block, ahead, groups, pieces, m, sums);
    for (; m + 2 <= last; m += 2) add_tiles<2, N>(&x.at(m, k), x.width, w + k, length, block, ahead, groups, pieces, m, sums);
    for (; m < last; ++m) add_tiles<1, N>(&x.at(m, k), x.width, w + k, length, block, ahead, groups, pieces, m, sums);
  }
}

template <class T>
INLINE void add_columns(const Rows& x, int64_t first, int64_t last, const T* w, int64_t count, int64_t length, int64_t ahead,
                        Pieces& pieces, Sums* sums) {
  const int64_t groups = count / COLUMNS, done = groups * COLUMNS;
  if (groups > 0) add_rows<COLUMNS>(x, first, last, w, length, ahead, groups, pieces, sums);
  for (int64_t n = done; n < count; ++n)
    add_rows<1>(x, first, last, w + n * length, length, ahead, 1, pieces, (Sums*)&sums[groups][0][n - done]);
}

// sums[n / COLUMNS][m][n % COLUMNS] += x[m] . w[w_row + n], first <= m < last, n < count. In between asks for the rows of w that
// come next, and for the pieces.
TARGET static void add_products(const Rows& x, int64_t first, int64_t last, const Matrix& w, int64_t w_row, int64_t count,
                                int64_t length, Pieces pieces, Sums* sums) {
  const int64_t at = w_row * length, ahead = count * length;
  if (w.type == kFloat) add_columns(x, first, last, (const float*)w.data + at, count, length, ahead, pieces, sums);
  else if (w.type == kBfloat16) add_columns(x, first, last, (const Bfloat16*)w.data + at, count, length, ahead, pieces, sums);
  else add_columns(x, first, last, (const Half*)w.data + at, count, length, ahead, pieces, sums);
}

// sums += z U_t^T of each run, for outputs [first, first + count): a run is often one row, of few products.
template <class T>
TARGET static void add_of_tasks(const Work& work, const T* u, int64_t first, int64_t count, Sums* sums) {
  const int64_t length = work.call->sub_rank;
  Pieces none = {};
  for (int64_t i = 0; i < work.runs; ++i) {
    const Run& run = work.run[i];
    const T* const w = u + (run.task * work.call->outputs + first) * length;
    if (run.last - run.first > 1 || length > kBlock || count % COLUMNS) {
      add_columns(work.z, run.first, run.last, w, count, length, 0, none, sums);
      continue;
    }
    const float* const z = &work.z.at(run.first, 0);
    for (int64_t group = 0; group * COLUMNS < count; ++group)
      add_tile<1, COLUMNS>(z, 0, w + group * COLUMNS * length, length, length, 0, sums[group] + run.first);
  }
}

TARGET static void add_of_tasks(const Work& work, int64_t first, int64_t count, Sums* sums) {
  const Matrix& u = work.call->u;
  if (u.type == kFloat) add_of_tasks(work, (const float*)u.data, first, count, sums);
  else if (u.type == kBfloat16) add_of_tasks(work, (const Bfloat16*)u.data, first, count, sums);
  else add_of_tasks(work, (const Half*)u.data, first, count, sums);
}

static inline int64_t items_of(int64_t outputs, int64_t width = COLUMNS) { return (outputs + width - 1) / width; }

// What threads share is items of so many outputs, the last of them with less.
INLINE int64_t outputs_of(int64_t first, int64_t all, int64_t width = COLUMNS) {
  return all - first < width ? all - first : width;
}

// h = x A^T, q = h * gate and f s q.
TARGET static void shrink(const Work& work, int64_t item) {
  const Call& call = *work.call;
  const int64_t first = item * COLUMNS, count = outputs_of(first, call.rank);
  Sums sums;
  memset(sums, 0, call.rows * sizeof sums[0]);
  add_products(work.x, 0, call.rows, call.a, first, count, call.columns, {}, &sums);
  for (int64_t m = 0; m < call.rows; ++m)
    for (int64_t n = 0, r = first; n < count; ++n, ++r) {
      const float h = total(sums[m][n]), gate = call.gate.data ? value(call.gate, work.gate_row[m] * call.rank + r) : 1;
      if (call.h) store(call.h, work.row[m] * call.rank + r, call.x_type, h);
      work.q.at(m, r) = h * gate;
      work.scaled_q.at(m, r) = h * gate * work.of_shared[m];
    }
}

// e s z with z = q V_t^T, for the rows of one task.
TARGET static void reduce(const Work& work, int64_t item) {
  const Call& call = *work.call;
  const int64_t of_run = items_of(call.sub_rank);
  const Run& run = work.run[item / of_run];
  const int64_t first = item % of_run * COLUMNS, count = outputs_of(first, call.sub_rank);
  Sums sums;
  memset(sums + run.first, 0, (run.last - run.first) * sizeof sums[0]);
  add_products(work.q, run.first, run.last, call.v, run.task * call.sub_rank + first, count, call.rank, {}, &sums);
  for (int64_t m = run.first; m < run.last; ++m)
    for (int64_t n = 0; n < count; ++n) work.z.at(m, first + n) = total(sums[m][n]) * work.of_task[m];
}

// Outputs of an item: many rows of x fill the second cache, and are read again for each item.
TARGET static int64_t expanded(const Work& work) { return work.call->rows > kFewRows ? kGroups * COLUMNS : COLUMNS; }

// y = x W^T + bias + f s q B0^T + e s z U_t^T.
TARGET static void expand(const Work& work, int64_t item) {
  const Call& call = *work.call;
  const int64_t width = expanded(work), first = item * width;
  const int64_t count = outputs_of(first, call.outputs, width);
  Sums sums[kGroups];
  for (int64_t group = 0; group * COLUMNS < count; ++group) memset(sums[group], 0, call.rows * sizeof sums[0][0]);
  const int64_t row = call.sub_rank * size_of(call.u.type);
  const int64_t tiles = (call.rows + ROWS - 1) / ROWS * ((call.columns + kBlock - 1) / kBlock) * items_of(count);
  const int64_t lines = call.u.data ? work.runs * (count * row / 64 + 1) : 0;
  const Pieces pieces = {work.own, first * row, count * row, call.u.data ? work.runs : 0, lines / (tiles + 1) + 1, 0};
  if (call.weight.data) add_products(work.x, 0, call.rows, call.weight, first, count, call.columns, pieces, sums);
  add_products(work.scaled_q, 0, work.adapted, call.b0, first, count, call.rank, {}, sums);
  if (call.u.data) add_of_tasks(work, first, count, sums);
  float bias[kGroups * COLUMNS] = {};
  for (int64_t n = 0; call.bias.data && n < count; ++n) bias[n] = value(call.bias, first + n);
  for (int64_t m = 0; m < call.rows; ++m) {
    const int64_t at = work.row[m] * call.outputs + first;
    for (int64_t group = 0, n = 0; n < count; ++group)
      for (int i = 0; i < COLUMNS && n < count; ++i, ++n)
        store(call.y, at + n, call.x_type, total(sums[group][m][i]) + bias[n]);
  }
}

template <void run_item(const Work&, int64_t)>
TARGET static void run_items(int64_t begin, int64_t end, void* context) {
  const Sides& sides = *(const Sides*)context;
  for (int64_t item = begin; item < end; ++item) {
    const bool second = item >= sides.first_items;
    run_item(sides.work[second], second ? item - sides.first_items : item);
  }
}

// A phase of all sides: each has so many items, each of them so many products.
template <void run_item(const Work&, int64_t)>
TARGET static void run_phase(Sides& sides, int64_t items(const Work&), int64_t products) {
  int64_t all = 0;
  for (int64_t side = 0; side < sides.count; ++side) all += items(sides.work[side]);
  sides.first_items = items(*sides.work);
  share(sides.work->call->parallel_for, run_items<run_item>, &sides, all, products);
}

template <class T>
TARGET static void widen_rows(const Work& work, const T* x) {
  const int64_t columns = work.call->columns;
  for (int64_t m = 0; m < work.call->rows; ++m)
    for (int64_t k = 0; k < columns; k += kBlock)
      widen(&work.x.at(m, k), x + work.row[m] * work.call->x_stride + k, columns - k < kBlock ? columns - k : kBlock);
}

TARGET static void run(Sides& sides) {
  const Work& work = *sides.work;
  const Call& call = *work.call;
  if (call.x_type == kFloat) widen_rows(work, (const float*)call.x);
  else if (call.x_type == kBfloat16) widen_rows(work, (const Bfloat16*)call.x);
  else widen_rows(work, (const Half*)call.x);
  const int64_t products = call.rows * COLUMNS;
  run_phase<shrink>(sides, [](const Work& w) { return items_of(w.call->rank); }, products * call.columns);
  run_phase<reduce>(sides, [](const Work& w) { return w.call->u.data ? w.runs * items_of(w.call->sub_rank) : 0; },
                    products * call.rank);
  const int64_t length = (call.weight.data ? call.columns : 0) + call.rank + call.sub_rank;
  run_phase<expand>(sides, [](const Work& w) { return items_of(w.call->outputs, expanded(w)); }, products * length);
}
