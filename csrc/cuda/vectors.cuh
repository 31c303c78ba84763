// Loads and stores of VEC consecutive channels as float, sums over a warp, and launches with a checked grid.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace gcng::cuda {

constexpr int WARP = 32;
constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// VEC is 1, or a multiple of what 16 bytes hold; from is then aligned to 16 bytes.
template <int VEC, class S>
__device__ __forceinline__ void load(const S* from, float (&to)[VEC]) {
  if constexpr (VEC == 1) {
    to[0] = widen(*from);
  } else {
    constexpr int PIECE = 16 / static_cast<int>(sizeof(S));
    static_assert(VEC % PIECE == 0);
#pragma unroll
    for (int piece = 0; piece < VEC; piece += PIECE) {
      alignas(16) S values[PIECE];
      *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(from + piece);
#pragma unroll
      for (int v = 0; v < PIECE; ++v) to[piece + v] = widen(values[v]);
    }
  }
}

template <int VEC>
__device__ __forceinline__ void store(float* to, const float (&values)[VEC]) {
  if constexpr (VEC == 1) {
    *to = values[0];
  } else {
#pragma unroll
    for (int v = 0; v < VEC; v += 4)
      *reinterpret_cast<float4*>(to + v) = make_float4(values[v], values[v + 1], values[v + 2], values[v + 3]);
  }
}

// The same sum, added in the same order, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int apart = WARP / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
  return x;
}

// Whether rows of width elements of S, stride apart, can be read 16 bytes at a time.
template <class S>
bool in_pieces(const S* data, int64_t width, int64_t stride = 0) {
  constexpr int64_t PIECE = 16 / static_cast<int64_t>(sizeof(S));
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && width % PIECE == 0 && stride % PIECE == 0;
}

inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// kernel on blocks x parts of THREADS threads; nothing where there is nothing to do.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int64_t parts, cudaStream_t stream, Arguments... arguments) {
  if (blocks == 0 || parts == 0) return cudaSuccess;
  if (blocks > 0x7fffffff || parts > 65535) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(parts));
  config.blockDim = dim3(THREADS);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace gcng::cuda
