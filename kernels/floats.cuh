// Codes of tables and of small floating-point types, scales that are powers of two or e4m3. docs/numerics_floats.md.
//
// CODING  NF4, FP4, E2M1 (ties to even), E2M1_DOWN (ties to the smaller magnitude), E4M3 or E5M2
// SCALE   FLOATS (of scale_type), POWERS (e8m0), LOCAL (e4m3) or GLOBAL (e4m3, divided by one float32)
#pragma once
#define NF4 0
#define FP4 1
#define E2M1 2
#define E2M1_DOWN 3
#define E4M3 4
#define E5M2 5
#define FLOATS 0
#define POWERS 1
#define LOCAL 2
#define GLOBAL 3
#define BITS (CODING >= E4M3 ? 8 : 4)
#define SYMMETRIC 1
#include "codes.cuh"

constexpr float LARGEST = CODING == E5M2 ? 57344.0f : CODING == E4M3 ? 448.0f : 6.0f;

// A type of M mantissa bits whose least normal value is 2^(LEAST - 127), up to MOST.
//
// Adding the power of two whose last bit is worth a unit of the value's exponent rounds to units, ties to even: the sum
// less that power is a count of them, and each exponent above the least adds 2^M. `code` is without sign, plus EXCESS.
// With `down`, a tie that was rounded up, which shows as a difference of half a unit, is taken back.
template <int M, int LEAST>
struct Small {
  static constexpr u32 EXCESS = (LEAST + 23 - M) << M;

  __device__ __forceinline__ static u32 code(float v, float most, bool down = false) {
    const float magnitude = fminf(fabsf(v), most);
    const u32 exponent = max(__float_as_uint(magnitude) & INF_BITS, static_cast<u32>(LEAST) << 23);
    const u32 power = exponent + ((23u - M) << 23);
    const float sum = __fadd_rn(magnitude, __uint_as_float(power));
    const u32 code = __float_as_uint(sum) - power + (power >> (23 - M));
    if (!down) return code;
    const float raised = __fsub_rn(__fsub_rn(sum, __uint_as_float(power)), magnitude);
    return raised == __uint_as_float(power - (24u << 23)) ? code - 1 : code;
  }
};
using SmallE4M3 = Small<3, 121>;

// The e4m3 code of a value that is not negative, saturated.
__device__ __forceinline__ u32 e4m3_code(float v) { return SmallE4M3::code(v, 448.0f) - SmallE4M3::EXCESS; }

// The value of an e4m3 code: its bits are those of the value times 2^-120, a float that may be subnormal.
__device__ __forceinline__ float e4m3_value(u32 code) {
  const float v =
      __fmul_rn(__uint_as_float((static_cast<int>(code << 24) >> 4) & 0x87f00000u), 1.32922799578491587e36f);
  return (code & 0x7fu) == 0x7fu ? __uint_as_float(0x7fc00000u) : v;
}

// 2^(exponent - 127), for exponents from 0 to 255.
__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(exponent > 0 ? static_cast<u32>(exponent) << 23 : 0x00400000u);
}

// What the scale number `index` multiplies values by. `divisor` is that of GLOBAL.
__device__ __forceinline__ float factor_of(void* scales, i64 index, int scale_type, int scale_kind, float divisor) {
  if (scale_kind == FLOATS) return Stored{scales, nullptr, index, scale_type}.scale();
  const u32 byte = static_cast<const u8*>(scales)[index];
  if (scale_kind == POWERS) return power_of_two(static_cast<int>(byte));
  const float value = e4m3_value(byte);
  return scale_kind == GLOBAL ? __fdiv_rn(value, divisor) : value;
}
