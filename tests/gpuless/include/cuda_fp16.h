// The shim is one header, included before the kernel.
#pragma once
#include "cuda_shim.h"
