// The product of few rows with a weight that passes by once, for one block: fragments come from global memory into registers.
//
// Each element of the weight is wanted by one warp alone: by way of shared memory it would only wait for copies and barriers.
// Of the summed dimension a product by tensor cores takes any order that both factors have, so a lane loads sixteen bytes of a
// row at once: its pairs of elements stand for the two that mma expects of it and for those eight further on.
#pragma once

#include "tile.h"

namespace lilora {

// c [rows, outputs] = x weight^T of one warp, of rows that begin at multiples of sixteen bytes and have whole chunks.
template <typename T, int kM>
struct StreamedProduct {
  static constexpr int kOutputs = 32, kDepth = 4 * kPerChunk;  // of one step
  static constexpr int kTilesM = kM / 16, kTilesN = kOutputs / 8;
  static constexpr int kAhead = kM == 16 ? 3 : 2;  // steps whose loads are under way: as registers allow

  Matrix x, weight;
  Range rows, outputs;
  float c[kTilesM][kTilesN][4];

  // This lane's elements: c[i][j][2 * half + e] is of row row(i, half) and output column(j) + e.
  DEVICE static int lane() { return threadIdx.x % 32; }
  DEVICE static int row(int i, int half) { return 16 * i + 8 * half + lane() / 4; }
  DEVICE static int column(int j) { return 8 * j + lane() % 4 * 2; }

  DEVICE void multiply_step(const Chunk (&left)[2 * kTilesM], const Chunk (&right)[kTilesN]) {
    UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      if (i > 0 && 16 * i >= rows.count) continue;
      const Chunk &upper = left[2 * i], &lower = left[2 * i + 1];
      UNROLL
      for (int w = 0; w < 4; w += 2) {
        const uint32_t fragment[4] = {upper.words[w], lower.words[w], upper.words[w + 1], lower.words[w + 1]};
        UNROLL
        for (int j = 0; j < kTilesN; ++j) multiply<T>(c[i][j], fragment, right[j].words[w], right[j].words[w + 1]);
      }
    }
  }

  // Of every eight rows this lane has one: its place in each, and whether there is one.
  template <int kRows>
  struct Rows {
    const T* from[kRows];
    int count;

    DEVICE Rows(const Matrix& m, Range range, int64_t column) : count(range.count) {
      UNROLL
      for (int i = 0; i < kRows; ++i) {
        from[i] = static_cast<const T*>(m.data) + (range.first + 8 * i + lane() / 4) * m.stride + column;
      }
    }
    DEVICE void load(Chunk (&to)[kRows], int further) const {
      UNROLL
      for (int i = 0; i < kRows; ++i) {
        if (8 * i + lane() / 4 < count) to[i] = load_words(from[i] + further);
      }
    }
    DEVICE void advance(int further) {
      UNROLL
      for (int i = 0; i < kRows; ++i) from[i] += further;
    }
  };

  // Adds the products of these columns. meanwhile() runs while the first loads are under way.
  template <typename Meanwhile>
  DEVICE void add(Range columns, Meanwhile meanwhile) {
    const int own = lane() % 4 * kPerChunk, steps = columns.count / kDepth;
    Rows<2 * kTilesM> x_rows(x, rows, columns.first + own);
    Rows<kTilesN> weight_rows(weight, outputs, columns.first + own);
    Chunk left[kAhead][2 * kTilesM] = {}, right[kAhead][kTilesN] = {};  // what is not loaded stays zero
    auto load_step = [&](int i, int to_go) {
      if (i >= to_go) return;
      weight_rows.load(right[i % kAhead], i * kDepth);
      x_rows.load(left[i % kAhead], i * kDepth);
    };
    UNROLL
    for (int i = 0; i < kAhead; ++i) load_step(i, steps);
    meanwhile();
    NO_UNROLL
    for (int to_go = steps; to_go > 0; to_go -= kAhead) {
      UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (i >= to_go) break;
        multiply_step(left[i], right[i]);
        load_step(i + kAhead, to_go);
      }
      x_rows.advance(kAhead * kDepth);
      weight_rows.advance(kAhead * kDepth);
    }
    if (const int rest = columns.count % kDepth; rest > 0) {  // chunks
      Chunk last_left[2 * kTilesM] = {}, last_right[kTilesN] = {};
      const int behind = (steps + kAhead - 1) / kAhead * kAhead - steps;
      if (own < rest) {
        weight_rows.load(last_right, -behind * kDepth);
        x_rows.load(last_left, -behind * kDepth);
      }
      multiply_step(last_left, last_right);
    }
  }
};

}  // namespace lilora
