// Dequantize: w = (code - OFFSET - zero) * scale in float32, then one rounding to OUT_T (docs/numerics.md, section 8).
//
// BITS       2, 3, 4, 5, 6 or 8
// SYMMETRIC  1 or 0
// OUT_T      float, __half or __nv_bfloat16
#include "codes.cuh"
#include "decoded.cuh"

// Code j of a stream, decoded. The code is read as the float 2^23 + code; the difference is a small integer, exact.
__device__ __forceinline__ float decode(u64 stream, int j, float zero, float scale) {
  const u32 code = static_cast<u32>(stream >> (BITS * j)) & LEVELS;
  return __fmul_rn(__fsub_rn(__uint_as_float(code | 0x4b000000u), 8388608.0f + OFFSET + zero), scale);
}

// Decode the chunks lane, lane + lanes, ... of a run of several groups, whose borders lie within chunks.
__device__ void decode_run(const u8* in, i64 n, OUT_T* out, Stored stored, int group, int lane, int lanes) {
  const i64 first = stored.index;
#pragma unroll 1
  for (i64 i = lane * CHUNK; i < n; i += lanes * CHUNK) {
    const int m = static_cast<int>(min(n - i, static_cast<i64>(CHUNK)));
    const u64 stream = load_packed(in + i / CHUNK * BITS, m, false);
#pragma unroll 1
    for (int j = 0; j < m; ++j) {
      stored.index = first + static_cast<int>(i + j) / group;
      PairOf<OUT_T>::type pair;
      convert(decode(stream, j, stored.zero(), stored.scale()), 0.0f, pair);
      out[i + j] = *reinterpret_cast<const OUT_T*>(&pair);
    }
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    dequantize(const u8* __restrict__ packed,  // [rows, ceil(length * BITS / 8)]
               void* scales,                   // [rows, groups of a row], of scale_type
               u8* zeros,                      // the same shape; null if symmetric
               OUT_T* __restrict__ out,        // [rows, length], aligned to its element
               const i64 rows,                 //
               const i64 length,               //
               const i64 per_row,              // runs of a row
               const int scale_type,           // SCALE_FLOAT32, SCALE_FLOAT16 or SCALE_BFLOAT16
               const i64 group,                // weights of a full group
               const int run_groups,           // groups of a full run
               const i64 across,               // scales from one row to the next,
               const i64 along,                // and from one group to the next: 1, or 0 where groups share a scale
               const int lanes)                // threads of a team, a power of two up to 32
{
  // One team for each run of groups.
  const i64 n_row_bytes = row_bytes(length, BITS), n_runs = rows * per_row;
  const i64 step = static_cast<i64>(gridDim.x) * (BLOCK / lanes);
  const int lane = threadIdx.x & (lanes - 1);
  i64 unit = static_cast<i64>(blockIdx.x) * (BLOCK / lanes) + threadIdx.x / lanes;
  for (; unit < n_runs; unit += step) {
    const Position at(unit, per_row, rows);
    const i64 start = at.index * run_groups * group, n = min(length - start, run_groups * group);
    const u8* const in = packed + at.row * n_row_bytes + start / 8 * BITS;
    OUT_T* const to = out + at.row * length + start;
    const bool aligned_in = is_aligned(in, WORD_BYTES), aligned_out = is_aligned(to, 16);
    const Stored stored{scales, zeros, at.row * across + at.index * run_groups * along, scale_type};
    if (run_groups > 1) {
      decode_run(in, n, to, stored, static_cast<int>(group), lane, lanes);
      continue;
    }
    const float scale = stored.scale(), zero = stored.zero();
    for (i64 i = lane * CHUNK; i < n; i += lanes * CHUNK) {
      const int m = static_cast<int>(min(n - i, static_cast<i64>(CHUNK)));
      const u64 stream = load_packed(in + i / CHUNK * BITS, m, aligned_in && m == CHUNK);
      Decoded<OUT_T> d;
#pragma unroll
      for (int j = 0; j < CHUNK; j += 2)
        convert(decode(stream, j, zero, scale), decode(stream, j + 1, zero, scale), d.pair[j / 2]);
      d.store(to + i, m, aligned_out && m == CHUNK);
    }
  }
}
