// Arithmetic, bit, memory and atomic intrinsics with the results that PTX defines. Compiled with -ffp-contract=off.
#pragma once
#include "language.h"

#define SHIM_DEVICE static inline __attribute__((unused))

namespace shim {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

constexpr unsigned CANONICAL_NAN = 0x7fffffffu;

// min.f32 and max.f32: a NaN operand is ignored, -0 is less than +0. libm leaves the order of the zeros open.
SHIM_DEVICE float ptx_min(float a, float b) {
  if (a != a) return b != b ? bit_cast<float>(CANONICAL_NAN) : b;
  if (b != b) return a;
  if (a == b) return bit_cast<float>(bit_cast<unsigned>(a) | bit_cast<unsigned>(b));
  return a < b ? a : b;
}
SHIM_DEVICE float ptx_max(float a, float b) {
  if (a != a) return b != b ? bit_cast<float>(CANONICAL_NAN) : b;
  if (b != b) return a;
  if (a == b) return bit_cast<float>(bit_cast<unsigned>(a) & bit_cast<unsigned>(b));
  return a > b ? a : b;
}

// cvt to an integer type: NaN gives 0, and what is out of range saturates.
template <class T>
T saturate(double value) {
  constexpr double low = std::is_signed_v<T> ? -std::ldexp(1.0, 8 * sizeof(T) - 1) : 0.0;
  constexpr double end = std::ldexp(1.0, 8 * sizeof(T) - std::is_signed_v<T>);
  constexpr T top = static_cast<T>(~0ull >> (64 - 8 * sizeof(T) + std::is_signed_v<T>));
  if (value != value) return 0;
  return value >= end ? top : value <= low ? static_cast<T>(low) : static_cast<T>(value);
}

}  // namespace shim

#define fminf ::shim::ptx_min
#define fmaxf ::shim::ptx_max

SHIM_DEVICE unsigned __float_as_uint(float a) { return shim::bit_cast<unsigned>(a); }
SHIM_DEVICE int __float_as_int(float a) { return shim::bit_cast<int>(a); }
SHIM_DEVICE float __uint_as_float(unsigned a) { return shim::bit_cast<float>(a); }
SHIM_DEVICE float __int_as_float(int a) { return shim::bit_cast<float>(a); }

SHIM_DEVICE float __fadd_rn(float a, float b) { return a + b; }
SHIM_DEVICE float __fsub_rn(float a, float b) { return a - b; }
SHIM_DEVICE float __fmul_rn(float a, float b) { return a * b; }
SHIM_DEVICE float __fdiv_rn(float a, float b) { return a / b; }
SHIM_DEVICE float __frcp_rn(float a) { return 1.0f / a; }
SHIM_DEVICE float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
SHIM_DEVICE float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

SHIM_DEVICE int __float2int_rn(float a) { return shim::saturate<int>(__builtin_rintf(a)); }
SHIM_DEVICE int __float2int_rz(float a) { return shim::saturate<int>(__builtin_truncf(a)); }
SHIM_DEVICE int __float2int_rd(float a) { return shim::saturate<int>(__builtin_floorf(a)); }
SHIM_DEVICE int __float2int_ru(float a) { return shim::saturate<int>(__builtin_ceilf(a)); }
SHIM_DEVICE unsigned __float2uint_rn(float a) { return shim::saturate<unsigned>(__builtin_rintf(a)); }
SHIM_DEVICE unsigned __float2uint_rz(float a) { return shim::saturate<unsigned>(__builtin_truncf(a)); }
SHIM_DEVICE float __int2float_rn(int a) { return static_cast<float>(a); }
SHIM_DEVICE float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
SHIM_DEVICE float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }

#define SHIM_MIN_MAX(T)                                 \
  SHIM_DEVICE T min(T a, T b) { return a < b ? a : b; } \
  SHIM_DEVICE T max(T a, T b) { return a > b ? a : b; }
SHIM_MIN_MAX(int)
SHIM_MIN_MAX(unsigned)
SHIM_MIN_MAX(long)
SHIM_MIN_MAX(unsigned long)
SHIM_MIN_MAX(long long)
SHIM_MIN_MAX(unsigned long long)
#undef SHIM_MIN_MAX
SHIM_DEVICE float min(float a, float b) { return shim::ptx_min(a, b); }
SHIM_DEVICE float max(float a, float b) { return shim::ptx_max(a, b); }

SHIM_DEVICE int __popc(unsigned a) { return __builtin_popcount(a); }
SHIM_DEVICE int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
SHIM_DEVICE int __clz(int a) { return a ? __builtin_clz(static_cast<unsigned>(a)) : 32; }
SHIM_DEVICE int __clzll(long long a) { return a ? __builtin_clzll(static_cast<unsigned long long>(a)) : 64; }
SHIM_DEVICE int __ffs(int a) { return __builtin_ffs(a); }
SHIM_DEVICE int __ffsll(long long a) { return __builtin_ffsll(a); }
SHIM_DEVICE unsigned __brev(unsigned a) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (a >> i & 1u) << (31 - i);
  return r;
}
// prmt.b32 in its default mode: bit 3 of a selector replicates the sign of the byte it picks.
SHIM_DEVICE unsigned __byte_perm(unsigned a, unsigned b, unsigned selectors) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned selector = selectors >> (4 * i) & 15u;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (selector & 7u))) & 0xffu;
    if (selector & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    r |= byte << (8 * i);
  }
  return r;
}
SHIM_DEVICE unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(hi) << 32 | lo) << (n & 31u) >> 32);
}
SHIM_DEVICE unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(hi) << 32 | lo) >> (n & 31u));
}
SHIM_DEVICE unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
SHIM_DEVICE int __mulhi(int a, int b) { return static_cast<int>(static_cast<std::int64_t>(a) * b >> 32); }

// Video instructions on two 16-bit halves.
#define SHIM_HALVES(NAME, T, COMPARE)                                                                    \
  SHIM_DEVICE unsigned NAME(unsigned a, unsigned b) {                                                    \
    const T a0 = static_cast<T>(a), a1 = static_cast<T>(a >> 16);                                        \
    const T b0 = static_cast<T>(b), b1 = static_cast<T>(b >> 16);                                        \
    const T r0 = a0 COMPARE b0 ? a0 : b0, r1 = a1 COMPARE b1 ? a1 : b1;                                  \
    return static_cast<std::uint16_t>(r0) | static_cast<unsigned>(static_cast<std::uint16_t>(r1)) << 16; \
  }
SHIM_HALVES(__vmaxu2, std::uint16_t, >)
SHIM_HALVES(__vminu2, std::uint16_t, <)
SHIM_HALVES(__vmaxs2, std::int16_t, >)
SHIM_HALVES(__vmins2, std::int16_t, <)
#undef SHIM_HALVES

// Cache hints change no value; the access itself is checked for alignment and bounds by the sanitizers.
#define SHIM_LOAD(NAME)            \
  template <class T>               \
  SHIM_DEVICE T NAME(const T* p) { \
    return *p;                     \
  }
#define SHIM_STORE(NAME)                 \
  template <class T>                     \
  SHIM_DEVICE void NAME(T* p, T value) { \
    *p = value;                          \
  }
SHIM_LOAD(__ldg)
SHIM_LOAD(__ldcs)
SHIM_LOAD(__ldcg)
SHIM_LOAD(__ldca)
SHIM_LOAD(__ldlu)
SHIM_STORE(__stcs)
SHIM_STORE(__stcg)
SHIM_STORE(__stwb)
#undef SHIM_LOAD
#undef SHIM_STORE

// Overloads as in CUDA, so that a type CUDA has no atomic for does not compile here either. Fibers make them atomic.
#define SHIM_ATOMIC(NAME, T, EXPRESSION) \
  SHIM_DEVICE T NAME(T* p, T value) {    \
    const T old = *p;                    \
    *p = EXPRESSION;                     \
    return old;                          \
  }
#define SHIM_ATOMIC_INTEGER(NAME, EXPRESSION) \
  SHIM_ATOMIC(NAME, int, EXPRESSION)          \
  SHIM_ATOMIC(NAME, unsigned, EXPRESSION)     \
  SHIM_ATOMIC(NAME, unsigned long long, EXPRESSION)
SHIM_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
SHIM_ATOMIC(atomicAdd, unsigned, old + value)
SHIM_ATOMIC(atomicAdd, unsigned long long, old + value)
SHIM_ATOMIC(atomicAdd, float, old + value)
SHIM_ATOMIC_INTEGER(atomicMin, (value < old ? value : old))
SHIM_ATOMIC_INTEGER(atomicMax, (value > old ? value : old))
SHIM_ATOMIC(atomicMin, long long, (value < old ? value : old))
SHIM_ATOMIC(atomicMax, long long, (value > old ? value : old))
SHIM_ATOMIC_INTEGER(atomicOr, (old | value))
SHIM_ATOMIC_INTEGER(atomicAnd, (old & value))
SHIM_ATOMIC_INTEGER(atomicExch, value)
SHIM_ATOMIC(atomicExch, float, value)
#undef SHIM_ATOMIC_INTEGER
#undef SHIM_ATOMIC
template <class T>
SHIM_DEVICE T atomicCAS(T* p, T compare, T value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
  const T old = *p;
  if (old == compare) *p = value;
  return old;
}
