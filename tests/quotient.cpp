// Counts quotients that the sequence of kernels/quantize.cu gets wrong where a wrong one could change a code: at and
// around half-integers. Prints "<quotients> <wrong>".
//
//   quotient FIRST LAST STRIDE   significands FIRST, FIRST + STRIDE, ... below LAST of the scale, out of 2^23
//
// Scales are taken from [1, 2): a factor of 2^k in scale or weight changes no significand as long as nothing overflows
// or underflows, which docs/kernels.md excludes. For every half-integer up to 255.5, and every point at a power of two
// from it that a rounded sum with a zero point can turn into it, all weights within 4 units in the last place are
// tried.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

constexpr int WIDTH = 4, BATCH = 4096;
// From here on a quotient is as coarse as a sum below 256, and half a unit of the sum is at most one of the quotient.
constexpr int COARSE = 64;

static float from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static uint32_t bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

static uint64_t count_wrong(const float* scale, const float* reciprocal, int n, float quotient, int away) {
  uint64_t wrong = 0;
  for (int i = 0; i < n; ++i) {
    const float s = scale[i], r = reciprocal[i], x = from_bits(bits(quotient * s) + static_cast<uint32_t>(away));
    const float q0 = x * r, q = __builtin_fmaf(__builtin_fmaf(-q0, s, x), r, q0);
    wrong += bits(q) != bits(x / s);
  }
  return wrong;
}

int main(int, char** argv) {
  const uint32_t first = std::strtoul(argv[1], nullptr, 0), last = std::strtoul(argv[2], nullptr, 0);
  const uint32_t stride = std::strtoul(argv[3], nullptr, 0);
  static float scale[BATCH], reciprocal[BATCH];
  uint64_t n_quotients = 0, n_wrong = 0;
  for (uint32_t start = first; start < last;) {
    int n = 0;
    for (; n < BATCH && start < last; start += stride, ++n) {
      scale[n] = from_bits(0x3f800000u | start);
      reciprocal[n] = 1.0f / scale[n];
    }
    const auto try_at = [&](float quotient) {
      for (int away = -WIDTH; away <= WIDTH; ++away) n_wrong += count_wrong(scale, reciprocal, n, quotient, away);
      n_quotients += static_cast<uint64_t>(2 * WIDTH + 1) * n;
    };
    for (int k = 0; k < 256; ++k) {
      const float tie = k + 0.5f;
      try_at(tie);
      if (k >= COARSE) continue;
      for (int j = 17; j <= 24; ++j) {
        const float half_unit = from_bits((127u - j) << 23);
        try_at(tie + half_unit);
        try_at(tie - half_unit);
      }
    }
  }
  std::printf("%llu %llu\n", static_cast<unsigned long long>(n_quotients), static_cast<unsigned long long>(n_wrong));
  return 0;
}
