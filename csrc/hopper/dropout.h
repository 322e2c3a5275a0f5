// Dropout on accumulators of one tile, between the adapter's steps and those of the base.
#pragma once

#include "hopper/index.h"
#include "philox.h"

namespace lilora::hopper {

struct Dropout {
  const int64_t* seed;  // null: none
  uint32_t threshold;   // 16-bit draws below it are dropped
  float keep_scale;
};

// Before and after the lanes of a quad exchange the words whose number has the bit `distance` with lane ^ distance;
// done for distances 1 and 2, the 4 x 4 words of the quad are transposed.
HOST_DEVICE void swap_words(uint32_t (&words)[4], int lane, int distance) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    if ((i & distance) != 0) continue;
    const bool swap = (lane & distance) != 0;
    const uint32_t low = words[i], high = words[i + distance];
    words[i] = swap ? high : low;
    words[i + distance] = swap ? low : high;
  }
}

// Multiplies the accumulators of a thread by mask and keep-scale. first_row and first_column: of the tile.
template <typename Accumulators>
DEVICE void apply_dropout(Accumulators& accumulators, const Dropout& dropout, int thread, int64_t first_row,
                          int64_t first_column) {
  const int64_t seed = *dropout.seed;
  const uint32_t threshold = dropout.threshold << 16;
  const int lane = thread % 32, own_place = thread % 4;
  UNROLL
  for (int batch = 0; batch < kMaskBatches; ++batch) {
    const TileIndex own = mask_place(thread, batch, own_place);
    const uint64_t row = first_row + own.m;
    uint32_t words[4];
    philox_4x32_7(static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32),
                  static_cast<uint32_t>(first_column / 8 + own.n), 0, static_cast<uint32_t>(seed),
                  static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32), words);
    UNROLL
    for (int distance = 1; distance <= 2; distance *= 2) {
      swap_words(words, lane, distance);
      UNROLL
      for (int i = 0; i < 4; ++i) {
        if ((i & distance) != 0) words[i] = shuffle(words[i], lane ^ distance);
      }
      swap_words(words, lane, distance);
    }
    UNROLL
    for (int place = 0; place < 4; ++place) {
      UNROLL
      for (int element = 0; element < 2; ++element) {
        const uint32_t draw = element == 0 ? words[place] << 16 : words[place];  // in the upper half
        float& accumulator = accumulators[mask_accumulator(batch, place, element)];
        accumulator = draw >= threshold ? accumulator * dropout.keep_scale : 0.0f;
      }
    }
  }
}

}  // namespace lilora::hopper
