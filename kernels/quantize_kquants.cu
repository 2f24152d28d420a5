// Quantize to ggml's K-quants: a search for the scale of each sub-block, scales in multiples of a float16, codes.
// docs/numerics_kquants.md.
//
// BITS  2, 3, 4, 5 or 6
// IN_T  float, __half or __nv_bfloat16
#include "kquants_search.cuh"
#include "weights.cuh"

constexpr u32 HALF_INF = 0x7c00u;

// What the threads of a block of weights share: a byte for each code of a weight, a scale, a minimum. Padded, so that
// blocks of weights begin at different banks.
struct Shared {
  u32 codes[WEIGHTS / 4], scales[4], minima[4], pad;
};

// A value of a block in float16.
struct Stored {
  u32 bits;
  __device__ __forceinline__ explicit Stored(float value) : bits(__half_as_ushort(__float2half_rn(value))) {}
  __device__ __forceinline__ float value() const { return __half2float(__ushort_as_half(static_cast<u16>(bits))); }
  __device__ __forceinline__ bool overflows() const { return (bits & HALF_INF) == HALF_INF; }
};

// Word i of bytes whose fields of WIDTH bits are runs of RUN codes, the first lowest; a field is what is above SHIFT.
template <int RUN, int WIDTH, int SHIFT>
__device__ __forceinline__ u32 plane(const u32* codes, int i) {
  constexpr int ACROSS = RUN / 4, FIELDS = 8 / WIDTH;
  constexpr u32 MASK = 0x01010101u * ((1u << WIDTH) - 1);
  const u32* const from = codes + i / ACROSS * ACROSS * FIELDS + i % ACROSS;
  u32 word = 0;
#pragma unroll
  for (int f = 0; f < FIELDS; ++f) word |= (from[f * ACROSS] >> SHIFT & MASK) << (f * WIDTH);
  return word;
}

// The bytes of one block; the threads of the team take turns at its words.
__device__ __forceinline__ void write_block(const Shared& s, u32 d, u32 dmin, u8* out, int lane) {
  for (int i = lane; i < WEIGHTS / (BITS == 2 || BITS == 3 ? 16 : 8); i += PARTS) {
    const u32 word = BITS == 6   ? plane<64, 4, 0>(s.codes, i)
                     : BITS >= 4 ? plane<32, 4, 0>(s.codes, i)
                                 : plane<32, 2, 0>(s.codes, i);
    store_word(out + LOW_AT + 4 * i, word);
  }
  if (BITS == 3 || BITS == 5)
    for (int i = lane; i < 8; i += PARTS)
      store_word(out + HIGH_AT + 4 * i, plane<32, 1, BITS == 3 ? 2 : 4>(s.codes, i));
  if (BITS == 6) store_word(out + HIGH_AT + 4 * lane, plane<32, 2, 4>(s.codes, lane));
  if (lane < 4) {
    u8* const to = out + SCALES_AT + 4 * lane;
    if (BITS == 2) {
      store_word(to, s.scales[lane] | s.minima[lane] << 4);
    } else if (BITS == 6) {
      store_word(to, s.scales[lane]);
    } else if (BITS == 3) {
      if (lane < 2) store_word(to, plane<8, 4, 0>(s.scales, lane));
      if (lane == 2) store_word(to, plane<4, 2, 4>(s.scales, 0));
    } else if (lane < 2) {
      const u32* const six = lane == 0 ? s.scales : s.minima;
      store_word(to, six[0] | (six[1] >> 4 & 0x03030303u) << 6);
    } else if (lane == 2) {
      store_word(to, (s.scales[1] & 0x0f0f0f0fu) | (s.minima[1] & 0x0f0f0f0fu) << 4);
    }
  }
  if (lane == 0) {
    if (HAS_MINIMA) {
      store_word(out + D_AT, d | dmin << 16);
    } else {
      out[D_AT] = static_cast<u8>(d);
      out[D_AT + 1] = static_cast<u8>(d >> 8);
    }
  }
}

// Values of a team as 0 .. top times a step, which all get.
__device__ __forceinline__ float step_above(float value, float top, float& code) {
  float highest = fmaxf(value, 0.0f);
#pragma unroll
  for (int distance = PARTS / 2; distance > 0; distance /= 2)
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, distance));
  const float inverse = highest > 0.0f ? __fdiv_rn(top, highest) : 0.0f;
  code = nearest(__fmul_rn(inverse, value), 0.0f, top);
  return __fdiv_rn(highest, top);
}

// Values of a team as low .. high times a step, so that the first of the largest magnitude is `low`; all 0 if that is
// below `least`: then `exists` is false.
__device__ __forceinline__ float step_around(float value, float least, float low, float high, float& code,
                                             bool& exists) {
  float largest = value;
#pragma unroll
  for (int distance = 1; distance < PARTS; distance *= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, largest, distance);
    const bool is_before = threadIdx.x & distance;
    const float a = magnitude(other), b = magnitude(largest);
    if (a > b || (is_before && a == b)) largest = other;
  }
  exists = magnitude(largest) >= least;
  if (!exists) {
    code = 0.0f;
    return 0.0f;
  }
  const float inverse = __fdiv_rn(low, largest);
  code = nearest(__fmul_rn(inverse, value), low, high);
  return __fdiv_rn(1.0f, inverse);
}

// Codes of a sub-block with its decoded scale and minimum, a byte each, plus `shift`; 0 where the scale is 0.
__device__ __forceinline__ void encode(const float (&x)[PART], float step, float minimum, float low, float high,
                                       float shift, u32* out) {
#pragma unroll
  for (int i = 0; i < PART; i += 4) {
    u32 word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float v = __fdiv_rn(HAS_MINIMA ? __fadd_rn(x[i + j], minimum) : x[i + j], step);
      const float q = __fadd_rn(fminf(fmaxf(v, low), high), ROUND + shift);
      word |= (__float_as_uint(q) & 0xffu) << (8 * j);
    }
    out[i / 4] = step == 0.0f ? 0u : word;
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK, BITS == 4 || BITS == 5 ? 1 : 2)
    quantize_kquants(const IN_T* __restrict__ x,  // [blocks, 256], aligned to its element
                     u8* __restrict__ packed,     // [blocks, BLOCK_BYTES]
                     u64* counters,               // see Counter; a block is what overflows
                     const i64 blocks) {
  __shared__ Shared shared[BLOCK / PARTS];
  // A thread for each sub-block, a team for each block. A warp leaves the loop as one, since its teams reduce together.
  const Team team(PARTS);
  Shared& s = shared[threadIdx.x / PARTS];
  const i64 step = static_cast<i64>(gridDim.x) * (BLOCK / PARTS);
  i64 unit = static_cast<i64>(blockIdx.x) * (BLOCK / PARTS) + threadIdx.x / PARTS;
  const int ahead = threadIdx.x % WARP / PARTS;
  for (; unit - ahead < blocks; unit += step) {
    const bool exists = unit < blocks;
    const i64 flat = unit * WEIGHTS + team.lane * PART;
    // Adding 0 changes no code; without it the compiler keeps bfloat16 weights and their magnitudes in registers both.
    float w[PART];
    RangeOf<IN_T> range;
#pragma unroll
    for (int i = 0; i < PART; i += CHUNK) {
      Chunk<IN_T> c;
      c.load(x + flat + i, exists ? CHUNK : 0, exists && is_aligned(x, 16));
      range.add(c);
#pragma unroll
      for (int j = 0; j < CHUNK; ++j) w[i + j] = __fadd_rn(c.value(j), 0.0f);
    }
    if (!range.range().is_finite()) report_nonfinite(Streamed<IN_T>{x + flat, PART, 0, 1}, flat, counters);
    float code;
    u32 d_bits, dmin_bits = 0;
    bool overflows;
    u8* const scale_at = reinterpret_cast<u8*>(s.scales) + team.lane;
    u32* const codes_at = s.codes + team.lane * (PART / 4);
#if BITS == 2 || BITS == 4 || BITS == 5
    constexpr float SCALE_TOP = BITS == 2 ? 15.0f : 63.0f;
    float scale, minimum, minimum_code;
    Search search(w);
    search.run(scale, minimum);
    const Stored d(step_above(scale, SCALE_TOP, code)), dmin(step_above(minimum, SCALE_TOP, minimum_code));
    *scale_at = static_cast<u8>(__float2int_rn(code));
    reinterpret_cast<u8*>(s.minima)[team.lane] = static_cast<u8>(__float2int_rn(minimum_code));
    d_bits = d.bits, dmin_bits = dmin.bits, overflows = d.overflows() || dmin.overflows();
    encode(w, __fmul_rn(d.value(), code), __fmul_rn(dmin.value(), minimum_code), 0.0f, TOP, 0.0f, codes_at);
#else
    constexpr float LOW = BITS == 3 ? -32.0f : -128.0f;
    bool is_scaled;
    const Stored d(step_around(search(w), BITS == 3 ? 1e-45f : SMALLEST, LOW, -1.0f - LOW, code, is_scaled));
    const int shift = BITS == 3 && is_scaled ? 32 : 0;
    *scale_at = static_cast<u8>(__float2int_rn(code) + shift);
    d_bits = d.bits, overflows = d.overflows();
    encode(w, __fmul_rn(d.value(), code), 0.0f, -TOP, TOP - 1.0f, TOP, codes_at);
#endif
    __syncwarp();
    if (exists) {
      if (overflows && team.lane == 0) report_overflow(unit, counters);
      write_block(s, d_bits, dmin_bits, packed + unit * BLOCK_BYTES, team.lane);
    }
    __syncwarp();
  }
}
