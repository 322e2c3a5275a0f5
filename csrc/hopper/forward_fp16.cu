// An instance of its own file: CUTLASS compiles slowly.

#include "hopper/gemm.cuh"

template void lilora::hopper::forward<cutlass::half_t>(const ForwardParams&, Stream);
