// The searches for the scale of a sub-block, whose weights one thread holds: docs/numerics_kquants.md, operation by
// operation. Sums start at 0 and add their terms in the order of the weights.
#pragma once
#include "kquants.cuh"

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, ties to even
constexpr float SMALLEST = 1e-15f;    // sub-blocks of weights below it count as zeros

// The nearest whole number from `low` to `high`; `low` for NaN.
__device__ __forceinline__ float nearest(float v, float low, float high) {
  return __fsub_rn(__fadd_rn(fminf(fmaxf(v, low), high), ROUND), ROUND);
}

__device__ __forceinline__ float first_largest(const float (&x)[PART]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < PART; ++i)
    if (magnitude(x[i]) > magnitude(largest)) largest = x[i];
  return largest;
}

// sum_xq / sum_q2, 0 without codes; infinite where both have overflowed.
__device__ __forceinline__ float quotient(float sum_xq, float sum_q2) {
  if (!(sum_q2 > 0.0f)) return 0.0f;
  const float scale = __fdiv_rn(sum_xq, sum_q2);
  return scale == scale ? scale : __uint_as_float(INF_BITS);
}

#if BITS == 2 || BITS == 4 || BITS == 5

constexpr float TOP = (1 << BITS) - 1;
constexpr float FIRST = BITS == 4 ? -1.0f : -0.5f;  // the first try has FIRST steps more than codes
constexpr int TRIES = BITS == 4 ? 20 : 15;

struct Search {
  const float (&x)[PART];
  float raise;    // what a weight counts for, beside its magnitude
  float q[PART];  // codes of the current try

  __device__ __forceinline__ explicit Search(const float (&weights)[PART]) : x(weights) {
    raise = 0.0f;
    if constexpr (BITS != 2) {
#pragma unroll
      for (int i = 0; i < PART; ++i) raise = __fadd_rn(raise, __fmul_rn(x[i], x[i]));
      raise = __fsqrt_rn(__fdiv_rn(raise, static_cast<float>(PART)));
    }
  }
  __device__ __forceinline__ float weight(int i) const {
    return BITS == 2 ? magnitude(x[i]) : __fadd_rn(raise, magnitude(x[i]));
  }
  __device__ __forceinline__ void round(int i, float iscale, float minimum) {
    q[i] = nearest(__fmul_rn(iscale, __fsub_rn(x[i], minimum)), 0.0f, TOP);
  }
  __device__ __forceinline__ float error(float scale, float minimum) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PART; ++i) {
      const float off = __fsub_rn(__fadd_rn(__fmul_rn(scale, q[i]), minimum), x[i]);
      sum = __fadd_rn(sum, __fmul_rn(weight(i), BITS == 2 ? magnitude(off) : __fmul_rn(off, off)));
    }
    return sum;
  }
  // scale and -minimum: x is about scale * code + minimum.
  __device__ __forceinline__ void run(float& scale, float& negated) {
    float lowest = x[0], highest = x[0], sum_w = 0.0f, sum_x = 0.0f;
#pragma unroll
    for (int i = 0; i < PART; ++i) {
      lowest = fminf(lowest, x[i]);
      highest = fmaxf(highest, x[i]);
      sum_w = __fadd_rn(sum_w, weight(i));
      sum_x = __fadd_rn(sum_x, __fmul_rn(weight(i), x[i]));
    }
    lowest = fminf(lowest, 0.0f);
    float minimum = lowest;
    const float iscale = __fdiv_rn(TOP, __fsub_rn(highest, minimum));
    scale = __fdiv_rn(1.0f, iscale);
#pragma unroll
    for (int i = 0; i < PART; ++i) round(i, iscale, minimum);
    float best = error(scale, minimum);
#pragma unroll 1
    for (int k = 0; k <= TRIES; ++k) try_steps(k, highest, sum_w, sum_x, scale, minimum, best);
    if (highest == lowest) scale = 0.0f, minimum = lowest;
    negated = -minimum;
  }

 private:
  __device__ __forceinline__ void try_steps(int k, float highest, float sum_w, float sum_x, float& scale,
                                            float& minimum, float& best) {
    const float steps = __fadd_rn(__fadd_rn(FIRST, __fmul_rn(0.1f, static_cast<float>(k))), TOP);
    const float iscale = __fdiv_rn(steps, __fsub_rn(highest, minimum));
    float sum_q = 0.0f, sum_q2 = 0.0f, sum_xq = 0.0f;
#pragma unroll
    for (int i = 0; i < PART; ++i) {
      round(i, iscale, minimum);
      const float wq = __fmul_rn(weight(i), q[i]);
      sum_q = __fadd_rn(sum_q, wq);
      sum_q2 = __fadd_rn(sum_q2, __fmul_rn(wq, q[i]));
      sum_xq = __fadd_rn(sum_xq, __fmul_rn(wq, x[i]));
    }
    const float det = __fsub_rn(__fmul_rn(sum_w, sum_q2), __fmul_rn(sum_q, sum_q));
    if (!(det > 0.0f)) return;
    float new_minimum = __fdiv_rn(__fsub_rn(__fmul_rn(sum_q2, sum_x), __fmul_rn(sum_q, sum_xq)), det);
    const bool positive = new_minimum > 0.0f;
    const float above = positive ? sum_xq : __fsub_rn(__fmul_rn(sum_w, sum_xq), __fmul_rn(sum_x, sum_q));
    const float new_scale = __fdiv_rn(above, positive ? sum_q2 : det);
    if (positive) new_minimum = 0.0f;
    const float new_error = error(new_scale, new_minimum);
    if (new_error < best) best = new_error, scale = new_scale, minimum = new_minimum;
  }
};

#elif BITS == 6

constexpr float TOP = 32;

// The scale for codes -TOP .. TOP - 1.
__device__ __forceinline__ float search(const float (&x)[PART]) {
  float square[PART], cube[PART];
#pragma unroll
  for (int i = 0; i < PART; ++i) square[i] = __fmul_rn(x[i], x[i]), cube[i] = __fmul_rn(square[i], x[i]);
  const float largest = first_largest(x);
  float scale = 0.0f, best = 0.0f;
#pragma unroll 1
  for (int t = 0; t < 19; ++t) {
    const int k = t == 0 ? 0 : t < 10 ? t - 10 : t - 9;  // 0, -9 .. -1, 1 .. 9
    const float steps = __fadd_rn(TOP, __fmul_rn(0.1f, static_cast<float>(k)));
    const float iscale = __fdiv_rn(-steps, largest);
    float sum_xq = 0.0f, sum_q2 = 0.0f;
#pragma unroll
    for (int i = 0; i < PART; ++i) {
      const float q = nearest(__fmul_rn(iscale, x[i]), -TOP, TOP - 1.0f);
      sum_xq = __fadd_rn(sum_xq, __fmul_rn(cube[i], q));
      sum_q2 = __fadd_rn(sum_q2, __fmul_rn(__fmul_rn(square[i], q), q));
    }
    const bool better = sum_q2 > 0.0f && __fmul_rn(sum_xq, sum_xq) > __fmul_rn(best, sum_q2);
    if (t == 0 || better) {
      scale = quotient(sum_xq, sum_q2);
      best = __fmul_rn(scale, sum_xq);
    }
  }
  return magnitude(largest) < SMALLEST ? 0.0f : scale;
}

#else

constexpr float TOP = 4;

__device__ __forceinline__ float search(const float (&x)[PART]) {
  float q[PART];
  const float largest = first_largest(x), iscale = __fdiv_rn(-TOP, largest);
  float sum_xq = 0.0f, sum_q2 = 0.0f;
#pragma unroll
  for (int i = 0; i < PART; ++i) {
    const float w = __fmul_rn(x[i], x[i]);
    q[i] = nearest(__fmul_rn(iscale, x[i]), -TOP, TOP - 1.0f);
    sum_xq = __fadd_rn(sum_xq, __fmul_rn(__fmul_rn(w, x[i]), q[i]));
    sum_q2 = __fadd_rn(sum_q2, __fmul_rn(__fmul_rn(w, q[i]), q[i]));
  }
  bool changed = true;
#pragma unroll 1
  for (int round = 0; round < 5 && changed; ++round) {
    changed = false;
#pragma unroll
    for (int i = 0; i < PART; ++i) {
      const float w = __fmul_rn(x[i], x[i]), wx = __fmul_rn(w, x[i]);
      const float others_xq = __fsub_rn(sum_xq, __fmul_rn(wx, q[i]));
      if (!(others_xq > 0.0f)) continue;
      const float others_q2 = __fsub_rn(sum_q2, __fmul_rn(__fmul_rn(w, q[i]), q[i]));
      const float code = nearest(__fdiv_rn(__fmul_rn(x[i], others_q2), others_xq), -TOP, TOP - 1.0f);
      const float new_xq = __fadd_rn(others_xq, __fmul_rn(wx, code));
      const float new_q2 = __fadd_rn(others_q2, __fmul_rn(__fmul_rn(w, code), code));
      const float gain = __fmul_rn(__fmul_rn(new_xq, new_xq), sum_q2);
      if (code != q[i] && new_q2 > 0.0f && gain > __fmul_rn(__fmul_rn(sum_xq, sum_xq), new_q2))
        q[i] = code, sum_xq = new_xq, sum_q2 = new_q2, changed = true;
    }
  }
  return magnitude(largest) < SMALLEST ? 0.0f : quotient(sum_xq, sum_q2);
}

#endif
