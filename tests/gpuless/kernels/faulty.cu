// One planted fault per kernel. Each is launched with one block and arrays x, y of one element per thread.
#include <cuda_fp16.h>

#define KERNEL extern "C" __global__ void
#define T threadIdx.x

KERNEL race(const float* x, float* y) {
  __shared__ float s[256];
  s[T] = x[T];  // no barrier
  y[T] = s[blockDim.x - 1 - T];
}
KERNEL missing_syncwarp(const float* x, float* y) {
  __shared__ float s[32];
  s[T] = x[T];  // lanes of a warp do not run in step
  y[T] = s[31 - T];
}
KERNEL reused_buffer(const float* x, float* y) {
  __shared__ float s[256];
  s[T] = x[T];
  __syncthreads();
  const float v = s[blockDim.x - 1 - T];
  s[T] = v + 1.0f;  // others may not have read yet
  __syncthreads();
  y[T] = s[T] + s[0] * 0.0f;
}
KERNEL two_writers(const float* x, float* y) { y[T / 2] = x[T]; }
KERNEL read_of_a_neighbour(const float* x, float* y) {
  y[T] = x[T];
  if (T > 0) y[T] = y[T - 1] + 1.0f;
}
KERNEL global_write_out_of_bounds(const float* x, float* y) { y[T + 1] = x[T]; }
KERNEL global_read_out_of_bounds(const float* x, float* y) { y[T] = x[T + 1]; }
KERNEL shared_out_of_bounds(const float* x, float* y) {
  __shared__ float s[31];
  s[T] = x[T];
  __syncthreads();
  y[T] = s[0];
}
KERNEL shared_out_of_bounds_by_pointer(const float* x, float* y) {
  __shared__ float s[32];
  float* p = s;
  p[T + static_cast<int>(x[0])] = x[T];
  __syncthreads();
  y[T] = p[1 + T];
}
KERNEL misaligned_vector_load(const float* x, float* y) {
  if (T == 0) {
    const float4 v = *reinterpret_cast<const float4*>(x + 1);
    y[0] = v.x + v.y + v.z + v.w;
  }
}
KERNEL divergent_barrier(const float* x, float* y) {
  if (T < 16) {
    __syncthreads();
    y[T] = x[T];
  } else {
    __syncthreads();
  }
}
KERNEL shuffle_with_a_returned_lane(const float* x, float* y) {
  if (T == 5) return;
  y[T] = __shfl_xor_sync(0xffffffffu, x[T], 1);
}
KERNEL shuffle_outside_its_mask(const float* x, float* y) {
  if (T < 16) y[T] = __shfl_xor_sync(0xffff0000u, x[T], 1);
}
KERNEL shuffle_from_outside_the_mask(const float* x, float* y) {
  if (T < 16) y[T] = __shfl_xor_sync(0x0000ffffu, x[T], 16);
}
KERNEL shuffle_against_barrier(const float* x, float* y) {
  if (T < 16) y[T] = __shfl_xor_sync(0xffffffffu, x[T], 1);
  __syncthreads();
}
KERNEL uninitialised_shared(const float* x, float* y) {
  __shared__ float s[64];
  if (T < 16) s[T] = x[T];
  __syncthreads();
  y[T] = s[T];
}
KERNEL shift_beyond_the_width(const float* x, float* y) {
  y[T] = static_cast<float>(1 << (32 + static_cast<int>(x[0])));
}
