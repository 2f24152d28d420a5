// __half and __nv_bfloat16: storage, conversions with one rounding to nearest even, and the packed minima and maxima.
#pragma once
#include "intrinsics.h"

namespace shim {

constexpr std::uint16_t NAN16 = 0x7fff;  // what CUDA's conversions and minima return for NaN

SHIM_DEVICE float half_to_float(std::uint16_t h) {
  const unsigned sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31u, fraction = h & 0x3ffu;
  if (exponent == 31) return __uint_as_float(fraction ? CANONICAL_NAN : sign | 0x7f800000u);
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}
SHIM_DEVICE std::uint16_t half_from_float(float f) {
  const unsigned bits = __float_as_uint(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return NAN16;
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {                                                    // below 2^-14: subnormal
    const float steps = __builtin_rintf(__uint_as_float(magnitude) * 0x1p24f);
    return static_cast<std::uint16_t>(sign | static_cast<unsigned>(steps));
  }
  const unsigned rebased = magnitude - 0x38000000u;
  return static_cast<std::uint16_t>(sign | (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13);
}
SHIM_DEVICE float bfloat16_to_float(std::uint16_t b) { return __uint_as_float(static_cast<unsigned>(b) << 16); }
SHIM_DEVICE std::uint16_t bfloat16_from_float(float f) {
  const unsigned bits = __float_as_uint(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return NAN16;
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace shim

struct __half_raw {
  unsigned short x;
};
struct __nv_bfloat16_raw {
  unsigned short x;
};

#define SHIM_HALF(TYPE, SHORT, PREFIX, RAW)                                                                      \
  struct TYPE {                                                                                                  \
    unsigned short x;                                                                                            \
    TYPE() = default;                                                                                            \
    TYPE(RAW raw) : x(raw.x) {}                                                                                  \
    TYPE(float f) : x(shim::PREFIX##_from_float(f)) {}                                                           \
    operator float() const { return shim::PREFIX##_to_float(x); }                                                \
    operator RAW() const { return {x}; }                                                                         \
  };                                                                                                             \
  typedef TYPE SHORT;                                                                                            \
  struct alignas(4) TYPE##2 {                                                                                    \
    TYPE x, y;                                                                                                   \
    TYPE##2() = default;                                                                                         \
    TYPE##2(TYPE x, TYPE y) : x(x), y(y) {}                                                                      \
  };                                                                                                             \
  typedef TYPE##2 SHORT##2;                                                                                      \
  namespace shim {                                                                                               \
  SHIM_DEVICE TYPE PREFIX##_bits(unsigned bits) { return TYPE(RAW{static_cast<unsigned short>(bits)}); }         \
  SHIM_DEVICE TYPE canonical(TYPE a) {                                                                           \
    return (static_cast<float>(a) != static_cast<float>(a)) ? PREFIX##_bits(NAN16) : a;                          \
  }                                                                                                              \
  SHIM_DEVICE TYPE ptx_min(TYPE a, TYPE b) {                                                                     \
    return canonical(TYPE(ptx_min(static_cast<float>(a), static_cast<float>(b))));                               \
  }                                                                                                              \
  SHIM_DEVICE TYPE ptx_max(TYPE a, TYPE b) {                                                                     \
    return canonical(TYPE(ptx_max(static_cast<float>(a), static_cast<float>(b))));                               \
  }                                                                                                              \
  SHIM_DEVICE bool is_nan(TYPE a) { return static_cast<float>(a) != static_cast<float>(a); }                     \
  }                                                                                                              \
  SHIM_DEVICE TYPE __hmin(TYPE a, TYPE b) { return shim::ptx_min(a, b); }                                        \
  SHIM_DEVICE TYPE __hmax(TYPE a, TYPE b) { return shim::ptx_max(a, b); }                                        \
  SHIM_DEVICE TYPE __hmin_nan(TYPE a, TYPE b) {                                                                  \
    return shim::is_nan(a) || shim::is_nan(b) ? shim::PREFIX##_bits(shim::NAN16) : __hmin(a, b);                 \
  }                                                                                                              \
  SHIM_DEVICE TYPE __hmax_nan(TYPE a, TYPE b) {                                                                  \
    return shim::is_nan(a) || shim::is_nan(b) ? shim::PREFIX##_bits(shim::NAN16) : __hmax(a, b);                 \
  }                                                                                                              \
  SHIM_DEVICE TYPE __habs(TYPE a) { return shim::PREFIX##_bits(a.x & 0x7fffu); }                                 \
  SHIM_DEVICE TYPE __hneg(TYPE a) { return shim::PREFIX##_bits(a.x ^ 0x8000u); }                                 \
  SHIM_DEVICE bool __hisnan(TYPE a) { return shim::is_nan(a); }                                                  \
  SHIM_DEVICE TYPE##2 __hmin2(TYPE##2 a, TYPE##2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }             \
  SHIM_DEVICE TYPE##2 __hmax2(TYPE##2 a, TYPE##2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }             \
  SHIM_DEVICE TYPE##2 __hmin2_nan(TYPE##2 a, TYPE##2 b) { return {__hmin_nan(a.x, b.x), __hmin_nan(a.y, b.y)}; } \
  SHIM_DEVICE TYPE##2 __hmax2_nan(TYPE##2 a, TYPE##2 b) { return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)}; } \
  SHIM_DEVICE TYPE##2 __habs2(TYPE##2 a) { return {__habs(a.x), __habs(a.y)}; }                                  \
  SHIM_DEVICE TYPE##2 __hneg2(TYPE##2 a) { return {__hneg(a.x), __hneg(a.y)}; }                                  \
  SHIM_DEVICE float __low2float(TYPE##2 a) { return static_cast<float>(a.x); }                                   \
  SHIM_DEVICE float __high2float(TYPE##2 a) { return static_cast<float>(a.y); }
SHIM_HALF(__half, half, half, __half_raw)
SHIM_HALF(__nv_bfloat16, nv_bfloat16, bfloat16, __nv_bfloat16_raw)
#undef SHIM_HALF
typedef __half2 half2;
typedef __nv_bfloat162 nv_bfloat162;

SHIM_DEVICE __half __ushort_as_half(unsigned short a) { return shim::half_bits(a); }
SHIM_DEVICE __half __short_as_half(short a) { return shim::half_bits(static_cast<unsigned short>(a)); }
SHIM_DEVICE unsigned short __half_as_ushort(__half a) { return a.x; }
SHIM_DEVICE short __half_as_short(__half a) { return static_cast<short>(a.x); }
SHIM_DEVICE float __half2float(__half a) { return static_cast<float>(a); }
SHIM_DEVICE __half __float2half(float a) { return __half(a); }
SHIM_DEVICE __half __float2half_rn(float a) { return __half(a); }
SHIM_DEVICE __half __low2half(__half2 a) { return a.x; }
SHIM_DEVICE __half __high2half(__half2 a) { return a.y; }
SHIM_DEVICE __half2 __halves2half2(__half a, __half b) { return {a, b}; }
SHIM_DEVICE __half2 __half2half2(__half a) { return {a, a}; }
SHIM_DEVICE __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
SHIM_DEVICE __half2 __float22half2_rn(float2 a) { return {__half(a.x), __half(a.y)}; }
SHIM_DEVICE float2 __half22float2(__half2 a) { return {static_cast<float>(a.x), static_cast<float>(a.y)}; }

SHIM_DEVICE __nv_bfloat16 __ushort_as_bfloat16(unsigned short a) { return shim::bfloat16_bits(a); }
SHIM_DEVICE unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.x; }
SHIM_DEVICE float __bfloat162float(__nv_bfloat16 a) { return static_cast<float>(a); }
SHIM_DEVICE __nv_bfloat16 __float2bfloat16(float a) { return __nv_bfloat16(a); }
SHIM_DEVICE __nv_bfloat16 __float2bfloat16_rn(float a) { return __nv_bfloat16(a); }
SHIM_DEVICE __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
SHIM_DEVICE __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
SHIM_DEVICE __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
SHIM_DEVICE __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
SHIM_DEVICE __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
SHIM_DEVICE __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {__nv_bfloat16(a.x), __nv_bfloat16(a.y)}; }
SHIM_DEVICE float2 __bfloat1622float2(__nv_bfloat162 a) { return {static_cast<float>(a.x), static_cast<float>(a.y)}; }
