// Dequantize: the value of a code times its scale in float32, then one rounding to OUT_T (docs/numerics_floats.md).
//
// CODING  NF4, FP4, E2M1, E4M3 or E5M2
// OUT_T   float, __half or __nv_bfloat16
#define SCALE FLOATS
#include "decoded.cuh"
#include "floats.cuh"

#if CODING == NF4
constexpr float OF_CODE[16] = {-1.0f,         -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                               -0.091050036f, 0.0f,        0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
                               0.44070983f,   0.562617f,   0.72295684f,  1.0f};
#elif CODING == FP4
constexpr float OF_CODE[16] = {
    0.0f, 0.0625f / 12.0f,  8.0f / 12.0f,  1.0f,  4.0f / 12.0f,  6.0f / 12.0f,  2.0f / 12.0f,  3.0f / 12.0f,
    0.0f, -0.0625f / 12.0f, -8.0f / 12.0f, -1.0f, -4.0f / 12.0f, -6.0f / 12.0f, -2.0f / 12.0f, -3.0f / 12.0f};
#elif CODING == E2M1
constexpr float OF_CODE[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                               -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
#endif

#if BITS == 4
// The value of each code; every lane has a copy of all, so that lookups meet in no bank.
struct Values {
  const float (*values)[WARP];

  __device__ __forceinline__ Values() {
    __shared__ float shared[16][WARP];
    values = shared;
    if (threadIdx.x < WARP) {
#pragma unroll
      for (int code = 0; code < 16; ++code) shared[code][threadIdx.x] = OF_CODE[code];
    }
    __syncthreads();
  }
  __device__ __forceinline__ float operator()(u32 code) const { return values[code][threadIdx.x % WARP]; }
};
#else
struct Values {
  __device__ __forceinline__ float operator()(u32 code) const {
    return CODING == E4M3 ? e4m3_value(code) : __half2float(__ushort_as_half(static_cast<u16>(code << 8)));
  }
};
#endif

extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    dequantize_floats(const u8* __restrict__ packed,      // [rows, ceil(length * BITS / 8)]
                      void* scales,                       // [bands, groups of a row]
                      const float* __restrict__ divisor,  // GLOBAL: the global scale
                      OUT_T* __restrict__ out,            // [rows, length], aligned to its element
                      const i64 rows,                     //
                      const i64 length,                   //
                      const i64 per_row,                  // chunks of a row
                      const int scale_type,               // FLOATS: SCALE_FLOAT32, SCALE_FLOAT16 or SCALE_BFLOAT16
                      const int scale_kind,               // FLOATS, POWERS, LOCAL or GLOBAL
                      const i64 group,                    // weights of a full group
                      const int shift,                    // its logarithm to base 2, or -1 where it is no power of two
                      const int band,                     // rows that share their scales
                      const i64 row_scales)               // scales of a row; 0 where all rows share one
{
  // One thread for each chunk. Its weights have one scale where 8 divides the group.
  const Values values;
  const i64 n_row_bytes = row_bytes(length, BITS), n_units = rows * per_row;
  const float global = scale_kind == GLOBAL ? *divisor : 1.0f;
  const i64 step = static_cast<i64>(gridDim.x) * BLOCK;
  for (i64 unit = static_cast<i64>(blockIdx.x) * BLOCK + threadIdx.x; unit < n_units; unit += step) {
    const Position at(unit, per_row, rows);
    const i64 start = at.index * CHUNK, before = (band == 1 ? at.row : at.row / band) * row_scales;
    const int m = static_cast<int>(min(length - start, static_cast<i64>(CHUNK)));
    const u8* const in = packed + at.row * n_row_bytes + at.index * BITS;
    OUT_T* const to = out + at.row * length + start;
    const u64 stream = load_packed(in, m, m == CHUNK && is_aligned(in, WORD_BYTES));
    if (shift < 3 && group < length) {
#pragma unroll 1
      for (int j = 0; j < m; ++j) {
        const float factor = factor_of(scales, before + (start + j) / group, scale_type, scale_kind, global);
        PairOf<OUT_T>::type pair;
        convert(__fmul_rn(values(static_cast<u32>(stream >> (BITS * j)) & LEVELS), factor), 0.0f, pair);
        to[j] = *reinterpret_cast<const OUT_T*>(&pair);
      }
      continue;
    }
    const float factor =
        factor_of(scales, before + (group < length ? start >> shift : 0), scale_type, scale_kind, global);
    float w[CHUNK];
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) w[j] = __fmul_rn(values(static_cast<u32>(stream >> (BITS * j)) & LEVELS), factor);
    Decoded<OUT_T> d;
#pragma unroll
    for (int j = 0; j < CHUNK; j += 2) convert(w[j], w[j + 1], d.pair[j / 2]);
    d.store(to, m, m == CHUNK && is_aligned(to, 16));
  }
}
