// What every kernel needs: integer names, ranges, teams of threads, positions of units, counters.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int BLOCK = 256;  // threads of a block, in every kernel
constexpr int WARP = 32;
constexpr int CHUNK = 8;  // weights a thread handles at a time: BITS bytes of codes, 16 bytes of a 16-bit type

// What is in the array `counters`. It starts as zeros and every entry only grows: a first index is kept as its
// complement, so that the maximum means the smallest index and 0 means none. Range bounds are kept as float bits.
enum Counter { N_NAN, N_INF, NOT_FIRST, N_OVERFLOW, NOT_FIRST_OVERFLOW, RANGE_HI, RANGE_LO };

constexpr u32 SIGN = 0x80000000u, INF_BITS = 0x7f800000u;

__device__ __forceinline__ float magnitude(float x) { return __uint_as_float(__float_as_uint(x) & ~SIGN); }

// Lowest and highest of some weights and zero, as float bits. Floats of one sign order like their bits: the highest is
// a signed maximum that starts at 0, the lowest an unsigned maximum that starts at -0.0. NaN is above infinity in both.
struct Range {
  int hi = 0;
  u32 lo = SIGN;

  __device__ __forceinline__ void join(int other_hi, u32 other_lo) {
    hi = max(hi, other_hi);
    lo = max(lo, other_lo);
  }
  __device__ __forceinline__ bool is_finite() const {
    return static_cast<u32>(hi) < INF_BITS && (lo & ~SIGN) < INF_BITS;
  }
  // The largest magnitude, as bits.
  __device__ __forceinline__ u32 magnitude() const { return max(static_cast<u32>(hi), lo & ~SIGN); }
  // Adding +0.0 makes a bound of -0.0 a +0.0.
  __device__ __forceinline__ float highest() const { return __fadd_rn(__int_as_float(hi), 0.0f); }
  __device__ __forceinline__ float lowest() const { return __fadd_rn(__uint_as_float(lo), 0.0f); }
};

// Neighbouring threads that work on one unit: a power of two up to a warp, or the whole block. All threads of the warp
// (of the block) call `sync` and `reduce` together; a full mask spares the code that matches masks of parts.
struct Team {
  int lane, lanes;

  __device__ __forceinline__ explicit Team(int n) : lane(threadIdx.x & (n - 1)), lanes(n) {}

  __device__ __forceinline__ void sync() const {
    if (lanes > WARP)
      __syncthreads();
    else
      __syncwarp();
  }
  // The range of the whole team, for each of its threads.
  __device__ __forceinline__ Range reduce(Range r) const {
#pragma unroll
    for (int distance = min(lanes, WARP) >> 1; distance > 0; distance >>= 1)
      r.join(__shfl_xor_sync(0xffffffffu, r.hi, distance), __shfl_xor_sync(0xffffffffu, r.lo, distance));
    return lanes > WARP ? reduce_warps(r) : r;
  }

 private:
  __device__ __forceinline__ static Range reduce_warps(Range r) {
    __shared__ int hi[BLOCK / WARP];
    __shared__ u32 lo[BLOCK / WARP];
    __syncthreads();  // nobody still reads what the previous call left
    if (threadIdx.x % WARP == 0) {
      hi[threadIdx.x / WARP] = r.hi;
      lo[threadIdx.x / WARP] = r.lo;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < BLOCK / WARP; ++w) r.join(hi[w], lo[w]);
    return r;
  }
};

// Bytes of a row of codes.
__device__ __forceinline__ i64 row_bytes(i64 length, int bits) { return (length * bits + 7) / 8; }

__device__ __forceinline__ bool is_aligned(const void* p, unsigned n_bytes) {
  return (reinterpret_cast<u64>(p) & (n_bytes - 1)) == 0;
}

// Unit number `unit` as (row, index within the row). Tensors without tails arrive as one row, and divide nothing.
//
// Units are runs of groups: the fewest groups whose codes end on a byte for every width, which is one where 8 divides
// its weights.
struct Position {
  i64 row = 0, index;

  __device__ __forceinline__ Position(i64 unit, i64 per_row, i64 rows) : index(unit) {
    if (rows == 1) return;
    row = unit / per_row;
    index -= row * per_row;
  }
};
