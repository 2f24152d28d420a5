// Qualifiers, vector types and built-in variables of CUDA C++, for a compiler that knows none of them.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
// One static per kernel, in a section of its own so that it can be refilled before every block.
#define __shared__ static __attribute__((section("cu_shared")))

#define SHIM_VECTOR(T, NAME)                                                         \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) NAME##4 { T x, y, z, w; }; \
  static inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                  \
  static inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SHIM_VECTOR(signed char, char)
SHIM_VECTOR(unsigned char, uchar)
SHIM_VECTOR(short, short)
SHIM_VECTOR(unsigned short, ushort)
SHIM_VECTOR(int, int)
SHIM_VECTOR(unsigned int, uint)
SHIM_VECTOR(float, float)
SHIM_VECTOR(long long, longlong)
SHIM_VECTOR(unsigned long long, ulonglong)
SHIM_VECTOR(double, double)
#undef SHIM_VECTOR

#define threadIdx (::shim::current->index)
#define blockIdx (::shim::block_index)
#define blockDim (::shim::block_size)
#define gridDim (::shim::grid_size)
#define warpSize 32

static inline void __syncthreads(int line = __builtin_LINE()) { shim::barrier(true, line); }
static inline int __syncthreads_and(int p, int line = __builtin_LINE()) { return shim::barrier(p, line).all; }
static inline int __syncthreads_or(int p, int line = __builtin_LINE()) { return shim::barrier(p, line).any; }
static inline int __syncthreads_count(int p, int line = __builtin_LINE()) { return shim::barrier(p, line).count; }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
