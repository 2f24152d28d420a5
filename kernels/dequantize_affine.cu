// Dequantize: w = code * scale + bias in float32, two roundings, then one to OUT_T (docs/numerics_affine.md).
//
// BITS   2, 3, 4, 5, 6 or 8
// OUT_T  float, __half or __nv_bfloat16
#define SYMMETRIC 0
#include "codes.cuh"
#include "decoded.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    dequantize_affine(const u8* __restrict__ packed,  // [rows, ceil(length * BITS / 8)]
                      void* scales,                   // [rows, groups of a row], of scale_type
                      void* biases,                   // the same
                      OUT_T* __restrict__ out,        // [rows, length], aligned to its element
                      const i64 rows,                 //
                      const i64 length,               //
                      const i64 per_row,              // groups of a row
                      const int scale_type,           // SCALE_FLOAT32, SCALE_FLOAT16 or SCALE_BFLOAT16
                      const int group)                // 32, 64 or 128
{
  // One thread for each chunk.
  const i64 n_row_bytes = row_bytes(length, BITS), chunks = (length + CHUNK - 1) / CHUNK;
  const i64 n_units = rows * chunks, step = static_cast<i64>(gridDim.x) * BLOCK;
  for (i64 unit = static_cast<i64>(blockIdx.x) * BLOCK + threadIdx.x; unit < n_units; unit += step) {
    const Position at(unit, chunks, rows);
    const i64 start = at.index * CHUNK, number = at.row * per_row + start / group;
    const int m = static_cast<int>(min(length - start, static_cast<i64>(CHUNK)));
    const u8* const in = packed + at.row * n_row_bytes + at.index * BITS;
    OUT_T* const to = out + at.row * length + start;
    const u64 stream = load_packed(in, m, m == CHUNK && is_aligned(in, WORD_BYTES));
    const float scale = Stored{scales, nullptr, number, scale_type}.scale();
    const float bias = Stored{biases, nullptr, number, scale_type}.scale();
    float w[CHUNK];
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) {
      const u32 code = static_cast<u32>(stream >> (BITS * j)) & LEVELS;
      w[j] = __fadd_rn(__fmul_rn(__fsub_rn(__uint_as_float(code | 0x4b000000u), 8388608.0f), scale), bias);
    }
    Decoded<OUT_T> d;
#pragma unroll
    for (int j = 0; j < CHUNK; j += 2) convert(w[j], w[j + 1], d.pair[j / 2]);
    d.store(to, m, m == CHUNK && is_aligned(to, 16));
  }
}
