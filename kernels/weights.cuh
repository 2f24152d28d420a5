// Weights as they are read: chunks of raw words, their values as float32, their range.
#pragma once
#include "common.cuh"

__device__ __forceinline__ u32 raw_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ u32 raw_bits(__half x) { return __half_as_ushort(x); }
__device__ __forceinline__ u32 raw_bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }

// The float32 value of a weight of type T from its raw bits, in the low half of `word` or (a 16-bit type) in the high.
template <typename T>
__device__ __forceinline__ float value_of(u32 word, bool high);
template <>
__device__ __forceinline__ float value_of<float>(u32 word, bool) {
  return __uint_as_float(word);
}
template <>
__device__ __forceinline__ float value_of<__half>(u32 word, bool high) {
  return __half2float(__ushort_as_half(static_cast<u16>(high ? word >> 16 : word)));
}
template <>
__device__ __forceinline__ float value_of<__nv_bfloat16>(u32 word, bool high) {
  return __uint_as_float(high ? word & 0xffff0000u : word << 16);
}

// 8 weights as raw words; 16-bit types in pairs, the first in the low half.
template <typename T>
struct Chunk {
  static constexpr int PER_WORD = 4 / sizeof(T);
  u32 word[CHUNK / PER_WORD];

  __device__ __forceinline__ float value(int j) const {
    return value_of<T>(word[j / PER_WORD], PER_WORD == 2 && j % 2 == 1);
  }
  // The first n weights at p; the others are 0. With `whole`, n is 8 or more and p is aligned to 16 bytes.
  __device__ __forceinline__ void load(const T* p, int n, bool whole) {
    if (whole) {
#pragma unroll
      for (int i = 0; i < CHUNK / PER_WORD; i += 4) {
        const uint4 v = reinterpret_cast<const uint4*>(p)[i / 4];
        word[i] = v.x, word[i + 1] = v.y, word[i + 2] = v.z, word[i + 3] = v.w;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < CHUNK / PER_WORD; ++i) {
      word[i] = i * PER_WORD < n ? raw_bits(p[i * PER_WORD]) : 0;
      if (PER_WORD == 2 && i * 2 + 1 < n) word[i] |= raw_bits(p[i * 2 + 1]) << 16;
    }
  }
};

// The range of chunks of 16-bit weights, which stay packed: the maxima of Range, on 16 bits.
template <typename T>
struct RangeOf {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900  // two 16-bit maxima are one instruction
  u32 hi = 0, lo = 0x80008000u;

  __device__ __forceinline__ void add(const Chunk<T>& c) {
#pragma unroll
    for (const u32 w : c.word) hi = __vmaxs2(hi, w), lo = __vmaxu2(lo, w);
  }
  __device__ __forceinline__ Range range() const {
    return widen(max(hi & 0xffffu, hi >> 16), max(lo & 0xffffu, lo >> 16));
  }
#else  // a low half is shifted up; below a high half its neighbour stays, which orders only equal ones
  Range even, odd;

  __device__ __forceinline__ void add(const Chunk<T>& c) {
#pragma unroll
    for (const u32 w : c.word) {
      even.join(static_cast<int>(w << 16), w << 16);
      odd.join(static_cast<int>(w), w);
    }
  }
  __device__ __forceinline__ Range range() const {
    return widen(static_cast<u32>(max(even.hi, odd.hi)) >> 16, max(even.lo, odd.lo) >> 16);
  }
#endif

 private:
  // The sign of the lower bound goes around the conversion, which drops that of a NaN.
  __device__ __forceinline__ static Range widen(u32 hi, u32 lo) {
    Range r;
    r.hi = __float_as_int(value_of<T>(hi, false));
    r.lo = __float_as_uint(value_of<T>(lo & 0x7fffu, false)) | SIGN;
    return r;
  }
};

template <>
struct RangeOf<float> {
  Range r;

  __device__ __forceinline__ void add(const Chunk<float>& c) {
#pragma unroll
    for (const u32 w : c.word) r.join(static_cast<int>(w), w);
  }
  __device__ __forceinline__ Range range() const { return r; }
};

// The chunks lane, lane + lanes, ... of the weights x [n].
template <typename T>
struct Streamed {
  const T* x;
  i64 n, lane, lanes;

  // visit(chunk, i, m), from i = start on: the chunk of x[i] to x[i + m - 1].
  template <typename Visit>
  __device__ __forceinline__ void each(i64 start, Visit visit) const {
    const bool aligned = is_aligned(x, 16);
    for (i64 i = start; i < n; i += lanes * CHUNK) {
      const int m = static_cast<int>(min(n - i, static_cast<i64>(CHUNK)));
      Chunk<T> c;
      c.load(x + i, m, aligned && m == CHUNK);
      visit(c, i, m);
    }
  }
  // The first reading of the weights, which come from device memory: several loads are under way at a time.
  __device__ __forceinline__ Range range() const {
    constexpr int AT_ONCE = 4;
    const i64 step = lanes * CHUNK;
    RangeOf<T> r;
    i64 i = lane * CHUNK;
    if (is_aligned(x, 16)) {
      for (; i + (AT_ONCE - 1) * step + CHUNK <= n; i += AT_ONCE * step) {
        Chunk<T> c[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) c[k].load(x + i + k * step, CHUNK, true);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) r.add(c[k]);
      }
    }
    each(i, [&r](const Chunk<T>& c, i64, int) { r.add(c); });
    return r.range();
  }
};

// Count a scale that overflows, by its flat index.
__device__ __forceinline__ void report_overflow(i64 index, u64* counters) {
  atomicAdd(counters + N_OVERFLOW, 1ull);
  atomicMax(counters + NOT_FIRST_OVERFLOW, ~static_cast<u64>(index));
}

// Count what is not finite in these weights; x[0] has the flat index `flat`. Rarely called.
template <typename T>
__device__ void report_nonfinite(const Streamed<T>& s, i64 flat, u64* counters) {
  u64 n_nan = 0, n_inf = 0, not_first = 0;
#pragma unroll 1
  for (i64 i = s.lane * CHUNK; i < s.n; i += s.lanes * CHUNK) {
#pragma unroll 1
    for (i64 k = i; k < min(s.n, i + CHUNK); ++k) {
      const u32 magnitude = __float_as_uint(value_of<T>(raw_bits(s.x[k]), false)) & ~SIGN;
      n_nan += magnitude > INF_BITS;
      n_inf += magnitude == INF_BITS;
      if (magnitude >= INF_BITS) not_first = max(not_first, ~static_cast<u64>(flat + k));
    }
  }
  if (not_first == 0) return;
  atomicAdd(counters + N_NAN, n_nan);
  atomicAdd(counters + N_INF, n_inf);
  atomicMax(counters + NOT_FIRST, not_first);
}
