// Solvers: how a group gets its scale and zero point. The macro SOLVER names one of these policies; docs/numerics.md,
// sections 4 and 5, has the formulas.
//
// A policy that decides has `solve(group, team, scale_type, plain)`, called by all threads of the team: `group.range()`
// is the range of this thread's share of the weights; `plain` says whether the whole group is plain for the result.
#pragma once
#include "codes.cuh"

struct Params {
  float scale;       // as stored
  float zero;        // the signed zero point; 0 if symmetric
  float reciprocal;  // RN(1 / scale)

  // x / scale as product with the reciprocal and one residual correction: where a plain weight's code could turn, the
  // IEEE quotient (docs/kernels.md).
  __device__ __forceinline__ float quotient(float x) const {
    const float q = __fmul_rn(x, reciprocal);
    return __fmaf_rn(__fmaf_rn(-q, scale, x), reciprocal, q);
  }
  // Whether all weights of this range may be encoded by `encode_plain`: nothing on the way overflows or loses bits, and
  // no code is below the lowest (half a step below it is a tie, and rounds up). False if anything is not finite.
  __device__ __forceinline__ bool is_plain(float lo, float hi) const {
    constexpr float LEAST = 5.42101086242752217e-20f, MOST = 1.8446744073709551616e19f;  // 2^-64, 2^64
    const float lowest = SYMMETRIC ? quotient(lo) : __fadd_rn(quotient(lo), zero);
    return (scale >= LEAST) & (scale <= MOST) & (lowest >= LOWEST - 0.5f) & (__fmul_rn(hi, reciprocal) <= 1024.0f);
  }
};

// The smallest range of codes that holds the range of the group.
struct minmax {
  static constexpr bool DECIDES = true;

  template <typename Group>
  __device__ __forceinline__ static Params solve(const Group& group, const Team& team, int scale_type, bool& plain) {
    const Range r = team.reduce(group.range());
    const float lo = r.lowest(), hi = r.highest();
    Params p;
    p.scale = as_stored(exact_scale(lo, hi), lo == 0.0f && hi == 0.0f, scale_type);
    p.zero = SYMMETRIC ? 0.0f : signed_zero(lo, p.scale);
    p.reciprocal = __frcp_rn(p.scale);
    plain = p.is_plain(lo, hi);
    return p;
  }

 private:
  __device__ __forceinline__ static float exact_scale(float lo, float hi) {
    if (SYMMETRIC) return __fdiv_rn(fmaxf(-lo, hi), LEVELS * 0.5f);
    const float span = __fsub_rn(hi, lo);
    if (__float_as_uint(span) != INF_BITS) return __fdiv_rn(span, LEVELS);
    return __fdiv_rn(__fsub_rn(__fmul_rn(hi, 0.5f), __fmul_rn(lo, 0.5f)), LEVELS * 0.5f);
  }
  __device__ __forceinline__ static float signed_zero(float lo, float scale) {
    return rintf(fminf(fmaxf(__fsub_rn(LOWEST, __fdiv_rn(lo, scale)), LOWEST), HIGHEST));
  }
};

// Scales and zero points that were decided elsewhere, and are in memory.
struct given {
  static constexpr bool DECIDES = false;
};
