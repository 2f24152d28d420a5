// Value range: lowest and highest of all weights, zero included, and what is not finite among them: the first pass of
// schemes with one scale for the whole tensor.
//
// IN_T  float, __half or __nv_bfloat16
#include "weights.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    value_range(const IN_T* __restrict__ x,  // [n], aligned to its element
                const i64 n,                 //
                u64* counters)               // see Counter; the range as float bits
{
  const Streamed<IN_T> mine{x, n, static_cast<i64>(blockIdx.x) * BLOCK + threadIdx.x,
                            static_cast<i64>(gridDim.x) * BLOCK};
  const Range r = mine.range(), all = Team(BLOCK).reduce(r);
  if (!r.is_finite()) report_nonfinite(mine, 0, counters);
  if (threadIdx.x == 0) {
    atomicMax(counters + RANGE_HI, static_cast<u64>(static_cast<u32>(all.hi)));
    atomicMax(counters + RANGE_LO, static_cast<u64>(all.lo));
  }
}
