// KERNELS, a file, included once for each instruction set in a namespace of its own, with these macros:
// TARGET    the attribute that compiles a function for it
// LANES     floats in a register
// HALVES    a function from LANES numbers in fp16 to fp32, where it has one
// ROWS, COLUMNS    rows of x and of a matrix whose products are summed in registers at once

namespace baseline {
#define TARGET
#define LANES 4
#define ROWS 4
#define COLUMNS 2
#include KERNELS
#undef TARGET
#undef LANES
#undef ROWS
#undef COLUMNS
#undef INLINE
}  // namespace baseline

#ifdef __x86_64__
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define HALVES(lanes) (Vector)_mm256_cvtph_ps((__m128i)lanes)
#define ROWS 4
#define COLUMNS 3
#include KERNELS
#undef TARGET
#undef LANES
#undef HALVES
#undef ROWS
#undef COLUMNS
#undef INLINE
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define LANES 16
#define HALVES(lanes) (Vector)_mm512_maskz_cvtph_ps(0xffff, (__m256i)lanes)
#define ROWS 4
#define COLUMNS 4
#include KERNELS
#undef TARGET
#undef LANES
#undef HALVES
#undef ROWS
#undef COLUMNS
#undef INLINE
}  // namespace avx512

// A call of a function of all three.
#define BY_INSTRUCTIONS(number, call) ((number) == 3 ? avx512::call : (number) == 2 ? avx2::call : baseline::call)
#else
#define BY_INSTRUCTIONS(number, call) ((void)(number), baseline::call)
#endif
