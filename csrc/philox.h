// The dropout stream of lilora_kernels/ops/README.md: Philox-4x32-7 (Salmon et al., SC 2011).
#pragma once

#include "platform.h"

namespace lilora {

HOST_DEVICE void philox_4x32_7(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1,
                               uint32_t (&words)[4]) {
  UNROLL
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Bit j: whether element (row, 8 * block + j) of the input is kept; threshold as in lilora_kernels/ops/philox.py.
HOST_DEVICE uint32_t keep_bits(int64_t seed, int64_t row, uint32_t block, uint32_t threshold) {
  uint32_t words[4];
  philox_4x32_7(static_cast<uint32_t>(row), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), block, 0,
                static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32), words);
  uint32_t bits = 0;
  UNROLL
  for (int j = 0; j < 8; ++j) {
    const uint32_t draw = j % 2 == 0 ? words[j / 2] & 0xFFFFu : words[j / 2] >> 16;
    bits |= static_cast<uint32_t>(draw >= threshold) << j;
  }
  return bits;
}

}  // namespace lilora
