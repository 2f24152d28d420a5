// Quantize to a table of values or a small floating-point type: the scale of every group, then its codes, packed, in
// one pass over the weights. docs/numerics_floats.md defines it; docs/kernels.md has the sequence of the quotient.
//
// CODING  see floats.cuh
// SCALE   see floats.cuh
// IN_T    float, __half or __nv_bfloat16
// SHAPE   HELD: groups in registers; STREAMED: groups of any length, read twice; SQUARE: blocks of 128 x 128, read
//         twice; GIVEN: one scale for all weights, which is in memory
#define HELD 0
#define STREAMED 1
#define SQUARE 2
#define GIVEN 3
#include "float_codes.cuh"
#include "weights.cuh"

constexpr bool IS_TABLE = CODING == NF4 || CODING == FP4;
constexpr float LEAST_ABSMAX = 9.99999935e-39f;  // 1e-38 as float32

// How the weights of one group become values of the grid.
struct Params {
  float scale = 1.0f, reciprocal = 1.0f;
  bool plain = true;  // the product with the reciprocal, or quotient(), is as defined where a code could turn

  __device__ __forceinline__ float quotient(float x) const {
    const float q = __fmul_rn(x, reciprocal);
    return __fmaf_rn(__fmaf_rn(-q, scale, x), reciprocal, q);
  }
  __device__ __forceinline__ float value(float x) const {
    return IS_TABLE || SCALE == POWERS ? __fmul_rn(x, reciprocal) : quotient(x);
  }
  __device__ __forceinline__ float exact(float x) const {
    return SCALE == POWERS || plain ? value(x) : __fdiv_rn(x, scale);
  }
  // For a group whose largest magnitude has the bits `top`.
  __device__ __forceinline__ void set(float factor, u32 top, bool is_short) {
    constexpr float LOW = 5.42101086242752217e-20f, HIGH = CODING <= E2M1_DOWN ? 1.0f : 1.8446744073709551616e19f;
    scale = IS_TABLE ? fmaxf(factor, LEAST_ABSMAX) : factor;
    plain = top < INF_BITS;
    if (SCALE == POWERS) {
      reciprocal = power_of_two(254 - static_cast<int>(__float_as_uint(factor) >> 23));
    } else if (SCALE == LOCAL && factor == 0.0f) {
      reciprocal = 0.0f;
    } else {
      reciprocal = __frcp_rn(scale);
      if (IS_TABLE)
        plain &= !is_short;
      else
        plain &= (scale >= LOW) & (scale <= HIGH) & (__fmul_rn(__uint_as_float(top), reciprocal) <= 131072.0f);
    }
  }
};

// What all groups have in common.
struct Rule {
  void* scales;
  int scale_type, rounding, least, of_zeros;
  float divisor;

  // Store the scale of a group, and set what follows from it. `writes` for one thread of its team. True if it
  // overflows.
  __device__ __forceinline__ bool decide(u32 top, i64 index, bool is_short, bool writes, Params& p) const {
    const float absmax = __uint_as_float(top);
    float factor;
    bool overflows = false;
    if (IS_TABLE) {
      factor = is_short ? fmaxf(absmax, LEAST_ABSMAX) : absmax;
      if (writes) static_cast<float*>(scales)[index] = factor;
    } else if (SCALE == POWERS) {
      const int exponent = static_cast<int>((top + static_cast<u32>(rounding)) >> 23) - least;
      const int byte = top == 0 ? of_zeros : min(max(exponent, 0), 254);
      if (writes) static_cast<u8*>(scales)[index] = static_cast<u8>(byte);
      factor = power_of_two(byte);
    } else if (SCALE == FLOATS) {
      factor = as_stored(__fdiv_rn(absmax, LARGEST), top == 0, scale_type);
      overflows = __float_as_uint(factor) == INF_BITS;
      if (writes) Stored{scales, nullptr, index, scale_type}.write(factor, 0.0f);
    } else {
      float exact = __fdiv_rn(absmax, LARGEST);
      if (SCALE == GLOBAL) exact = __fmul_rn(divisor, exact);
      u32 byte = e4m3_code(exact);
      if (SCALE == GLOBAL && byte == 0) byte = 0x20;  // 0.125
      if (writes) static_cast<u8*>(scales)[index] = static_cast<u8>(byte);
      factor = e4m3_value(byte);
      if (SCALE == GLOBAL) factor = __fdiv_rn(factor, divisor);
    }
    p.set(factor, top, is_short);
    return overflows;
  }
};

// The codes of a chunk of a plain group.
__device__ __forceinline__ u64 encode_plain(const Chunk<IN_T>& c, const Params& p, const Codes& codes) {
  u32 t[CHUNK];
#pragma unroll
  for (int j = 0; j < CHUNK; ++j) t[j] = codes.code(p.value(c.value(j)), c.value(j));
  return pack_codes(t);
}

// Encode and store weights that are not plain, or of two groups: the second begins after `border` weights. Rarely
// called.
__device__ void encode_streamed(const Streamed<IN_T>& s, u8* out, const Params& first, const Params& second, i64 border,
                                const Codes& codes) {
#pragma unroll 1
  for (i64 i = s.lane * CHUNK; i < s.n; i += s.lanes * CHUNK) {
    const int m = static_cast<int>(min(s.n - i, static_cast<i64>(CHUNK)));
    u64 stream = 0;
#pragma unroll 1
    for (int j = 0; j < m; ++j) {
      Params p = second;
      if (i + j < border) p = first;
      const float x = value_of<IN_T>(raw_bits(s.x[i + j]), false);
      stream |= static_cast<u64>(codes.code(p.exact(x), x) - Codes::EXCESS) << (BITS * j);
    }
    store_packed(out + i / CHUNK * BITS, stream, m, false);
  }
}

#if SHAPE == HELD
constexpr int CHUNKS =
    CODING < E4M3 && SCALE >= LOCAL ? 2 : 4;  // of a thread; groups of LOCAL and GLOBAL have 16 weights
#endif

extern "C" __global__ void __launch_bounds__(BLOCK, 3)
    quantize_floats(const IN_T* __restrict__ x,             // [rows, length], aligned to its element
                    u8* __restrict__ packed,                // [rows, ceil(length * BITS / 8)]
                    void* scales,                           // [rows, groups of a row]; GIVEN reads one
                    const float* __restrict__ divisor,      // GLOBAL: the global scale
                    [[maybe_unused]] u64* counters,         // see Counter; flat indices of x and of scales
                    const i64 rows,                         //
                    const i64 length,                       //
                    const i64 per_row,                      // units of a row
                    const int scale_type,                   // FLOATS: SCALE_FLOAT32, SCALE_FLOAT16 or SCALE_BFLOAT16
                    const int rounding,                     // POWERS: added to the bits of an absmax,
                    const int least,                        // taken from its exponent,
                    const int of_zeros,                     // and the exponent of zeros
                    [[maybe_unused]] const i64 group,       // weights of a full group, or of a piece
                    [[maybe_unused]] const int run_groups,  // STREAMED: groups of a full run
                    [[maybe_unused]] const i64 row_scales,  // STREAMED: scales of a row
                    [[maybe_unused]] const int lanes)       // threads of a team, a power of two up to 32, or 256
{
  const Codes codes;
  const i64 n_row_bytes = row_bytes(length, BITS), n_units = rows * per_row;
  const Rule rule{scales, scale_type, rounding, least, of_zeros, SCALE == GLOBAL ? *divisor : 1.0f};
  const Team team(SHAPE == SQUARE ? BLOCK : lanes);
  // One team for each unit. A warp leaves the loop as one, since its teams reduce together.
  const i64 step = static_cast<i64>(gridDim.x) * (BLOCK / team.lanes);
  i64 unit = static_cast<i64>(blockIdx.x) * (BLOCK / team.lanes) + threadIdx.x / team.lanes;
  const int ahead = threadIdx.x % WARP / team.lanes;
#if SHAPE == HELD
  for (; unit - ahead < n_units; unit += step) {
    const Position at(unit, per_row, rows);
    const i64 start = at.index * group, flat = at.row * length + start;
    const int n = unit < n_units ? static_cast<int>(min(length - start, group)) : 0;
    const IN_T* const xg = x + flat;
    u8* const out = packed + at.row * n_row_bytes + start * BITS / 8;
    const bool whole = n == CHUNKS * CHUNK * team.lanes && is_aligned(xg, 16);
    Chunk<IN_T> chunk[CHUNKS];
    RangeOf<IN_T> range;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const int position = (i * team.lanes + team.lane) * CHUNK;
      chunk[i].load(xg + position, whole ? CHUNK : n - position, whole);
    }
#pragma unroll
    for (const Chunk<IN_T>& c : chunk) range.add(c);
    const u32 top = team.reduce(range.range()).magnitude();
    Params p;
    const bool is_first = team.lane == 0 && n > 0;
    if (rule.decide(top, unit, n < group, is_first, p) && is_first && top < INF_BITS) report_overflow(unit, counters);
    if (top >= INF_BITS) report_nonfinite(Streamed<IN_T>{xg, n, team.lane, team.lanes}, flat, counters);
    if (!p.plain) {
      encode_streamed({xg, n, team.lane, team.lanes}, out, p, p, 0, codes);
      continue;
    }
    const bool wide = whole && is_aligned(out, WORD_BYTES);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const int position = (i * team.lanes + team.lane) * CHUNK;
      const u64 stream = encode_plain(chunk[i], p, codes);
      store_packed(out + position / CHUNK * BITS, stream, wide ? CHUNK : max(0, min(n - position, CHUNK)), wide);
    }
  }
#elif SHAPE == STREAMED
  for (; unit - ahead < n_units; unit += step) {
    const Position at(unit, per_row, rows);
    const i64 start = at.index * run_groups * group, flat = at.row * length + start;
    const i64 n = unit < n_units ? min(length - start, run_groups * group) : 0;
    u8* const out = packed + at.row * n_row_bytes + start * BITS / 8;
    const bool aligned = is_aligned(out, WORD_BYTES);
    Params p, before;  // of this group, and of the one before it in the run
    for (int k = 0; k < run_groups; ++k) {
      const i64 skipped = min(n, k * group), index = at.row * row_scales + at.index * run_groups + k;
      const Streamed<IN_T> s{x + flat + skipped, min(n - skipped, group), team.lane, team.lanes};
      const u32 top = team.reduce(s.range()).magnitude();
      const bool is_first = team.lane == 0 && s.n > 0;
      before = p;
      if (rule.decide(top, index, s.n < group, is_first, p) && is_first && top < INF_BITS)
        report_overflow(index, counters);
      if (top >= INF_BITS) report_nonfinite(s, flat + skipped, counters);
    }
    const Streamed<IN_T> run{x + flat, n, team.lane, team.lanes};
    if (run_groups == 1 && p.plain)
      run.each(team.lane * CHUNK, [&](const Chunk<IN_T>& c, i64 i, int m) {
        store_packed(out + i / CHUNK * BITS, encode_plain(c, p, codes), m, aligned && m == CHUNK);
      });
    else  // two groups have an odd number of weights of 4 bits each: their border lies within a byte
      encode_streamed(run, out, before, p, run_groups == 1 ? 0 : group, codes);
  }
#elif SHAPE == SQUARE
  // 16 threads for each row of a block, which are 16 rows at a time.
  constexpr int SIDE = 128, ACROSS = SIDE / CHUNK, ROWS = BLOCK / ACROSS;
  const int column = static_cast<int>(threadIdx.x) % ACROSS * CHUNK, first = static_cast<int>(threadIdx.x) / ACROSS;
  const i64 bands = (rows + SIDE - 1) / SIDE;
  for (unit = blockIdx.x; unit < bands * per_row; unit += gridDim.x) {
    const i64 row = unit / per_row * SIDE, start = unit % per_row * SIDE;
    const int height = static_cast<int>(min(rows - row, static_cast<i64>(SIDE)));
    const int m = max(0, min(CHUNK, static_cast<int>(min(length - start, static_cast<i64>(SIDE))) - column));
    const IN_T* const xs = x + row * length + start + column;
    u8* const out = packed + row * n_row_bytes + start + column;
    RangeOf<IN_T> range;
    for (int r = first; r < height; r += ROWS) {
      Chunk<IN_T> c;
      c.load(xs + r * length, m, m == CHUNK && is_aligned(xs + r * length, 16));
      range.add(c);
    }
    const Range mine = range.range();
    const u32 top = team.reduce(mine).magnitude();
    Params p;
    const bool is_first = threadIdx.x == 0;
    if (rule.decide(top, unit, false, is_first, p) && is_first && top < INF_BITS) report_overflow(unit, counters);
    for (int r = first; r < height; r += ROWS) {
      Chunk<IN_T> c;
      c.load(xs + r * length, m, m == CHUNK && is_aligned(xs + r * length, 16));
      if (!mine.is_finite())
        report_nonfinite(Streamed<IN_T>{xs + r * length, m, 0, 1}, (row + r) * length + start + column, counters);
      u8* const to = out + r * n_row_bytes;
      if (p.plain)
        store_packed(to, encode_plain(c, p, codes), m, m == CHUNK && is_aligned(to, WORD_BYTES));
      else
        encode_streamed({xs + r * length, m, 0, 1}, to, p, p, 0, codes);
    }
  }
#else
  Params p;
  const float factor = factor_of(scales, 0, scale_type, SCALE, 1.0f);
  for (; unit < n_units; unit += step) {
    const Position at(unit, per_row, rows);
    const i64 start = at.index * group, n = min(length - start, group);
    u8* const out = packed + at.row * n_row_bytes + start * BITS / 8;
    const bool aligned = is_aligned(out, WORD_BYTES);
    // Each chunk is judged by itself, so that the scale need not fit the weights.
    const Streamed<IN_T> piece{x + at.row * length + start, n, team.lane, team.lanes};
    piece.each(team.lane * CHUNK, [&](const Chunk<IN_T>& c, i64 i, int m) {
      RangeOf<IN_T> range;
      range.add(c);
      p.set(factor, range.range().magnitude(), false);
      if (p.plain)
        store_packed(out + i / CHUNK * BITS, encode_plain(c, p, codes), m, aligned && m == CHUNK);
      else
        encode_streamed({piece.x + i, m, 0, 1}, out + i / CHUNK * BITS, p, p, 0, codes);
    });
  }
#endif
}
