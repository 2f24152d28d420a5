// What is stored: codes, scales and zero points. The 8 codes of a chunk are BITS bytes of the row's little-endian bit
// stream, drawn in docs/numerics.md.
//
// BITS       2, 3, 4, 5, 6 or 8
// SYMMETRIC  1: no zero points; 0: one for each scale
#pragma once
#include "common.cuh"

constexpr int OFFSET = 1 << (BITS - 1);  // stored code = signed code + OFFSET
constexpr int LEVELS = (1 << BITS) - 1;
constexpr float LOWEST = -OFFSET, HIGHEST = OFFSET - 1;  // signed codes

// Adding 1.5 * 2^23 rounds a float32 of magnitude up to 2^22 to an integer, ties to even, in its low bits.
constexpr float ROUND = 12582912.0f;
constexpr u32 ROUND_BITS = 0x4b400000u;

// Values of the argument `scale_type`.
constexpr int SCALE_FLOAT32 = 0, SCALE_FLOAT16 = 1, SCALE_BFLOAT16 = 2;

// A scale as it is stored: eps of the storage type for a group of zeros, its smallest positive value for a scale that
// underflows.
__device__ __forceinline__ float as_stored(float exact, bool is_zero, int scale_type) {
  float stored = exact, eps = 1.1920928955078125e-7f, tiny = 1.40129846432481707e-45f;  // 2^-23, 2^-149
  if (scale_type == SCALE_FLOAT16) {
    stored = __half2float(__float2half_rn(exact));
    eps = 9.765625e-4f, tiny = 5.9604644775390625e-8f;  // 2^-10, 2^-24
  } else if (scale_type == SCALE_BFLOAT16) {
    stored = __bfloat162float(__float2bfloat16_rn(exact));
    eps = 7.8125e-3f, tiny = 9.18354961579912115e-41f;  // 2^-7, 2^-133
  }
  if (is_zero) return eps;
  return stored == 0.0f ? tiny : stored;
}

// The scale and zero point number `index` in memory. `zeros` is null if symmetric; the signed zero point is then 0.
struct Stored {
  void* scales;
  u8* zeros;
  i64 index;
  int scale_type;

  __device__ __forceinline__ float scale() const {
    if (scale_type == SCALE_FLOAT32) return static_cast<const float*>(scales)[index];
    const u16 bits = static_cast<const u16*>(scales)[index];
    if (scale_type == SCALE_FLOAT16) return __half2float(__ushort_as_half(bits));
    return __bfloat162float(__ushort_as_bfloat16(bits));
  }
  __device__ __forceinline__ float zero() const {
    return SYMMETRIC ? 0.0f : __int2float_rn(static_cast<int>(zeros[index]) - OFFSET);
  }
  // `scale` is a value of the storage type already.
  __device__ __forceinline__ void write(float scale, float zero) const {
    if (scale_type == SCALE_FLOAT32)
      static_cast<float*>(scales)[index] = scale;
    else if (scale_type == SCALE_FLOAT16)
      static_cast<u16*>(scales)[index] = __half_as_ushort(__float2half_rn(scale));
    else
      static_cast<u16*>(scales)[index] = static_cast<u16>(__float_as_uint(scale) >> 16);
    if (!SYMMETRIC) zeros[index] = static_cast<u8>(__float2int_rn(zero) + OFFSET);
  }
};

// The widest word that the bytes of a chunk can be read or written in.
constexpr unsigned WORD_BYTES = BITS == 8 ? 8 : BITS == 4 ? 4 : BITS % 2 == 0 ? 2 : 1;

// The bit stream of N codes, given as words of ROUND_BITS + code: Horner's rule modulo 2^32, less what ROUND_BITS gave.
template <int N>
__device__ __forceinline__ u32 pack_words(const u32* t) {
  u32 sum = t[N - 1], rounding = ROUND_BITS;
#pragma unroll
  for (int j = N - 2; j >= 0; --j) {
    sum = (sum << BITS) + t[j];
    rounding = (rounding << BITS) + ROUND_BITS;
  }
  return sum - rounding;
}

__device__ __forceinline__ u64 pack(const u32 (&t)[CHUNK]) {
  if constexpr (CHUNK * BITS <= 32)
    return pack_words<CHUNK>(t);
  else
    return static_cast<u64>(pack_words<CHUNK / 2>(t + CHUNK / 2)) << (CHUNK / 2 * BITS) | pack_words<CHUNK / 2>(t);
}

// The stream of a chunk, of which the first n codes exist. With `whole`, n is 8 and p is aligned to WORD_BYTES.
__device__ __forceinline__ u64 load_packed(const u8* p, int n, bool whole) {
  u64 stream = 0;
  if (!whole) {
#pragma unroll 1
    for (int i = 0; i * 8 < n * BITS; ++i) stream |= static_cast<u64>(p[i]) << (8 * i);
  } else if constexpr (WORD_BYTES == 8) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    stream = static_cast<u64>(v.y) << 32 | v.x;
  } else if constexpr (WORD_BYTES == 4) {
    stream = *reinterpret_cast<const u32*>(p);
  } else if constexpr (WORD_BYTES == 2) {
#pragma unroll
    for (int i = 0; i < BITS / 2; ++i) stream |= static_cast<u64>(reinterpret_cast<const u16*>(p)[i]) << (16 * i);
  } else {
#pragma unroll
    for (int i = 0; i < BITS; ++i) stream |= static_cast<u64>(p[i]) << (8 * i);
  }
  return stream;
}

// The unused high bits of a row's last byte become 0.
__device__ __forceinline__ void store_packed(u8* p, u64 stream, int n, bool whole) {
  if (!whole) {
    if (n < CHUNK) stream &= (1ull << (n * BITS)) - 1;
#pragma unroll 1
    for (int i = 0; i * 8 < n * BITS; ++i) p[i] = static_cast<u8>(stream >> (8 * i));
  } else if constexpr (WORD_BYTES == 8) {
    *reinterpret_cast<uint2*>(p) = make_uint2(static_cast<u32>(stream), static_cast<u32>(stream >> 32));
  } else if constexpr (WORD_BYTES == 4) {
    *reinterpret_cast<u32*>(p) = static_cast<u32>(stream);
  } else if constexpr (WORD_BYTES == 2) {
#pragma unroll
    for (int i = 0; i < BITS / 2; ++i) reinterpret_cast<u16*>(p)[i] = static_cast<u16>(stream >> (16 * i));
  } else {
#pragma unroll
    for (int i = 0; i < BITS; ++i) p[i] = static_cast<u8>(stream >> (8 * i));
  }
}
