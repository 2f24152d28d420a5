// ggml's K-quants: what a block of 256 weights is made of, and its bytes (docs/numerics_kquants.md).
//
// BITS  2, 3, 4, 5 or 6
#pragma once
#include "common.cuh"

constexpr int WEIGHTS = 256;                            // of a block
constexpr int PARTS = BITS == 4 || BITS == 5 ? 8 : 16;  // sub-blocks of a block
constexpr int PART = WEIGHTS / PARTS;                   // weights of a sub-block
constexpr bool HAS_MINIMA = BITS != 3 && BITS != 6;
constexpr int BLOCK_BYTES = BITS == 2 ? 84 : BITS == 3 ? 110 : BITS == 4 ? 144 : BITS == 5 ? 176 : 210;

// Where things begin in a block, in bytes. A block of Q3_K and of Q6_K lies at even addresses, no better.
constexpr int D_AT = BITS == 2 ? 80 : BITS == 3 ? 108 : BITS == 6 ? 208 : 0;  // float16 d, and dmin behind it
constexpr int SCALES_AT = BITS == 2 ? 0 : BITS == 3 ? 96 : BITS == 6 ? 192 : 4;
constexpr int LOW_AT = BITS == 2 ? 16 : BITS == 3 ? 32 : BITS == 4 ? 16 : BITS == 5 ? 48 : 0;  // 2 or 4 bits of codes
constexpr int HIGH_AT = BITS == 5 ? 16 : BITS == 6 ? 128 : 0;                                  // the bits above

// A word at an address that may be aligned to nothing.
__device__ __forceinline__ void store_word(u8* p, u32 word) {
  if (is_aligned(p, 4)) {
    *reinterpret_cast<u32*>(p) = word;
  } else if (is_aligned(p, 2)) {
    reinterpret_cast<u16*>(p)[0] = static_cast<u16>(word);
    reinterpret_cast<u16*>(p)[1] = static_cast<u16>(word >> 16);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = static_cast<u8>(word >> (8 * i));
  }
}
__device__ __forceinline__ u32 load_word(const u8* p) {
  if (is_aligned(p, 4)) return *reinterpret_cast<const u32*>(p);
  if (is_aligned(p, 2))
    return reinterpret_cast<const u16*>(p)[0] | static_cast<u32>(reinterpret_cast<const u16*>(p)[1]) << 16;
  u32 word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) word |= static_cast<u32>(p[i]) << (8 * i);
  return word;
}
__device__ __forceinline__ u32 load_half(const u8* p) { return p[0] | static_cast<u32>(p[1]) << 8; }
