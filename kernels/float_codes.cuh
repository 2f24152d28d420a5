// Codes of weights: code(v, weight), v being the weight in units of its scale.
#pragma once
#include "floats.cuh"

// The midpoints between neighbours of NF4.
constexpr float NF4_MIDPOINTS[15] = {-0.8480964f,  -0.6106329f,   -0.45999527f, -0.33967942f, -0.2346074f,
                                     -0.13791174f, -0.045525018f, 0.03979015f,  0.12025525f,  0.20352125f,
                                     0.29201376f,  0.38931254f,   0.50166345f,  0.6427869f,   0.86147845f};

#if CODING == NF4
// Each midpoint lies in another of 31 bins of the values from -1 to 1. An entry says what a value of its bin is
// compared with, and the code up to that. Every lane has a copy of all entries, so that lookups meet in no bank.
struct Nf4 {
  static constexpr int BINS = 32;
  uint2 (*entries)[WARP];

  __device__ __forceinline__ static u32 bin_of(float v) {
    return __float_as_uint(__fadd_rn(__fmul_rn(v, 15.0f), ROUND + 16.0f)) & (BINS - 1);
  }
  __device__ __forceinline__ Nf4() {
    __shared__ uint2 shared[BINS][WARP];
    entries = shared;
    for (u32 i = threadIdx.x; i < BINS * WARP; i += BLOCK) {
      const u32 bin = i / WARP;
      uint2 entry = make_uint2(INF_BITS, 0);
#pragma unroll
      for (int k = 0; k < 15; ++k) {
        const u32 at = bin_of(NF4_MIDPOINTS[k]);
        if (at == bin) entry.x = __float_as_uint(NF4_MIDPOINTS[k]);
        entry.y += at < bin;
      }
      shared[bin][i % WARP] = entry;
    }
    __syncthreads();
  }
  static constexpr u32 EXCESS = 0;

  __device__ __forceinline__ u32 code(float v, float) const {
    const uint2 entry = entries[bin_of(v)][threadIdx.x % WARP];
    return v > __uint_as_float(entry.x) ? entry.y + 1 : entry.y;
  }
};
using Codes = Nf4;

#elif CODING == FP4
// By magnitude, a binary search among the midpoints, as bits. On one a negative value takes the larger magnitude, as if
// it were a bit above; what is nearest to zero has code 8 where it is positive.
struct Codes {
  static constexpr u32 EXCESS = 0;

  __device__ __forceinline__ u32 code(float v, float) const {
    constexpr u32 BY_RANK = 0x32547610u;  // the code of each magnitude, 4 bits each, from the smallest on
    const u32 raw = (__float_as_uint(v) & ~SIGN) + (__float_as_uint(v) >> 31);
    const bool a = raw > 0x3e955556u;
    const bool b = raw > (a ? 0x3f155556u : 0x3db00000u);
    const bool c = raw > (a ? (b ? 0x3f555556u : 0x3ed55556u) : (b ? 0x3e555556u : 0x3b2aaaabu));
    const u32 shift = (a ? 16u : 0u) + (b ? 8u : 0u) + (c ? 4u : 0u);
    const bool is_signed = shift == 0 ? v > 0.0f : v < 0.0f;
    return (BY_RANK >> shift & 7u) + (is_signed ? 8u : 0u);
  }
};

#elif CODING == E2M1_DOWN
struct Codes {
  using Type = Small<1, 127>;
  static constexpr u32 EXCESS = Type::EXCESS;

  __device__ __forceinline__ u32 code(float v, float) const {
    return Type::code(v, LARGEST, true) + (v < -0.25f ? 8u : 0u);
  }
};

#else
struct Codes {
#if CODING == E2M1
  using Type = Small<1, 127>;
#elif CODING == E4M3
  using Type = SmallE4M3;
#else
  using Type = Small<2, 113>;
#endif
  static constexpr u32 EXCESS = Type::EXCESS;

  // The sign is that of the weight, -0.0 included; of E2M1 that of v, where -0.0 is no negative value.
  __device__ __forceinline__ u32 code(float v, float weight) const {
    const u32 signed_bits = __float_as_uint(CODING == E2M1 ? __fadd_rn(v, 0.0f) : weight);
    return Type::code(v, LARGEST) + ((signed_bits >> (32 - BITS)) & (1u << (BITS - 1)));
  }
};
#endif

// The stream of a chunk of codes, each with EXCESS.
__device__ __forceinline__ u64 pack_codes(const u32 (&t)[CHUNK]) {
  constexpr int PER_WORD = 32 / BITS;
  u32 word[CHUNK / PER_WORD];
#pragma unroll
  for (int w = 0; w < CHUNK / PER_WORD; ++w) {
    u32 sum = t[w * PER_WORD + PER_WORD - 1], excess = Codes::EXCESS;
#pragma unroll
    for (int j = PER_WORD - 2; j >= 0; --j) {
      sum = (sum << BITS) + t[w * PER_WORD + j];
      excess = (excess << BITS) + Codes::EXCESS;
    }
    word[w] = sum - excess;
  }
  return CHUNK / PER_WORD == 1 ? word[0] : static_cast<u64>(word[CHUNK / PER_WORD - 1]) << 32 | word[0];
}
