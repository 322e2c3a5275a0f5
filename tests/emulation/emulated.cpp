// What the tests call besides the operations: the settings of the emulated device, and index arithmetic on its own.
#include <cstdint>

#include "philox.h"
#include "work.h"

using namespace lilora;

extern "C" {

// processors: blocks that are resident at once; shared: the largest shared memory of a block; order: 0, or a seed for the
// order in which threads take their turns; copies: when asynchronous copies are done, one of emulation::Copies.
void emulation_set(int processors, int shared, unsigned order, int copies) {
  emulation::processors = processors;
  emulation::largest_shared = shared;
  emulation::order = order;
  emulation::copies = static_cast<emulation::Copies>(copies);
}
void emulation_lacks_code(const char* reason) { emulation::missing_code = reason; }
void emulation_launches_nothing() { emulation::launches_nothing = true; }
void emulation_watch(const void* memory, int64_t bytes) {
  emulation::watched = static_cast<const uint8_t*>(memory);
  emulation::watched_size = bytes;
  emulation::watched_bytes = 0;
}
int64_t emulation_watched_bytes() { return emulation::watched_bytes; }
int emulation_launches() { return emulation::launches; }
int64_t emulation_blocks() { return emulation::launched_blocks; }
int64_t emulation_copied() { return emulation::copied; }
int64_t emulation_stored() { return emulation::stored; }

void index_tile_range(int index, int size, int64_t total, int64_t* out) {
  const Range range = tile_range(index, size, total);
  out[0] = range.first;
  out[1] = range.count;
}
void index_share_range(int index, int shares, int step, int total, int64_t* out) {
  const Range range = share_range(index, shares, step, total);
  out[0] = range.first;
  out[1] = range.count;
}
void index_coordinates(int item, int second, int third, int64_t* out) {
  const Coordinates at = coordinates(item, second, third);
  out[0] = at.first;
  out[1] = at.second;
  out[2] = at.third;
}
int index_shares_for(int64_t tiles, int blocks, int steps, int least, int most) {
  return shares_for(tiles, blocks, steps, least, most);
}
unsigned philox_keep_bits(int64_t seed, int64_t row, unsigned block, unsigned threshold) {
  return keep_bits(seed, row, block, threshold);
}

}  // extern "C"
