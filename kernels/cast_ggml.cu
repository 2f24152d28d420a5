// ggml's types without blocks, f16 and bf16: each weight rounded by itself. The same kernel quantizes and decodes.
//
// IN_T   float, __half or __nv_bfloat16
// OUT_T  the same; __half or __nv_bfloat16 where it quantizes
#include "decoded.cuh"
#include "weights.cuh"

// Whether a value that was rounded is infinite.
__device__ __forceinline__ bool is_infinite(float x) { return (__float_as_uint(x) & ~SIGN) >= INF_BITS; }
__device__ __forceinline__ bool is_infinite(__half x) { return (raw_bits(x) & 0x7fffu) >= 0x7c00u; }
__device__ __forceinline__ bool is_infinite(__nv_bfloat16 x) { return (raw_bits(x) & 0x7fffu) >= 0x7f80u; }

// Count the weights that are not finite, and those that are not when they have been rounded. Rarely called.
__device__ void report(const IN_T* x, const OUT_T* rounded, int n, i64 flat, u64* counters) {
  report_nonfinite(Streamed<IN_T>{x, n, 0, 1}, flat, counters);
#pragma unroll 1
  for (int j = 0; j < n; ++j)
    if (is_infinite(rounded[j])) report_overflow(flat + j, counters);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    cast_ggml(const IN_T* __restrict__ x,  // [n], aligned to its element
              OUT_T* __restrict__ out,     // [n], aligned to its element
              u64* counters,               // see Counter; null where it decodes
              const i64 n)                 //
{
  const bool aligned_in = is_aligned(x, 16), aligned_out = is_aligned(out, 16);
  const i64 step = static_cast<i64>(gridDim.x) * BLOCK * CHUNK;
  for (i64 i = (static_cast<i64>(blockIdx.x) * BLOCK + threadIdx.x) * CHUNK; i < n; i += step) {
    const int m = static_cast<int>(min(n - i, static_cast<i64>(CHUNK)));
    Chunk<IN_T> c;
    c.load(x + i, m, aligned_in && m == CHUNK);
    Decoded<OUT_T> d;
#pragma unroll
    for (int j = 0; j < CHUNK; j += 2) convert(c.value(j), c.value(j + 1), d.pair[j / 2]);
    d.store(out + i, m, aligned_out && m == CHUNK);
    if (counters == nullptr) continue;
    bool is_finite = true;
    const OUT_T* const rounded = reinterpret_cast<const OUT_T*>(d.pair);
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) is_finite &= !is_infinite(rounded[j]);
    if (!is_finite) report(x + i, out + i, m, i, counters);
  }
}
