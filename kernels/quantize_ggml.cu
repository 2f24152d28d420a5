// Quantize to ggml's blocks: scales and codes together, as GGUF files hold them (docs/numerics_ggml.md).
//
// GRID  q8_0, q4_0, q5_0, q4_1, q5_1, iq4_nl, ggml_mxfp4 or ggml_nvfp4
// IN_T  float, __half or __nv_bfloat16
#include "ggml.cuh"
#include "weights.cuh"

constexpr int HELD = 32;  // weights of a thread: a block, or half of one of 64

// The weights of a thread, in registers.
struct Held {
  Chunk<IN_T> chunk[HELD / CHUNK];

  __device__ __forceinline__ Held(const IN_T* x, bool exists, bool whole) {
#pragma unroll
    for (int i = 0; i < HELD / CHUNK; ++i) chunk[i].load(x + i * CHUNK, exists ? CHUNK : 0, exists && whole);
  }
  __device__ __forceinline__ float operator[](int j) const { return chunk[j / CHUNK].value(j % CHUNK); }

  // The range of the chunks from `first` on.
  __device__ __forceinline__ Range range(int first = 0, int n = HELD / CHUNK) const {
    RangeOf<IN_T> r;
#pragma unroll
    for (int i = first; i < first + n; ++i) r.add(chunk[i]);
    return r.range();
  }
  // The sign bit of the first weight of this magnitude, given as bits.
  __device__ __forceinline__ u32 sign_of_first(u32 bits) const {
    u32 sign = 0;
#pragma unroll
    for (int j = HELD - 1; j >= 0; --j) {
      const u32 raw = __float_as_uint((*this)[j]);
      if ((raw & ~SIGN) == bits) sign = raw & SIGN;
    }
    return sign;
  }
};

// The weight of the largest magnitude, the first of several, with its sign; 0.0 among zeros.
__device__ __forceinline__ float largest(const Held& w, const Range& r) {
  const u32 hi = r.hi, lo = r.lo & ~SIGN;
  if (hi == lo && hi != 0) return __uint_as_float(hi | w.sign_of_first(hi));
  return __uint_as_float(hi >= lo ? hi : lo | SIGN);
}

// 1 / scale, and 0 for a scale of 0, and for one so small that the quotient overflows.
__device__ __forceinline__ float inverse_of(float scale) {
  const float inverse = __frcp_rn(scale);
  return (__float_as_uint(inverse) & ~SIGN) < INF_BITS ? inverse : 0.0f;
}

// The block of a thread, where it is put together. Its halves of 16 bits lie at even addresses if BYTES is even.
template <unsigned BYTES>
struct Staged {
  static constexpr unsigned WIDTH = BYTES % 4 == 0 ? 4 : BYTES % 2 == 0 ? 2 : 1;
  u8* p;

  // A float16 at an offset; whether it is finite.
  __device__ __forceinline__ bool half(int offset, float value) const {
    const u16 raw = __half_as_ushort(__float2half_rn(value));
    *reinterpret_cast<u16*>(p + offset) = raw;
    return (raw & 0x7fffu) < HALF_INF;
  }
  __device__ __forceinline__ void word(int offset, u32 value) const { put<WIDTH>(p + offset, value); }

  // 16 bytes from 32 codes below 16, which `code` gives shifted up: code j in the low half of byte j, code j + 16
  // above.
  template <typename Code>
  __device__ __forceinline__ void nibbles(int offset, Code code) const {
#pragma unroll
    for (int k = 0; k < 16; k += 4) {
      u32 packed = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) packed += code(k + j, 8 * j) + code(k + j + 16, 8 * j + 4);
      word(offset + k, packed);
    }
  }
};

// Each grid: BYTES of a thread's block, `prepare`, which all threads of a block of threads call first, and `encode`,
// which returns whether all is finite and fits its type.
struct Grid {
  __device__ __forceinline__ static void prepare() {}
};

struct q8_0 : Grid {
  static constexpr unsigned BYTES = 34;

  __device__ __forceinline__ static bool encode(const Held& w, Staged<BYTES> out, int) {
    const Range r = w.range();
    const float scale = __fdiv_rn(__uint_as_float(r.magnitude()), 127.0f), inverse = inverse_of(scale);
    const bool fits = out.half(0, scale);
#pragma unroll
    for (int k = 0; k < HELD; k += 4) {
      u32 packed = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) packed += (code(__fmul_rn(w[k + j], inverse)) & 0xffu) << (8 * j);
      out.word(2 + k, packed);
    }
    return fits && r.is_finite();
  }

 private:
  // Halves away from 0. The largest float below a half is added: with a half itself, its predecessor would become 1.
  __device__ __forceinline__ static u32 code(float q) {
    constexpr float BELOW_HALF = 0.49999997f;
    return static_cast<u32>(__float2int_rz(__fadd_rn(q, q < 0.0f ? -BELOW_HALF : BELOW_HALF)));
  }
};

// Codes of BITS bits: nibbles, and fifth bits in a word before them.
template <int BITS>
struct Codes {
  u32 code[HELD];

  __device__ __forceinline__ void set(int j, float value) {
    code[j] = min(static_cast<u32>(__float2int_rz(value)), (1u << BITS) - 1);
  }
  template <unsigned BYTES>
  __device__ __forceinline__ void store(Staged<BYTES> out, int offset) const {
    if constexpr (BITS == 5) {
      u32 high = 0;
#pragma unroll
      for (int j = 0; j < HELD; ++j) high += (code[j] >> 4) << j;
      out.word(offset, high);
      offset += 4;
    }
    out.nibbles(offset, [this](int j, int shift) { return (code[j] & 15u) << shift; });
  }
};

template <int BITS>
struct Signed : Grid {
  static constexpr unsigned BYTES = BITS == 5 ? 22 : 18;
  static constexpr float OFFSET = 1 << (BITS - 1);

  __device__ __forceinline__ static bool encode(const Held& w, Staged<BYTES> out, int) {
    const Range r = w.range();
    const float scale = __fmul_rn(largest(w, r), -1.0f / OFFSET), inverse = inverse_of(scale);
    const float half = inverse == 0.0f && scale != 0.0f ? 0.0f : OFFSET + 0.5f;  // what is too small has code 0
    const bool fits = out.half(0, scale);
    Codes<BITS> codes;
#pragma unroll
    for (int j = 0; j < HELD; ++j) codes.set(j, __fadd_rn(__fmul_rn(w[j], inverse), half));
    codes.store(out, 2);
    return fits && r.is_finite();
  }
};
struct q4_0 : Signed<4> {};
struct q5_0 : Signed<5> {};

template <int BITS>
struct Ranged : Grid {
  static constexpr unsigned BYTES = BITS == 5 ? 24 : 20;

  __device__ __forceinline__ static bool encode(const Held& w, Staged<BYTES> out, int) {
    float low = w[0], high = w[0];
#pragma unroll
    for (int j = 1; j < HELD; ++j) low = fminf(low, w[j]), high = fmaxf(high, w[j]);
    if (low == 0.0f) low = __uint_as_float(w.sign_of_first(0));  // of zeros of both signs the first counts
    const float scale = __fdiv_rn(__fsub_rn(high, low), (1 << BITS) - 1), inverse = inverse_of(scale);
    bool fits = out.half(0, scale);
    fits &= out.half(2, low);
    Codes<BITS> codes;
    float sum = 0.0f;  // not finite where a weight is not
#pragma unroll
    for (int j = 0; j < HELD; ++j) {
      const float above = __fsub_rn(w[j], low);
      sum = __fadd_rn(sum, above);
      codes.set(j, __fadd_rn(__fmul_rn(above, inverse), 0.5f));
    }
    codes.store(out, 4);
    return fits && (__float_as_uint(sum) & ~SIGN) < INF_BITS;
  }
};
struct q4_1 : Ranged<4> {};
struct q5_1 : Ranged<5> {};

// Where the code turns from one value of e2m1 to the next, times a step. An infinite step makes all codes 0.
struct E2m1 {
  float border[7];

  __device__ __forceinline__ explicit E2m1(float step) {
    const float middle[7] = {0.5f, 1.5f, 2.5f, 3.5f, 5.0f, 7.0f, 10.0f};
#pragma unroll
    for (int i = 0; i < 7; ++i) border[i] = __fmul_rn(step, middle[i]);
  }
  // The code of the nearest value, halfway that of the one nearer to 0, shifted up.
  __device__ __forceinline__ u32 code(float x, int shift) const {
    const float m = magnitude(x);
    const bool four = m > border[3], two = m > (four ? border[5] : border[1]);
    const bool one = m > (four ? (two ? border[6] : border[4]) : (two ? border[2] : border[0]));
    const u32 negative = x < -border[0] ? 8u << shift : 0;
    return negative + (four ? 4u << shift : 0) + (two ? 2u << shift : 0) + (one ? 1u << shift : 0);
  }
};

struct ggml_mxfp4 : Grid {
  static constexpr unsigned BYTES = 17;

  __device__ __forceinline__ static bool encode(const Held& w, Staged<BYTES> out, int) {
    const Range r = w.range();
    const u32 e = exponent(r.magnitude());
    const E2m1 e2m1(half_e8m0(e));
    out.p[0] = static_cast<u8>(e);
    out.nibbles(1, [&](int j, int shift) { return e2m1.code(w[j], shift); });
    return r.is_finite();
  }

 private:
  // floor(log2) as a byte, less 2, where log2 was rounded to float32 first: just below 2^k it may be k already.
  __device__ __forceinline__ static u32 exponent(u32 bits) {
    int k = static_cast<int>(bits >> 23) - 126;
    const int missing = 0x800000 - static_cast<int>(bits & 0x7fffffu);
    if (missing <= 64 && k != 0 && k < 128) {
      const int size = k < 0 ? -k : k, p = 31 - __clz(size) - (k > 0 && (k & (k - 1)) == 0);
      k += missing <= (p < 0 ? 0 : 45426 << p >> 16);  // 2^p ln 2
    }
    return static_cast<u32>(max(k + 124, 0));
  }
};

struct ggml_nvfp4 : Grid {
  static constexpr unsigned BYTES = 18;

  // `unit` is the number of the half of a block, whose bytes begin with the scales of both halves.
  __device__ __forceinline__ static bool encode(const Held& w, Staged<BYTES> out, int unit) {
    u8* const block = out.p - (unit & 1) * BYTES;
    bool is_finite = true;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const Range r = w.range(2 * part, 2);
      is_finite &= r.is_finite();
      const u32 u = ue4m3(__fdiv_rn(__uint_as_float(r.magnitude()), 6.0f));
      const E2m1 e2m1(u ? half_ue4m3(u) : __uint_as_float(INF_BITS));
      const int number = 2 * (unit & 1) + part;
      block[number] = static_cast<u8>(u);
#pragma unroll
      for (int k = 0; k < 8; k += 4) {
        u32 packed = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = 16 * part + k + j;
          packed += e2m1.code(w[at], 8 * j) + e2m1.code(w[at + 8], 8 * j + 4);
        }
        put<4>(block + 4 + 8 * number + k, packed);
      }
    }
    return is_finite;
  }

 private:
  // Halves round up, and 256 and above is 0x7e.
  __device__ __forceinline__ static u32 ue4m3(float x) {
    const u32 normal = ((__float_as_uint(x) + 0x80000u) >> 20) - 960;
    if (x < 0.015625f) return min(static_cast<u32>(__float2int_rz(__fadd_rn(__fmul_rn(x, 512.0f), 0.5f))), 7u);
    return normal < 0x78 ? normal : 0x7e;
  }
};

// 16 scales are tried. For a try, values are looked up by twice the quotient, rounded down: all borders are halves. It
// is within -269 and 268; the table is periodic, so that no index is negative.
struct iq4_nl {
  static constexpr unsigned BYTES = 18;
  static constexpr int PERIOD = 1024, TRIES = 16;

  __device__ __forceinline__ static u32 nearest(float x) {
    u32 code = 0;
    const float border[15] = {-115.5f, -93.5f, -74, -57, -42, -28.5f, -16, -4.5f, 7, 19, 31.5f, 45.5f, 61, 79, 101};
#pragma unroll
    for (int i = 0; i < 15; ++i) code += x >= border[i];
    return code;
  }
  // Values by twice the quotient.
  __device__ __forceinline__ static float* table() {
    __shared__ float values[PERIOD];
    return values;
  }
  __device__ __forceinline__ static void prepare() {
    for (int i = threadIdx.x; i < PERIOD; i += BLOCK) {
      const int twice = i < PERIOD / 2 ? i : i - PERIOD;
      table()[i] = nl_value(nearest(__fmul_rn(__int2float_rn(twice), 0.5f)));
    }
    __syncthreads();
  }
  __device__ __forceinline__ static bool encode(const Held& w, Staged<BYTES> out, int) {
    const Range r = w.range();
    const float top = largest(w, r);
    float scale = 0.0f;
    if (r.is_finite() && magnitude(top) >= 1e-15f) scale = search(w, top);
    const bool fits = out.half(0, scale);
    const float inverse = scale != 0.0f ? __frcp_rn(scale) : 0.0f;
    out.nibbles(2, [&](int j, int shift) { return nearest(__fmul_rn(w[j], inverse)) << shift; });
    return fits && r.is_finite();
  }

 private:
  __device__ __forceinline__ static float search(const Held& w, float top) {
    const float* const values = table();
    float scale = 0.0f, best = 0.0f;
#pragma unroll 1
    for (int t = 0; t < TRIES; ++t) {
      const float inverse = t == 0 ? __frcp_rn(__fdiv_rn(top, 127.0f)) : __fdiv_rn(__int2float_rn(t - 135), top);
      float products = 0.0f, norm = 0.0f;
#pragma unroll
      for (int j = 0; j < HELD; ++j) {
        const float x = w[j], quotient = __fmul_rn(x, inverse);
        const float value = values[__float2int_rd(__fadd_rn(quotient, quotient)) & (PERIOD - 1)];
        const float weighted = __fmul_rn(__fmul_rn(x, x), value);
        products = __fadd_rn(products, __fmul_rn(weighted, x));
        norm = __fadd_rn(norm, __fmul_rn(weighted, value));
      }
      if (t == 0 || (norm > 0.0f && __fmul_rn(products, products) > __fmul_rn(best, norm))) {
        scale = norm > 0.0f ? __fdiv_rn(products, norm) : 0.0f;
        best = __fmul_rn(scale, products);
      }
    }
    return scale;
  }
};

// Count what is wrong with a block that has weights which are not finite, or scales beyond their type. Rarely called.
__device__ void report(const IN_T* x, i64 unit, u64* counters) {
  const Streamed<IN_T> mine{x, HELD, 0, 1};
  report_nonfinite(mine, unit * HELD, counters);
  if (mine.range().is_finite()) report_overflow(unit, counters);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 3)
    quantize_ggml(const IN_T* __restrict__ x,  // [n_units * HELD], aligned to its element: whole blocks
                  u8* __restrict__ packed,     // [n_units * BYTES]
                  u64* counters,               // see Counter; flat indices of x and of blocks
                  const i64 n_units)           // blocks, or halves of blocks of 64
{
  constexpr unsigned BYTES = GRID::BYTES;
  __shared__ __align__(16) u8 stage[BLOCK * BYTES];
  GRID::prepare();
  // One thread for each unit; a warp puts its blocks together and writes them as one.
  const int lane = threadIdx.x % WARP;
  u8* const mine = stage + (threadIdx.x - lane) * BYTES;
  const bool aligned_in = is_aligned(x, 16), aligned_out = is_aligned(packed, 16);
  const i64 step = static_cast<i64>(gridDim.x) * BLOCK;
  for (i64 first = static_cast<i64>(blockIdx.x) * BLOCK + threadIdx.x - lane; first < n_units; first += step) {
    const i64 unit = first + lane;
    const IN_T* const from = x + unit * HELD;
    const Held held(from, unit < n_units, aligned_in);
    if (unit < n_units && !GRID::encode(held, {mine + lane * BYTES}, lane)) report(from, unit, counters);
    __syncwarp();
    const int n = static_cast<int>(min(n_units - first, static_cast<i64>(WARP))) * BYTES;
    u8* const to = packed + first * BYTES;
    const int wide = aligned_out ? n / 16 * 16 : 0;
    for (int i = lane * 16; i < wide; i += WARP * 16)
      *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(mine + i);
    for (int i = wide + lane; i < n; i += WARP) to[i] = mine[i];
    __syncwarp();
  }
}
