// An instance of its own file: CUTLASS compiles slowly.

#include "hopper/gemm.cuh"

template void lilora::hopper::input_gradient<cutlass::bfloat16_t>(const InputGradientParams&, Stream);
