// Quantize with a scale and a bias: those of every group, then its codes, packed, in one pass over the weights.
//
//   code = clamp(rne((x - bias) / scale), 0, LEVELS)
//
// docs/numerics_affine.md defines it.
//
// BITS  2, 3, 4, 5, 6 or 8
// IN_T  float, __half or __nv_bfloat16
#define SYMMETRIC 0
#include "codes.cuh"
#include "weights.cuh"

constexpr int HELD = 4;  // chunks of a thread: a group of 32 weights has one thread, one of 128 has four
constexpr float LEAST = 1e-7f;

// Lowest and highest weight, as float bits. Where a weight is positive the highest is the largest of them as signed
// integers, else the smallest as unsigned ones; the lowest likewise. NaN is beyond infinity in `hi` and in `lo`.
struct Bounds {
  int hi = static_cast<int>(SIGN);  // below every other
  u32 lo = 0, least = ~0u;

  __device__ __forceinline__ void add(u32 bits) {
    hi = max(hi, static_cast<int>(bits));
    lo = max(lo, bits);
    least = min(least, bits);
  }
  __device__ __forceinline__ void join(int distance) {
    hi = max(hi, __shfl_xor_sync(0xffffffffu, hi, distance));
    lo = max(lo, __shfl_xor_sync(0xffffffffu, lo, distance));
    least = min(least, __shfl_xor_sync(0xffffffffu, least, distance));
  }
  __device__ __forceinline__ float lowest() const { return __uint_as_float(lo & SIGN ? lo : least); }
  __device__ __forceinline__ float highest() const { return __uint_as_float(hi < 0 ? least : static_cast<u32>(hi)); }
  __device__ __forceinline__ bool is_finite() const {
    return (lo & ~SIGN) < INF_BITS && hi < static_cast<int>(INF_BITS);
  }
};

struct Line {
  float scale, bias, reciprocal;
  bool overflows, plain;  // plain: quotient() is the IEEE quotient where a code could turn (docs/kernels.md)

  __device__ __forceinline__ Line(const Bounds& r) {
    constexpr float LOW = 5.42101086242752217e-20f, HIGH = 1.8446744073709551616e19f;  // 2^-64, 2^64
    const float lo = r.lowest(), hi = r.highest();
    float step = fmaxf(__fdiv_rn(__fsub_rn(hi, lo), LEVELS), LEAST);
    overflows = __float_as_uint(step) >= INF_BITS;
    const bool is_low = fabsf(lo) > fabsf(hi);
    const float edge = is_low ? lo : hi;
    step = is_low ? step : -step;
    const float code = rintf(__fdiv_rn(edge, step));
    const bool is_zero = code == 0.0f;
    scale = is_zero ? step : __fdiv_rn(edge, code);
    bias = is_zero ? 0.0f : edge;
    reciprocal = __frcp_rn(scale);
    const float size = fabsf(scale);
    plain = r.is_finite() & !overflows & (size >= LOW) & (size <= HIGH);
  }
  __device__ __forceinline__ u32 exact(float x) const {
    const float q = __fdiv_rn(__fsub_rn(x, bias), scale);
    return static_cast<u32>(__float2int_rn(fminf(fmaxf(q, 0.0f), LEVELS)));
  }
  __device__ __forceinline__ u32 rounded(float x) const {
    const float d = __fsub_rn(x, bias), p = __fmul_rn(d, reciprocal);
    const float q = __fmaf_rn(__fmaf_rn(-p, scale, d), reciprocal, p);
    return __float_as_uint(__fadd_rn(fminf(fmaxf(q, 0.0f), LEVELS), ROUND));
  }
};

// Store a float as `type`; returns whether it is finite there.
__device__ __forceinline__ bool store_as(void* p, i64 index, float value, int type) {
  if (type == SCALE_FLOAT32) {
    static_cast<float*>(p)[index] = value;
    return (__float_as_uint(value) & ~SIGN) < INF_BITS;
  }
  const u16 bits = type == SCALE_FLOAT16 ? __half_as_ushort(__float2half_rn(value))
                                         : __bfloat16_as_ushort(__float2bfloat16_rn(value));
  static_cast<u16*>(p)[index] = bits;
  return (bits & 0x7fff) < (type == SCALE_FLOAT16 ? 0x7c00 : 0x7f80);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 3)
    quantize_affine(const IN_T* __restrict__ x,  // [rows, length], aligned to its element
                    u8* __restrict__ packed,     // [rows, ceil(length * BITS / 8)]
                    void* scales,                // [rows, groups of a row], of scale_type
                    void* biases,                // the same
                    u64* counters,               // see Counter
                    const i64 rows,              //
                    const i64 length,            //
                    const i64 per_row,           // groups of a row
                    const int scale_type,        // SCALE_FLOAT32, SCALE_FLOAT16 or SCALE_BFLOAT16
                    const int group)             // 32, 64 or 128
{
  const i64 n_row_bytes = row_bytes(length, BITS), n_units = rows * per_row;
  const Team team(group / (HELD * CHUNK));
  const i64 step = static_cast<i64>(gridDim.x) * (BLOCK / team.lanes);
  i64 unit = static_cast<i64>(blockIdx.x) * (BLOCK / team.lanes) + threadIdx.x / team.lanes;
  const int ahead = threadIdx.x % WARP / team.lanes;
  for (; unit - ahead < n_units; unit += step) {  // a warp leaves the loop as one, since its teams reduce together
    const Position at(unit, per_row, rows);
    const i64 start = at.index * group, flat = at.row * length + start;
    const int n = unit < n_units ? static_cast<int>(min(length - start, static_cast<i64>(group))) : 0;
    const IN_T* const xg = x + flat;
    u8* const out = packed + at.row * n_row_bytes + start / 8 * BITS;
    const bool whole = n == group && is_aligned(xg, 16);
    Chunk<IN_T> chunk[HELD];
    Bounds r;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int position = (i * team.lanes + team.lane) * CHUNK;
      chunk[i].load(xg + position, whole ? CHUNK : n - position, whole);
      if (whole) {
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) r.add(__float_as_uint(chunk[i].value(j)));
      } else {
#pragma unroll
        for (int j = 0; j < CHUNK; ++j)
          if (position + j < n) r.add(__float_as_uint(chunk[i].value(j)));
      }
    }
    for (int distance = team.lanes >> 1; distance > 0; distance >>= 1) r.join(distance);
    const Line line(r);
    if (team.lane == 0 && n > 0) {
      const bool fits = store_as(scales, unit, line.scale, scale_type) & store_as(biases, unit, line.bias, scale_type);
      if (r.is_finite() && (line.overflows || !fits)) report_overflow(unit, counters);
    }
    if (!r.is_finite()) report_nonfinite(Streamed<IN_T>{xg, n, team.lane, team.lanes}, flat, counters);
    const bool wide = n == group && is_aligned(out, WORD_BYTES);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int position = (i * team.lanes + team.lane) * CHUNK;
      u32 t[CHUNK];
      if (line.plain) {
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) t[j] = line.rounded(chunk[i].value(j));
      } else {
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) t[j] = ROUND_BITS + line.exact(chunk[i].value(j));
      }
      store_packed(out + position / CHUNK * BITS, pack(t), max(0, min(n - position, CHUNK)), wide);
    }
  }
}
