// Runs a .cu file on the CPU, for its results and not for speed. Included before the kernel:
//   language.h    qualifiers, vector types, thread indices, __syncthreads      (fiber.h runs the threads)
//   warp.h        shuffles, votes, reductions
//   intrinsics.h  arithmetic, bits, cache hints, atomics
//   half.h        __half and __nv_bfloat16
// What is missing here does not compile: a kernel cannot use an intrinsic whose result is not modelled.
#pragma once
#include "half.h"
#include "warp.h"
