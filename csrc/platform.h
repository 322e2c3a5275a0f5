// What the kernels need of the device, in one place: element types, asynchronous copies, tensor-core products, launches.
//
// A compiler other than nvcc gets the same names from tests/emulation/emulation.h, which runs the threads of a grid on a CPU,
// so that the tests execute the very kernels that a GPU would.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#define HOST_DEVICE __host__ __device__ __forceinline__
#define DEVICE __device__ __forceinline__
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define PART DEVICE  // in a function of its own ptxas has each wgmma wait for the one before
#else
#define PART __device__ __noinline__  // a part of a kernel with registers of its own
#endif
#define KERNEL_PARAMETER __grid_constant__
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)  // so many blocks of a processor at once
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
#else
#include "emulation.h"
#endif

namespace lilora {

// The bits of a 16-bit number.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Sixteen bytes: what one thread moves at once.
struct alignas(16) Chunk {
  uint32_t words[4];
};

constexpr int kPerChunk = 8;  // elements

// Whether the code is for 9.0a, the only one with products by a warpgroup (wgmma).
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LILORA_EMULATE_WGMMA)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

#ifdef __CUDACC__

using Stream = cudaStream_t;

DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
DEVICE float to_float(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }

template <typename T>
DEVICE T rounded(float x);
template <>
DEVICE float rounded<float>(float x) {
  return x;
}
template <>
DEVICE Half rounded<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
DEVICE BFloat16 rounded<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t bytes[];
  return bytes;
}

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies `bytes` (0..16) to shared memory and fills the rest of the sixteen with zeros. Bypasses the L1 cache.
DEVICE void copy_async(Chunk* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` (0..2) of the groups committed last are under way.
DEVICE void wait_copies(int pending) {
  if (pending == 0) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else if (pending == 1) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  }
}

// Sixteen bytes by way of the L2 cache alone: before it has waited for the kernel before, a kernel may not rely on L1.
DEVICE Chunk load_words(const void* from) {
  Chunk c;
  asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(c.words[0]), "=r"(c.words[1]), "=r"(c.words[2]), "=r"(c.words[3])
               : "l"(from));
  return c;
}

// Stores to global memory at once.
DEVICE void store_words(void* to, const uint32_t (&words)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1]) : "memory");
}
DEVICE void store_words(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Each thread calls this when its writes to shared memory are complete; wgmma may read them behind the next barrier.
DEVICE void publish_shared() {
  if constexpr (kHasWgmma) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane i names row i mod 8 of matrix i / 8.
template <bool kTransposed>
DEVICE void load_matrices(uint32_t (&r)[4], const Chunk* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// c [16, 8] += a [16, 16] b [16, 8] by one warp, in the layout of mma.m16n8k16.
template <typename T>
DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
DEVICE void multiply<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DEVICE void multiply<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The compiler moves no use of c across this.
template <int kTilesN>
DEVICE void hold_registers(float (&c)[kTilesN][4]) {
  UNROLL
  for (int j = 0; j < kTilesN; ++j) {
    UNROLL
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[j][e])::"memory");
  }
}

// Products c [64, 8 * kTilesN] of a warpgroup: c[j] of warp w are rows 16 w on and columns 8 j on, in the layout of
// mma.m16n8k16. From begin_products to end_products nothing but multiply_warpgroup may touch c.
template <int kTilesN>
DEVICE void begin_products(float (&c)[kTilesN][4]) {
  hold_registers(c);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
template <int kTilesN>
DEVICE void end_products(float (&c)[kTilesN][4]) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  hold_registers(c);
}

// c += a [64, 16] b [16, 8 * kTilesN], given as descriptors (Tile::descriptor) of matrices in shared memory that are
// stored [64, 16] and [8 * kTilesN, 16], or transposed. The operands 1, 1, 1: add to c, negate neither factor.
#define TEN(i) "%" #i "0, %" #i "1, %" #i "2, %" #i "3, %" #i "4, %" #i "5, %" #i "6, %" #i "7, %" #i "8, %" #i "9, "
#define SIXTY TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5)
#define TILE(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define TILES(j) TILE(j), TILE(j + 1), TILE(j + 2), TILE(j + 3), TILE(j + 4), TILE(j + 5), TILE(j + 6), TILE(j + 7)
#define WGMMA(n, type, operands, ...)                                                           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " " operands ";" \
               : __VA_ARGS__                                                                    \
               : "l"(a), "l"(b), "n"(kATransposed), "n"(kBTransposed)                           \
               : "memory")
#define WGMMA_128(type) \
  WGMMA(128, type, "{" SIXTY "%60, %61, %62, %63}, %64, %65, 1, 1, 1, %66, %67", TILES(0), TILES(8))
#define WGMMA_192(type)                                                                                         \
  WGMMA(192, type, "{" SIXTY TEN(6) TEN(7) TEN(8) "%90, %91, %92, %93, %94, %95}, %96, %97, 1, 1, 1, %98, %99", \
        TILES(0), TILES(8), TILES(16))
template <typename T, bool kATransposed, bool kBTransposed, int kTilesN>
DEVICE void multiply_warpgroup(float (&c)[kTilesN][4], uint64_t a, uint64_t b) {
  static_assert(kTilesN == 16 || kTilesN == 24);
  constexpr bool kHalf = std::is_same_v<T, Half>;
  if constexpr (kTilesN == 16) {
    if constexpr (kHalf) {
      WGMMA_128("f16");
    } else {
      WGMMA_128("bf16");
    }
  } else if constexpr (kHalf) {
    WGMMA_192("f16");
  } else {
    WGMMA_192("bf16");
  }
}
#undef TEN
#undef SIXTY
#undef TILE
#undef TILES
#undef WGMMA
#undef WGMMA_128
#undef WGMMA_192

// The sum over the four lanes that hold one row of a product; every one of them gets it.
DEVICE float sum_of_four(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <typename T>  // no conversion: 32-bit words, or floats
DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }

// All blocks of the launch arrive before any goes on. state [2]: arrivals and generation, zeros at first.
//
// The last one to arrive clears the arrivals before it opens the next generation, so the state serves launches of any
// number of blocks one after another.
DEVICE void meet(int* state) {
  __syncthreads();
  if (threadIdx.x == 0) {
    int generation, now;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(generation) : "l"(state + 1) : "memory");
    __threadfence();
    if (atomicAdd(state, 1) == static_cast<int>(gridDim.x) - 1) {
      atomicExch(state, 0);
      __threadfence();
      atomicAdd(state + 1, 1);
    } else {
      do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(state + 1) : "memory");
      } while (now == generation);
    }
    __threadfence();
  }
  __syncthreads();
}

// Programmatic dependent launch (sm_90 and later; nothing before): wait for what the kernel before us wrote, and let
// the one after us start.
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // so that a later call is not blamed for it
    throw std::runtime_error(std::string("lilora_cuda: ") + what + " failed: " + cudaGetErrorString(error));
  }
}

inline int current_device() {
  int device;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// What `ask()` says for `key`, asked once for each: the runtime takes longer than a look into a table.
template <typename Key, typename Ask>
int asked_once(std::map<Key, int>& known, const Key& key, Ask ask) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  return found != known.end() ? found->second : known[key] = ask();
}

inline int device_attribute(cudaDeviceAttr attribute) {
  static std::map<std::pair<int, int>, int> known;
  const int device = current_device();
  return asked_once(known, std::make_pair(device, static_cast<int>(attribute)), [&] {
    int value;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
  });
}
inline int processors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int largest_shared_memory() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Why the current device cannot run the binary's code of `kernel`; empty if it can. An old driver is one reason of many.
template <typename Params>
std::string missing_code(void (*kernel)(Params)) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // so that a later call is not blamed for it
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    return "its build has no code for it; add it to TORCH_CUDA_ARCH_LIST";
  }
  return cudaGetErrorString(error);
}

// Whether the code of `kernel` that runs here knows programmatic dependent launch: PTX of an older architecture does not,
// whatever the device.
template <typename Params>
bool waits_for_previous_kernel(void (*kernel)(Params)) {
  static std::map<std::pair<const void*, int>, int> known;
  const void* const function = reinterpret_cast<const void*>(kernel);
  const int version = asked_once(known, std::make_pair(function, current_device()), [&] {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, function), "cudaFuncGetAttributes");
    return attributes.ptxVersion;
  });
  return version >= 90 && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
}

// How many blocks of `kernel` the device holds at once.
template <typename Params>
int resident_blocks(void (*kernel)(Params), int threads, int shared) {
  static std::map<std::tuple<const void*, int, int>, int> known;
  const void* const function = reinterpret_cast<const void*>(kernel);
  return asked_once(known, std::make_tuple(function, shared, current_device()), [&] {
    // The attributes are the kernel's, not the launch's: the last value set holds for all.
    for (const auto& [attribute, value] : {std::pair(cudaFuncAttributeMaxDynamicSharedMemorySize, largest_shared_memory()),
                                           std::pair(cudaFuncAttributePreferredSharedMemoryCarveout, 100)}) {  // per cent
      check(cudaFuncSetAttribute(function, attribute, value), "cudaFuncSetAttribute");
    }
    int blocks;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared), "an occupancy query");
    return blocks * processors();
  });
}

enum class Together { kNo, kCooperative, kDependent };  // kDependent: may start while the kernel before it ends

// Launches `kernel`, which resident_blocks() has seen; false when a cooperative grid of so many blocks cannot be resident at once.
template <typename Params>
bool launch(void (*kernel)(Params), const Params& params, int blocks, int threads, int shared, Together together,
            Stream stream) {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  if (together == Together::kCooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  } else if (together == Together::kDependent && waits_for_previous_kernel(kernel)) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  if (error == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();
    return false;
  }
  check(error, "a kernel launch");
  return true;
}

#else

inline float to_float(Half x) { return emulation::half_to_float(x.bits); }
inline float to_float(BFloat16 x) { return emulation::bfloat16_to_float(x.bits); }
template <>
inline float rounded<float>(float x) {
  return x;
}
template <>
inline Half rounded<Half>(float x) {
  return {emulation::float_to_half(x)};
}
template <>
inline BFloat16 rounded<BFloat16>(float x) {
  return {emulation::float_to_bfloat16(x)};
}

#endif

}  // namespace lilora
