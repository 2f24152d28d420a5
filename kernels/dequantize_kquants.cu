// Dequantize ggml's K-quants: step * code - minimum, three roundings, then one to OUT_T (docs/numerics_kquants.md).
//
// BITS   2, 3, 4, 5 or 6
// OUT_T  float, __half or __nv_bfloat16
#include "decoded.cuh"
#include "kquants.cuh"

constexpr int RUN = 16;  // weights of a thread

__device__ __forceinline__ float half_at(const u8* p) {
  return __half2float(__ushort_as_half(static_cast<u16>(load_half(p))));
}

// Scale and minimum of a sub-block, as whole numbers.
__device__ __forceinline__ void scale_of(const u8* s, int part, float& scale, float& minimum) {
  int a, b = 0;
  if (BITS == 2) {
    a = s[part] & 15, b = s[part] >> 4;
  } else if (BITS == 3) {
    a = (s[part % 8] >> (part / 8 * 4) & 15) + (s[8 + part % 4] >> (part / 4 * 2) & 3) * 16 - 32;
  } else if (BITS == 6) {
    a = static_cast<signed char>(s[part]);
  } else {
    const int j = part % 4;
    a = part < 4 ? s[j] & 63 : (s[8 + j] & 15) + (s[j] >> 6) * 16;
    b = part < 4 ? s[4 + j] & 63 : (s[8 + j] >> 4) + (s[4 + j] >> 6) * 16;
  }
  scale = __int2float_rn(a), minimum = __int2float_rn(b);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    dequantize_kquants(const u8* __restrict__ packed,  // [blocks, BLOCK_BYTES]
                       OUT_T* __restrict__ out,        // [blocks, 256], aligned to its element
                       const i64 runs)                 // 16 of a block
{
  // A thread for each run of weights, which all are of one sub-block.
  const i64 step = static_cast<i64>(gridDim.x) * BLOCK;
  for (i64 unit = static_cast<i64>(blockIdx.x) * BLOCK + threadIdx.x; unit < runs; unit += step) {
    const u8* const block = packed + unit / (WEIGHTS / RUN) * BLOCK_BYTES;
    const int e = static_cast<int>(unit % (WEIGHTS / RUN)) * RUN, l = e % 32;
    float scale, minimum;
    scale_of(block + SCALES_AT, e / PART, scale, minimum);
    scale = __fmul_rn(half_at(block + D_AT), scale);
    if (HAS_MINIMA) minimum = __fmul_rn(half_at(block + D_AT + 2), minimum);
    const u8* const low = block + LOW_AT;
    float w[RUN];
#pragma unroll
    for (int i = 0; i < RUN; i += 4) {
      u32 codes;
      if (BITS == 2 || BITS == 3) {
        codes = load_word(low + e / 128 * 32 + l + i) >> (e % 128 / 32 * 2) & 0x03030303u;
        if (BITS == 3) codes |= (load_word(block + HIGH_AT + l + i) >> (e / 32) & 0x01010101u) << 2;
      } else if (BITS == 6) {
        codes = load_word(low + e / 128 * 64 + e % 64 + i) >> (e % 128 / 64 * 4) & 0x0f0f0f0fu;
        codes |= (load_word(block + HIGH_AT + e / 128 * 32 + l + i) >> (e % 128 / 32 * 2) & 0x03030303u) << 4;
      } else {
        codes = load_word(low + e / 64 * 32 + l + i) >> (e % 64 / 32 * 4) & 0x0f0f0f0fu;
        if (BITS == 5) codes |= (load_word(block + HIGH_AT + l + i) >> (e / 32) & 0x01010101u) << 4;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // The code is read as the float 2^23 + code; the difference is a small integer, exact.
        constexpr float OFFSET = HAS_MINIMA ? 0 : 1 << (BITS - 1);
        const float q = __fsub_rn(__uint_as_float((codes >> (8 * j) & 0xffu) | 0x4b000000u), 8388608.0f + OFFSET);
        w[i + j] = __fmul_rn(scale, q);
        if (HAS_MINIMA) w[i + j] = __fsub_rn(w[i + j], minimum);
      }
    }
    OUT_T* const to = out + unit * RUN;
#pragma unroll
    for (int i = 0; i < RUN; i += CHUNK) {
      Decoded<OUT_T> d;
#pragma unroll
      for (int j = 0; j < CHUNK; j += 2) convert(w[i + j], w[i + j + 1], d.pair[j / 2]);
      d.store(to + i, CHUNK, is_aligned(to, 16));
    }
  }
}
