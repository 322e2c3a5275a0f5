// What the fused Hopper product needs of sizes and bases, as errors of one sentence.
#pragma once

#include <climits>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

namespace lilora::hopper {

inline void require_multiples_of_8(std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  for (const auto& [name, size] : sizes) {
    if (size > 0 && size % 8 == 0 && size <= INT_MAX) continue;
    throw std::runtime_error(std::string("lilora_cuda: ") + name + " is " + std::to_string(size) +
                             ", but the fused Hopper product needs a positive multiple of 8; use another plan");
  }
}

inline void require_aligned(std::initializer_list<std::pair<const char*, const void*>> bases) {
  for (const auto& [name, base] : bases) {
    const auto over = reinterpret_cast<uintptr_t>(base) % 16;
    if (over == 0) continue;
    throw std::runtime_error(std::string("lilora_cuda: ") + name + " starts " + std::to_string(over) +
                             " bytes after a multiple of 16, but the fused Hopper product needs one; clone the tensor");
  }
}

}  // namespace lilora::hopper
