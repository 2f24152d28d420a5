// Warp primitives: shuffles, votes, reductions and __syncwarp, with their *_sync meaning.
#pragma once
#include "language.h"

namespace shim {

enum Op { SHFL, SHFL_XOR, SHFL_DOWN, SHFL_UP, VOTE, SYNC, MIN, MAX, ADD, AND, OR, XOR };

template <class T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "a warp primitive moves at most 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, int source, bool in_segment, Op op, int line) {
  const std::uint64_t* values = meet(mask, to_bits(value), op, line);
  if (!in_segment) return value;
  if (!(existing(mask) >> source & 1u)) fail("line %d: shuffle from lane %d, which takes no part", line, source);
  return from_bits<T>(values[source]);
}

static inline unsigned ballot(unsigned mask, bool predicate, int line) {
  const std::uint64_t* values = meet(mask, predicate, VOTE, line);
  unsigned lanes = existing(mask), result = 0;
  for (int i = 0; i < 32; i++) result |= (lanes >> i & 1u && values[i]) ? 1u << i : 0u;
  return result;
}

template <class T, class Combine>
T reduce(unsigned mask, T value, Op op, int line, Combine combine) {
  const std::uint64_t* values = meet(mask, to_bits(value), op, line);
  const unsigned others = existing(mask) & ~(1u << current->lane);
  T result = value;
  for (int i = 0; i < 32; i++)
    if (others >> i & 1u) result = combine(result, from_bits<T>(values[i]));
  return result;
}

// __reduce_*_sync exists for 32-bit integers only; anything else must not compile here either.
template <class T>
constexpr bool is_reducible = std::is_same_v<T, int> || std::is_same_v<T, unsigned>;

}  // namespace shim

template <class T>
static inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, int line = __builtin_LINE()) {
  const int base = shim::current->lane & ~(width - 1);
  return shim::shuffle(mask, v, base + (source & (width - 1)), true, shim::SHFL, line);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, int line = __builtin_LINE()) {
  const int lane = shim::current->lane, source = lane ^ x;
  return shim::shuffle(mask, v, source & 31, source < (lane & ~(width - 1)) + width, shim::SHFL_XOR, line);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const unsigned lane = shim::current->lane;
  const bool inside = (lane & (width - 1)) + delta < static_cast<unsigned>(width);
  return shim::shuffle(mask, v, (lane + delta) & 31, inside, shim::SHFL_DOWN, line);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const unsigned lane = shim::current->lane;
  return shim::shuffle(mask, v, (lane - delta) & 31, (lane & (width - 1)) >= delta, shim::SHFL_UP, line);
}
static inline unsigned __ballot_sync(unsigned mask, int p, int line = __builtin_LINE()) {
  return shim::ballot(mask, p != 0, line);
}
static inline int __any_sync(unsigned mask, int p, int line = __builtin_LINE()) {
  return shim::ballot(mask, p != 0, line) != 0;
}
static inline int __all_sync(unsigned mask, int p, int line = __builtin_LINE()) {
  return shim::ballot(mask, p == 0, line) == 0;
}
static inline void __syncwarp(unsigned mask = shim::ALL_LANES, int line = __builtin_LINE()) {
  shim::meet(mask, 0, shim::SYNC, line);
}

#if __CUDA_ARCH__ >= 800
#define SHIM_REDUCE(NAME, OP, EXPRESSION)                                              \
  template <class T>                                                                   \
  static inline T NAME(unsigned mask, T v, int line = __builtin_LINE()) {              \
    static_assert(shim::is_reducible<T>, #NAME " takes int or unsigned");              \
    return shim::reduce(mask, v, shim::OP, line, [](T a, T b) { return EXPRESSION; }); \
  }
SHIM_REDUCE(__reduce_min_sync, MIN, (a < b ? a : b))
SHIM_REDUCE(__reduce_max_sync, MAX, (a > b ? a : b))
SHIM_REDUCE(__reduce_add_sync, ADD, static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
SHIM_REDUCE(__reduce_and_sync, AND, (a & b))
SHIM_REDUCE(__reduce_or_sync, OR, (a | b))
SHIM_REDUCE(__reduce_xor_sync, XOR, (a ^ b))
#undef SHIM_REDUCE
#endif
