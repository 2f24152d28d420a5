// Dequantize ggml's blocks in float32, then one rounding to OUT_T (docs/numerics_ggml.md).
//
// GRID   q8_0, q4_0, q5_0, q4_1, q5_1, iq4_nl, ggml_mxfp4 or ggml_nvfp4
// OUT_T  float, __half or __nv_bfloat16
#include "decoded.cuh"
#include "ggml.cuh"

// A thread decodes two runs of 4 weights, GAP apart, so that neighbours read and write neighbouring bytes: in nibbles
// one run is the low halves of 4 bytes, the other their high halves.
constexpr int RUN = 4;

// 4 bytes at p, which is aligned to WIDTH bytes.
template <unsigned WIDTH>
__device__ __forceinline__ u32 word_at(const u8* p) {
  if constexpr (WIDTH == 4) {
    return *reinterpret_cast<const u32*>(p);
  } else if constexpr (WIDTH == 2) {
    const u16* const q = reinterpret_cast<const u16*>(p);
    return q[0] | static_cast<u32>(q[1]) << 16;
  } else {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) word |= static_cast<u32>(p[i]) << (8 * i);
    return word;
  }
}

// Each grid: BYTES and SIZE of a block, the GAP, and `decode` of the runs that begin at `at` and `at` + GAP.

// `word` has the codes of both runs; bit 4 of code j of a run is bit j of `low` or `high`.
template <typename Value>
__device__ __forceinline__ void each_nibble(u32 word, u32 low, u32 high, float (&w)[2 * RUN], Value value) {
#pragma unroll
  for (int j = 0; j < RUN; ++j) {
    w[j] = value((word >> (8 * j) & 15) | (low >> j & 1) << 4);
    w[RUN + j] = value((word >> (8 * j + 4) & 15) | (high >> j & 1) << 4);
  }
}

struct q8_0 {
  static constexpr int BYTES = 34, SIZE = 32, GAP = 16;

  __device__ __forceinline__ static void decode(const u8* block, int at, float (&w)[2 * RUN]) {
    const float scale = half_at(block);
    const u32 words[2] = {word_at<2>(block + 2 + at), word_at<2>(block + 2 + GAP + at)};
#pragma unroll
    for (int j = 0; j < 2 * RUN; ++j) {
      const u32 byte = words[j / RUN] >> (8 * (j % RUN)) & 0xff;
      w[j] = __fmul_rn(__int2float_rn(static_cast<int>(byte ^ 0x80u) - 128), scale);
    }
  }
};

template <int BITS, bool RANGED>
struct Whole {
  static constexpr int CODES = 2 + (RANGED ? 2 : 0) + (BITS == 5 ? 4 : 0), BYTES = CODES + 16, SIZE = 32, GAP = 16;
  static constexpr unsigned WIDTH = RANGED ? 4 : 2;

  __device__ __forceinline__ static void decode(const u8* block, int at, float (&w)[2 * RUN]) {
    const float scale = half_at(block), lowest = RANGED ? half_at(block + 2) : 0.0f;
    const u32 fifth = BITS == 5 ? word_at<WIDTH>(block + CODES - 4) >> at : 0;
    each_nibble(word_at<WIDTH>(block + CODES + at), fifth, fifth >> GAP, w, [&](u32 code) {
      const int q = static_cast<int>(code) - (RANGED ? 0 : 1 << (BITS - 1));
      const float product = __fmul_rn(__int2float_rn(q), scale);
      return RANGED ? __fadd_rn(product, lowest) : product;
    });
  }
};
struct q4_0 : Whole<4, false> {};
struct q5_0 : Whole<5, false> {};
struct q4_1 : Whole<4, true> {};
struct q5_1 : Whole<5, true> {};

struct iq4_nl {
  static constexpr int BYTES = 18, SIZE = 32, GAP = 16;

  __device__ __forceinline__ static void decode(const u8* block, int at, float (&w)[2 * RUN]) {
    const float scale = half_at(block);
    each_nibble(word_at<2>(block + 2 + at), 0, 0, w, [&](u32 code) { return __fmul_rn(nl_value(code), scale); });
  }
};

struct ggml_mxfp4 {
  static constexpr int BYTES = 17, SIZE = 32, GAP = 16;

  __device__ __forceinline__ static void decode(const u8* block, int at, float (&w)[2 * RUN]) {
    const float scale = half_e8m0(block[0]);
    each_nibble(word_at<1>(block + 1 + at), 0, 0, w, [&](u32 code) { return __fmul_rn(e2m1_value(code), scale); });
  }
};

struct ggml_nvfp4 {
  static constexpr int BYTES = 36, SIZE = 64, GAP = 8;

  __device__ __forceinline__ static void decode(const u8* block, int at, float (&w)[2 * RUN]) {
    const float scale = half_ue4m3(block[at / 16]);
    const u32 word = word_at<4>(block + 4 + at / 16 * 8 + at % 16);
    each_nibble(word, 0, 0, w, [&](u32 code) { return __fmul_rn(e2m1_value(code), scale); });
  }
};

struct alignas(RUN * sizeof(OUT_T)) Run {
  PairOf<OUT_T>::type pair[RUN / 2];
};

__device__ __forceinline__ void store(const float* w, OUT_T* p, bool aligned) {
  Run run;
  convert(w[0], w[1], run.pair[0]);
  convert(w[2], w[3], run.pair[1]);
  if (aligned) {
    *reinterpret_cast<Run*>(p) = run;
    return;
  }
#pragma unroll
  for (int j = 0; j < RUN; ++j) p[j] = reinterpret_cast<const OUT_T*>(&run)[j];
}

extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    dequantize_ggml(const u8* __restrict__ packed,  // blocks, at an even address (GGUF aligns to 32 bytes)
                    OUT_T* __restrict__ out,        // [n_units * 8], aligned to its element
                    const i64 n_units)              // 8 weights each
{
  constexpr int TEAM = GRID::SIZE / (2 * RUN);
  const bool aligned = is_aligned(out, sizeof(Run));
  const i64 step = static_cast<i64>(gridDim.x) * BLOCK;
  for (i64 unit = static_cast<i64>(blockIdx.x) * BLOCK + threadIdx.x; unit < n_units; unit += step) {
    const i64 block = unit / TEAM;
    const int runs = static_cast<int>(unit % TEAM) * RUN;
    const int at = runs / GRID::GAP * 2 * GRID::GAP + runs % GRID::GAP;  // of the block's weights, two runs of GAP
    float w[2 * RUN];
    GRID::decode(packed + block * GRID::BYTES, at, w);
    OUT_T* const to = out + block * GRID::SIZE + at;
    store(w, to, aligned);
    store(w + RUN, to + GRID::GAP, aligned);
  }
}
