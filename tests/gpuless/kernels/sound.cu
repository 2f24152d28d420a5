// Kernels without a fault, for the tests of the gates themselves.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void block_sum(const int* x, int* y, int n) {
  __shared__ int part[8];
  int sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x) sum += x[i];
  for (int o = 16; o; o >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) total += part[i];
    y[blockIdx.x] = total;
  }
}

template <int N>
__device__ void reverse_in_shared(const float* x, float* y) {
  __shared__ float s[N];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[N - 1 - threadIdx.x];
}
extern "C" __global__ void reverse(const float* x, float* y) {
  if (blockDim.x == 32)
    reverse_in_shared<32>(x, y);
  else
    reverse_in_shared<64>(x, y);
}

// Two halves of a warp in two branches, each with its own mask.
extern "C" __global__ void half_masks(const float* x, float* y) {
  float v = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    for (int o = 8; o; o >>= 1) v += __shfl_xor_sync(0x0000ffffu, v, o);
    v += 1.0f;
  } else {
    for (int o = 8; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffff0000u, v, o));
  }
  y[threadIdx.x] = v;
}

extern "C" __global__ void to_16_bits(const float* x, unsigned short* h, unsigned short* b, long long n) {
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  h[i] = __half_as_ushort(__float2half_rn(x[i]));
  b[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
}
extern "C" __global__ void from_16_bits(const unsigned short* bits, float* h, float* b, long long n) {
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  h[i] = __half2float(__ushort_as_half(bits[i]));
  b[i] = __bfloat162float(__ushort_as_bfloat16(bits[i]));
}

// Every intrinsic whose result is easy to get wrong, one output word each: both machines must agree.
extern "C" __global__ void intrinsics(const unsigned* a, const unsigned* b, unsigned* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float fa = __uint_as_float(a[i]), fb = __uint_as_float(b[i]);
  unsigned* out = y + 32 * i;
  out[0] = __float_as_uint(fminf(fa, fb));
  out[1] = __float_as_uint(fmaxf(fa, fb));
  out[2] = __float2int_rn(fa);
  out[3] = __float2int_rz(fa);
  out[4] = __float2uint_rn(fa);
  out[5] = __byte_perm(a[i], b[i], 0x7531);
  out[6] = __byte_perm(a[i], b[i], b[i] & 0x7777);
  out[7] = __brev(a[i]);
  out[8] = __clz(static_cast<int>(a[i]));
  out[9] = __popc(a[i]);
  out[10] = __ffs(static_cast<int>(a[i]));
  out[11] = __funnelshift_l(a[i], b[i], b[i]);
  out[12] = __funnelshift_r(a[i], b[i], b[i]);
  out[13] = __umulhi(a[i], b[i]);
  out[14] = __mulhi(static_cast<int>(a[i]), static_cast<int>(b[i]));
  out[15] = min(static_cast<int>(a[i]), static_cast<int>(b[i]));
  out[16] = max(a[i], b[i]);
  out[17] = __vmaxu2(a[i], b[i]);
  out[18] = __vmins2(a[i], b[i]);
#if __CUDA_ARCH__ >= 800
  out[19] = __reduce_max_sync(0xffffffffu, a[i]);
  out[20] = static_cast<unsigned>(__reduce_min_sync(0xffffffffu, static_cast<int>(a[i])));
#else
  out[19] = out[20] = 0;
#endif
  out[21] = __ballot_sync(0xffffffffu, a[i] & 1);
  out[22] = __shfl_sync(0xffffffffu, a[i], b[i] & 31);
  out[23] = __shfl_up_sync(0xffffffffu, a[i], 3, 16);
  out[24] = static_cast<unsigned>(static_cast<int>(a[i]) >> (b[i] & 31)) + (a[i] / (b[i] | 1)) + (a[i] % (b[i] | 1));
  out[25] = static_cast<unsigned>(static_cast<int>(a[i] | 1) / (static_cast<int>(b[i] >> 1) | 1));
  out[26] = __float_as_uint(__int2float_rn(static_cast<int>(a[i]))) ^ __float_as_uint(__uint2float_rn(b[i]));
  const __half2 ha = __halves2half2(__ushort_as_half(a[i] & 0xffff), __ushort_as_half(a[i] >> 16));
  const __half2 hb = __halves2half2(__ushort_as_half(b[i] & 0xffff), __ushort_as_half(b[i] >> 16));
  const __half2 hm = __hmax2(ha, hb);
  out[27] = __half_as_ushort(__low2half(hm)) | static_cast<unsigned>(__half_as_ushort(__high2half(hm))) << 16;
  const __half2 hn = __hmin2(__habs2(ha), __habs2(hb));
  out[28] = __half_as_ushort(__low2half(hn)) | static_cast<unsigned>(__half_as_ushort(__high2half(hn))) << 16;
  const __nv_bfloat162 ba = __halves2bfloat162(__ushort_as_bfloat16(a[i] & 0xffff), __ushort_as_bfloat16(a[i] >> 16));
  const __nv_bfloat162 bb = __halves2bfloat162(__ushort_as_bfloat16(b[i] & 0xffff), __ushort_as_bfloat16(b[i] >> 16));
  const __nv_bfloat162 bm = __hmax2(ba, bb);
  out[29] = __bfloat16_as_ushort(__low2bfloat16(bm)) | static_cast<unsigned>(__bfloat16_as_ushort(__high2bfloat16(bm)))
                                                           << 16;
  const __nv_bfloat162 bn = __hmin2(__habs2(ba), __habs2(bb));
  out[30] = __bfloat16_as_ushort(__low2bfloat16(bn)) | static_cast<unsigned>(__bfloat16_as_ushort(__high2bfloat16(bn)))
                                                           << 16;
  out[31] = static_cast<unsigned>((static_cast<unsigned long long>(a[i]) * b[i]) >> 17);
}

// Float arithmetic that may give NaN, whose payload the CPU and the GPU choose differently: compared as values.
extern "C" __global__ void arithmetic(const float* a, const float* b, const float* c, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  y[8 * i] = __fadd_rn(a[i], b[i]);
  y[8 * i + 1] = __fsub_rn(a[i], b[i]);
  y[8 * i + 2] = __fmul_rn(a[i], b[i]);
  y[8 * i + 3] = __fdiv_rn(a[i], b[i]);
  y[8 * i + 4] = __frcp_rn(a[i]);
  y[8 * i + 5] = __fmaf_rn(a[i], b[i], c[i]);
  y[8 * i + 6] = rintf(a[i]);
  y[8 * i + 7] = truncf(a[i]) + fabsf(b[i]);
}

extern "C" __global__ void atomics(const unsigned* x, unsigned long long* y, unsigned* z, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  atomicAdd(&y[0], 1ull);
  atomicMin(&y[1], static_cast<unsigned long long>(x[i]));
  atomicMax(&y[2], static_cast<unsigned long long>(x[i]) << 7);
  atomicMax(&z[0], x[i]);
  atomicOr(&z[1], x[i]);
  atomicAdd(&z[2], x[i]);
}

extern "C" __global__ void vector_copy(const uint4* x, uint4* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) __stcs(y + i, __ldcs(x + i));
}

extern "C" __global__ void scaled(const float* x, float* y, float scale, unsigned n) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = __fdiv_rn(x[i], scale);
}

// A product and a sum that a compiler may contract unless told not to.
extern "C" __global__ void multiply_add(const float* a, const float* b, const float* c, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a[i] * b[i] + c[i];
}
