// The kernels of `delta`: what a launch is given. lilora_kernels/ops/README.md has the formula and the phases.
#pragma once

#include <string>

#include "tile.h"

namespace lilora {

enum class Type { kHalf, kBFloat16 };  // of activations, and of the parameters that a launch is given

// The adapter's side of a call; data is null where an argument is not given.
struct Adapter {
  Matrix a;              // [R, K]
  Matrix b0;             // [N, R]
  Matrix u, v;           // [T * N, S] and [T * S, R]
  Matrix fusion;         // [1, T]
  Matrix gate;           // [G, R]
  const int* task;       // [M]
  const int* gate_row;   // [M]
  const int64_t* seed;   // null without dropout
  uint32_t threshold;    // draws below it are dropped
  float keep_scale, scaling;
  int64_t rows;          // M
  int columns, outputs, rank, sub_rank, tasks, gates;  // K, N, R, S (0 without task factors), T, G

  // Columns of [q | z], each part padded to whole chunks.
  HOST_DEVICE int q_width() const { return padded(rank); }
  HOST_DEVICE int width() const { return padded(rank) + padded(sub_rank); }
};

constexpr int kMostBaseRows = 64;

struct Launch {
  int* state;  // of the barrier between two phases of one launch
  int tile_rows;
  int shared;  // bytes of shared memory of a block
};

struct Forward {
  Adapter adapter;
  Matrix x;       // [M, K]
  Matrix weight;  // [N, K], only where the base is computed too: of up to kMostBaseRows rows, x and weight aligned, whole chunks
  Matrix bias;    // [1, N]
  void* y;        // [M, N]
  void* h;        // [M, R]
  void* qz;           // [M, width]: q, then e q V_t^T; for the fused product s f q, then s e q V_t^T
  void* q;            // [M, q_width]: q, only for the fused product, which takes the place of phase 2
  float* partials;  // [splits, M, q_width]: shares of h
  int splits;
  int groups;        // an item of phase 2 has one of so many ranges of outputs
  int base_columns;  // at most so many outputs of a group where the base is computed
  int row_tiles, sum_tiles, rank_tiles, output_tiles;  // sum_tiles: tiles of rows of phase 1
  Launch launch;

  static constexpr int kPhases = 3;
  HOST_DEVICE int items(int phase) const {
    if (phase == 0) return row_tiles * rank_tiles * splits;
    if (phase == 1) return sum_tiles;
    return q == nullptr ? row_tiles * groups : 0;
  }
};

// How many work items the phases of the backward have. Those of a phase follow each other in the order of the fields.
struct Items {
  int row_tiles, sum_tiles, chunks;  // sum_tiles: tiles of rows of phases 0 and 2
  int prepares, spans;                  // phase 0
  int shrinks, ups;                     // phase 1, of each chunk
  int finishes;                         // phase 2
  int dxs, das, dvs, fusions, gates;    // phase 3
  int a_sums, b0_sums, u_sums, v_sums;  // phase 4
  // Tiles of: width, width in products over rows, outputs, ranks, columns, ranks of dV, ranks of dgate.
  int wide_tiles, outer_width_tiles, output_tiles, rank_tiles, column_tiles, v_rank_tiles, gate_tiles;

  HOST_DEVICE int of(int phase) const {
    if (phase == 0) return prepares + spans;
    if (phase == 1) return chunks * (shrinks + ups);
    if (phase == 2) return finishes;
    if (phase == 3) return dxs + das + dvs + fusions + gates;
    return a_sums + b0_sums + u_sums + v_sums;
  }
};

struct Backward {
  Adapter adapter;
  Matrix dy;  // [M, N]
  Matrix x;   // [M, K]
  Matrix h;   // [M, R]
  // Gradients; null where nobody asked. `wide`: which of them are fp32.
  void *dx, *da, *db0, *du, *dv, *dfusion, *dgate;
  bool wide_a, wide_b0, wide_u, wide_v, wide_fusion, wide_gate;
  void* fqz;           // [M, width]: f q, then e q V_t^T
  void* q;             // [M, q_width]
  void* dh;            // [M, q_width]
  void* seq;           // [M, padded(S)]: s e Q
  float* dq_h;         // [M, R]: dq * h
  float* dfusion_rows; // [M]
  float* partials;       // [splits, M, width]: shares of [P | Q]
  float* da_partials;    // [chunks, a_share]: shares of [R, K]
  float* db0_partials;   // [chunks, b0_share]: of [N, R]
  float* du_partials;    // [chunks, T, u_share]: of [N, S]
  float* dv_partials;    // [chunks, T, v_share]: of [S, R]
  int64_t a_share, b0_share, u_share, v_share;  // elements of a share, so that the next one is aligned
  int* spans;          // [chunks, T, 2]: first and last row of a task within a chunk; last < first without one
  int splits, groups, chunk;  // chunk: rows of one share of the gradients of parameters
  int low_rank, high_rank;    // da and db0 outside are zero
  Items counts;
  Launch launch;

  static constexpr int kPhases = 5;
  HOST_DEVICE int items(int phase) const { return counts.of(phase); }
};

// Why the current device cannot run this binary's code; empty if it can.
std::string missing_code_on_current_device();

// Decides how the work is split, before the caller makes what depends on it: splits, groups and the size of tiles.
void plan(Forward& forward, Type type, bool one_launch);
void plan(Backward& backward, Type type, bool one_launch);

// Runs all phases: in one launch, or in one for each where asked for or where the device cannot hold the grid at once. In one
// launch the base is not computed.
void run(const Forward& forward, Type type, bool one_launch, Stream stream);
void run(Backward& backward, Type type, bool one_launch, Stream stream);

}  // namespace lilora
