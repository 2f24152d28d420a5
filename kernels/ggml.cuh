// What ggml's blocks are made of (docs/numerics_ggml.md): bytes and weights of a block, float16 scales, e2m1, the
// values of iq4_nl. e2m1 is doubled and its scale halved, so that all values are whole numbers.
#pragma once
#include "common.cuh"

constexpr u32 HALF_INF = 0x7c00u;

__device__ __forceinline__ float half_at(const u8* p) {
  return __half2float(__ushort_as_half(*reinterpret_cast<const u16*>(p)));
}

// Half of what an e8m0 byte stands for: 2^(e - 128).
__device__ __forceinline__ float half_e8m0(u32 e) { return __uint_as_float(e > 1 ? (e - 1) << 23 : 0x200000u << e); }

// Half of what a ue4m3 byte stands for. The highest bit does not count, and 0x7f is 0.
__device__ __forceinline__ float half_ue4m3(u32 u) {
  const u32 exponent = u >> 3 & 15, mantissa = u & 7;
  const float tiny = __fmul_rn(__uint2float_rn(mantissa), 9.765625e-4f);  // 2^-10
  const float value = exponent == 0 ? tiny : __uint_as_float((exponent + 119) << 23 | mantissa << 20);
  return u == 0x7f ? 0.0f : value;
}

// The value of an e2m1 code: its lowest 3 bits if up to 4, then 6, 8, 12.
__device__ __forceinline__ float e2m1_value(u32 code) {
  const u32 n = code & 7;
  const float value = __uint2float_rn((0xc8643210u >> (4 * n)) & 15);
  return code > 8 ? -value : value;
}

// The value of an iq4_nl code, from two tables of 8 signed bytes.
__device__ __forceinline__ float nl_value(u32 code) {
  const u32 selector = code & 7;
  const u32 low = __byte_perm(0xbfad9881u, 0xf6eaddcfu, selector),
            high = __byte_perm(0x26190d01u, 0x71594535u, selector);
  const u32 byte = (code & 8 ? high : low) & 0xff;
  return __int2float_rn(static_cast<int>(byte ^ 0x80u) - 128);
}

// N bytes as words, written as wide as P, which is aligned to WIDTH bytes, allows.
template <unsigned WIDTH>
__device__ __forceinline__ void put(u8* p, u32 word) {
  if constexpr (WIDTH == 4) {
    *reinterpret_cast<u32*>(p) = word;
  } else if constexpr (WIDTH == 2) {
    reinterpret_cast<u16*>(p)[0] = static_cast<u16>(word);
    reinterpret_cast<u16*>(p)[1] = static_cast<u16>(word >> 16);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = static_cast<u8>(word >> (8 * i));
  }
}
