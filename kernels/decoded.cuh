// Decoded weights: rounded in pairs, stored a chunk at a time.
#pragma once
#include "common.cuh"

// Two decoded weights, rounded together.
__device__ __forceinline__ void convert(float a, float b, float2& out) { out = make_float2(a, b); }
__device__ __forceinline__ void convert(float a, float b, __half2& out) { out = __floats2half2_rn(a, b); }
__device__ __forceinline__ void convert(float a, float b, __nv_bfloat162& out) { out = __floats2bfloat162_rn(a, b); }

template <typename T>
struct PairOf;
template <>
struct PairOf<float> {
  using type = float2;
};
template <>
struct PairOf<__half> {
  using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

// 8 decoded weights.
template <typename T>
struct alignas(16) Decoded {
  typename PairOf<T>::type pair[CHUNK / 2];

  __device__ __forceinline__ void store(T* p, int n, bool whole) const {
    if (whole) {
#pragma unroll
      for (unsigned i = 0; i < sizeof(pair) / 16; ++i)
        reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(pair)[i];
      return;
    }
#pragma unroll
    for (int j = 0; j < CHUNK; ++j)
      if (j < n) p[j] = reinterpret_cast<const T*>(pair)[j];
  }
};
