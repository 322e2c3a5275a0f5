// Vectors of one instruction set, and reading numbers into them. Included inside its namespace, see instruction_sets.h.

#define INLINE TARGET static inline __attribute__((always_inline))

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halfwords __attribute__((vector_size(2 * LANES)));

INLINE Words words(const void* from) {
  Halfwords lanes;
  memcpy(&lanes, from, sizeof lanes);
  return __builtin_convertvector(lanes, Words);
}

INLINE Vector widened(const float* from) {
  Vector lanes;
  memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

INLINE Vector widened(const Bfloat16* from) { return (Vector)(words(from) << 16); }

INLINE Vector widened(const Half* from) {
#ifdef HALVES
  Halfwords lanes;
  memcpy(&lanes, from, sizeof lanes);
  return HALVES(lanes);
#else
  const Words bits = words(from), magnitude = (bits & 0x7fff) << 13;
  const Words special = (Words)(magnitude >= 0x0f800000) & 0x7f800000;  // inf and NaN
  return (Vector)((Words)((Vector)magnitude * 0x1p112f) | special | (bits & 0x8000) << 16);
#endif
}

// The last count < LANES elements, then zeros.
template <class T>
INLINE Vector widened(const T* from, int64_t count) {
  T lanes[LANES] = {};
  memcpy(lanes, from, count * sizeof(T));
  return widened(lanes);
}

template <class T>
INLINE void widen(float* to, const T* from, int64_t count) {
  for (int64_t k = 0; k < count; k += LANES) {
    const Vector lanes = count - k >= LANES ? widened(from + k) : widened(from + k, count - k);
    memcpy(to + k, &lanes, sizeof lanes);
  }
}

INLINE float total(const Vector& lanes) {
  Four parts[LANES / 4];
  memcpy(parts, &lanes, sizeof lanes);
  for (int half = LANES / 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}
