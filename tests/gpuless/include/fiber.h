// The threads of a block as fibers on one OS thread: each has its own stack, so that barriers and warp primitives may
// stand in divergent code. A thread runs from one meeting point to the next without interruption; the order in which
// threads and blocks run is chosen by the launch, and a result that changes with it is a race.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The state below is in one library, which the library of every kernel uses.
#define SHIM_STATE __attribute__((visibility("default")))

namespace shim {

constexpr unsigned ALL_LANES = 0xffffffffu;

struct Warp;

struct Fiber {
  void *stack_pointer = nullptr, *stack = nullptr, *fake_stack = nullptr;
  uint3 index{0, 0, 0};
  unsigned lane = 0;
  Warp* warp = nullptr;
  bool done = false;
  int waits_at = 0;  // source line, 0 while it can run
};

struct Votes {
  int all, any, count;
};

SHIM_STATE extern Fiber* current;
SHIM_STATE extern uint3 block_index;
SHIM_STATE extern dim3 grid_size, block_size;

// Ends the launch with this message, the block and the thread. Does not return.
[[noreturn]] SHIM_STATE void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// __syncthreads: all threads of the block that have not returned meet at the same source line.
SHIM_STATE Votes barrier(bool predicate, int line);

// All lanes of `mask` meet in one warp primitive `op` at one line; returns the 32 values they brought.
SHIM_STATE const std::uint64_t* meet(unsigned mask, std::uint64_t value, int op, int line);

// Lanes of `mask` that exist in the current warp: the last warp of a block may be partial.
SHIM_STATE unsigned existing(unsigned mask);

struct Launch {
  dim3 grid, block;
  unsigned order;      // 0 forward, 1 reverse, else the seed of a random order
  unsigned char fill;  // what shared memory holds before each block
  char *shared_begin, *shared_end;
};

SHIM_STATE int run_grid(const Launch& launch, void (*entry)(void*), void* argument);

// A kernel and the void*[] of its arguments, as cuLaunchKernel takes them.
template <class... A>
struct Call {
  void (*kernel)(A...);
  void** arguments;
  template <std::size_t... I>
  void apply(std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
  }
  static void run(void* self) {
    Call call = *static_cast<Call*>(self);
    call.apply(std::index_sequence_for<A...>());
  }
};

template <class... A>
int launch(void (*kernel)(A...), const Launch& launch, void** arguments) {
  Call<A...> call{kernel, arguments};
  return run_grid(launch, &Call<A...>::run, &call);
}

template <class T>
constexpr char kind() {
  return std::is_pointer_v<T> ? 'p' : std::is_floating_point_v<T> ? 'f' : std::is_integral_v<T> ? 'i' : 's';
}

// Writes "p8 i4 f4 ..." as pairs (kind, bytes); returns the number of parameters.
template <class... A>
int signature(void (*)(A...), char* kinds, int* sizes) {
  int n = 0;
  ((kinds[n] = kind<A>(), sizes[n++] = static_cast<int>(sizeof(A))), ...);
  return n;
}

}  // namespace shim
