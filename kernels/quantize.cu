// Quantize: scale and zero point of every group, then its codes, packed, in one pass over the weights.
//
//   code = clamp(rne(x / scale + zero)) + OFFSET
//
// docs/numerics.md defines it; docs/kernels.md has the sequence used here and its proof.
//
// BITS       2, 3, 4, 5, 6 or 8
// SYMMETRIC  1 or 0
// IN_T       float, __half or __nv_bfloat16
// GROUP      16, 32, 64, 128 or 256: groups held in registers; 0: groups of any length, read twice
// SOLVER     a policy of solver.cuh; `given` needs GROUP 0
#include "solver.cuh"
#include "weights.cuh"

// Signed code + OFFSET of any finite weight, by the definition.
__device__ __forceinline__ u32 encode_exact(float x, float scale, float zero) {
  float q = __fdiv_rn(x, scale);
  if (!SYMMETRIC) q = __fadd_rn(q, zero);
  return static_cast<u32>(__float2int_rn(fminf(fmaxf(q, LOWEST), HIGHEST)) + OFFSET);
}

// The codes of a chunk of a plain range.
__device__ __forceinline__ u64 encode_plain(const Chunk<IN_T>& c, const Params& p) {
  u32 t[CHUNK];
#pragma unroll
  for (int j = 0; j < CHUNK; ++j) {
    float q = p.quotient(c.value(j));
    if (!SYMMETRIC) q = __fadd_rn(q, p.zero);
    t[j] = __float_as_uint(__fadd_rn(fminf(q, HIGHEST), ROUND + OFFSET));
  }
  return pack(t);
}

// Encode and store weights that are not plain. Rarely called.
__device__ void encode_streamed(const Streamed<IN_T>& s, u8* out, const Params& p) {
#pragma unroll 1
  for (i64 i = s.lane * CHUNK; i < s.n; i += s.lanes * CHUNK) {
    const int m = static_cast<int>(min(s.n - i, static_cast<i64>(CHUNK)));
    u64 stream = 0;
#pragma unroll 1
    for (int j = 0; j < m; ++j) {
      const float x = value_of<IN_T>(raw_bits(s.x[i + j]), false);
      stream |= static_cast<u64>(encode_exact(x, p.scale, p.zero)) << (BITS * j);
    }
    store_packed(out + i / CHUNK * BITS, stream, m, false);
  }
}

// Count what is wrong with a group that is not plain: weights that are not finite, or a scale beyond its type.
__device__ __forceinline__ void report(const Params& p, const Streamed<IN_T>& s, i64 flat, i64 scale_index,
                                       u64* counters) {
  report_nonfinite(s, flat, counters);
  if (s.lane == 0 && s.n > 0 && __float_as_uint(p.scale) == INF_BITS) report_overflow(scale_index, counters);
}

#if GROUP

// Threads of a group, each with up to 32 weights, so that deciding a scale costs little for each weight.
constexpr int LANES = GROUP <= 32 ? 1 : GROUP / 32;
constexpr int HELD = GROUP / CHUNK / LANES;

// This thread's chunks of a group, in registers. Number i is chunk i * LANES + lane: the team reads neighbouring bytes.
// With `whole`, the group has all its weights, and the memory the alignment of the widest access.
struct Held {
  Chunk<IN_T> chunk[HELD];
  int lane;

  __device__ __forceinline__ int position(int i) const { return (i * LANES + lane) * CHUNK; }

  __device__ __forceinline__ Held(const IN_T* x, int n, int lane, bool whole) : lane(lane) {
    if (whole) {
#pragma unroll
      for (int i = 0; i < HELD; ++i) chunk[i].load(x + position(i), CHUNK, true);
    } else {
#pragma unroll
      for (int i = 0; i < HELD; ++i) chunk[i].load(x + position(i), n - position(i), false);
    }
  }
  __device__ __forceinline__ Range range() const {
    RangeOf<IN_T> r;
#pragma unroll
    for (const Chunk<IN_T>& c : chunk) r.add(c);
    return r.range();
  }
  __device__ __forceinline__ void encode(const Params& p, u8* out, int n, bool whole) const {
    u64 stream[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) stream[i] = encode_plain(chunk[i], p);
    if (whole) {
#pragma unroll
      for (int i = 0; i < HELD; ++i) store_packed(out + position(i) / CHUNK * BITS, stream[i], CHUNK, true);
    } else {
#pragma unroll
      for (int i = 0; i < HELD; ++i)
        store_packed(out + position(i) / CHUNK * BITS, stream[i], max(0, min(n - position(i), CHUNK)), false);
    }
  }
};

#else

// Decide and store the scale of each group of a run, `stored` being that of the first.
template <typename Solver>
__device__ __forceinline__ void decide(const Streamed<IN_T>& run, i64 flat, Stored stored, const Team& team, i64 group,
                                       int n_groups, u64* counters) {
  if constexpr (Solver::DECIDES) {
    for (int k = 0; k < n_groups; ++k, ++stored.index) {
      const i64 before = min(run.n, k * group);
      const Streamed<IN_T> s{run.x + before, min(run.n - before, group), run.lane, run.lanes};
      bool plain;
      const Params p = Solver::solve(s, team, stored.scale_type, plain);
      if (s.lane == 0 && s.n > 0) stored.write(p.scale, p.zero);
      if (!plain) report(p, s, flat + before, stored.index, counters);
    }
    team.sync();  // every thread reads what lane 0 has stored
  }
}

// Encode and store a run of several groups, whose borders lie within chunks.
__device__ void encode_run(const Streamed<IN_T>& run, u8* out, Stored stored, int group) {
  const i64 first = stored.index;
#pragma unroll 1
  for (i64 i = run.lane * CHUNK; i < run.n; i += run.lanes * CHUNK) {
    const int m = static_cast<int>(min(run.n - i, static_cast<i64>(CHUNK)));
    u64 stream = 0;
#pragma unroll 1
    for (int j = 0; j < m; ++j) {
      stored.index = first + static_cast<int>(i + j) / group;
      const float x = value_of<IN_T>(raw_bits(run.x[i + j]), false);
      stream |= static_cast<u64>(encode_exact(x, stored.scale(), stored.zero())) << (BITS * j);
    }
    store_packed(out + i / CHUNK * BITS, stream, m, false);
  }
}

// Encode and store a single group. Each chunk is judged by itself, so that `given` scales need not fit the weights.
__device__ __forceinline__ void encode_group(const Streamed<IN_T>& s, u8* out, const Stored& stored) {
  Params p{stored.scale(), stored.zero(), 0.0f};
  p.reciprocal = __frcp_rn(p.scale);
  const bool aligned = is_aligned(out, WORD_BYTES);
  s.each(s.lane * CHUNK, [&](const Chunk<IN_T>& c, i64 i, int m) {
    RangeOf<IN_T> r;
    r.add(c);
    u8* const to = out + i / CHUNK * BITS;
    if (p.is_plain(r.range().lowest(), r.range().highest()))
      store_packed(to, encode_plain(c, p), m, aligned && m == CHUNK);
    else
      encode_streamed({s.x + i, m, 0, 1}, to, p);
  });
}

#endif

extern "C" __global__ void __launch_bounds__(BLOCK, 3)
    quantize(const IN_T* __restrict__ x,             // [rows, length], aligned to its element
             u8* __restrict__ packed,                // [rows, ceil(length * BITS / 8)]
             void* scales,                           // [rows, groups of a row], of scale_type; `given` reads it
             u8* zeros,                              // the same shape; null if symmetric
             u64* counters,                          // see Counter; flat indices of x and of scales
             const i64 rows,                         //
             const i64 length,                       //
             const i64 per_row,                      // runs of a row
             const int scale_type,                   // SCALE_FLOAT32, SCALE_FLOAT16 or SCALE_BFLOAT16
             [[maybe_unused]] const i64 group,       // GROUP 0: weights of a full group
             [[maybe_unused]] const int run_groups,  // GROUP 0: groups of a full run
             [[maybe_unused]] const i64 across,      // GROUP 0: scales from one row to the next,
             [[maybe_unused]] const i64 along,  // and from one group to the next: 1, or 0 where groups share a scale
             [[maybe_unused]] const int lanes)  // GROUP 0: threads of a team, a power of two up to 32, or 256
{
  const i64 n_row_bytes = row_bytes(length, BITS), n_units = rows * per_row;
#if GROUP
  const Team team(LANES);
#else
  const Team team(lanes);
#endif
  // One team for each unit. A warp leaves the loop as one, since its teams reduce together.
  const i64 step = static_cast<i64>(gridDim.x) * (BLOCK / team.lanes);
  i64 unit = static_cast<i64>(blockIdx.x) * (BLOCK / team.lanes) + threadIdx.x / team.lanes;
  const int ahead = threadIdx.x % WARP / team.lanes;
  for (; unit - ahead < n_units; unit += step) {
    const Position at(unit, per_row, rows);
#if GROUP
    const i64 start = at.index * GROUP, flat = at.row * length + start;
    const int n = unit < n_units ? static_cast<int>(min(length - start, static_cast<i64>(GROUP))) : 0;
    const IN_T* const xg = x + flat;
    u8* const out = packed + at.row * n_row_bytes + at.index * (GROUP / 8 * BITS);
    const Held held(xg, n, team.lane, n == GROUP && is_aligned(xg, 16));
    bool plain;
    const Params p = SOLVER::solve(held, team, scale_type, plain);
    if (team.lane == 0 && n > 0) Stored{scales, zeros, unit, scale_type}.write(p.scale, p.zero);
    if (plain) {
      held.encode(p, out, n, n == GROUP && is_aligned(out, WORD_BYTES));
    } else {
      const Streamed<IN_T> streamed{xg, n, team.lane, LANES};
      report(p, streamed, flat, unit, counters);
      encode_streamed(streamed, out, p);
    }
#else
    const i64 start = at.index * run_groups * group, flat = at.row * length + start;
    const i64 n = unit < n_units ? min(length - start, run_groups * group) : 0;
    u8* const out = packed + at.row * n_row_bytes + start / 8 * BITS;
    const Streamed<IN_T> run{x + flat, n, team.lane, lanes};
    const Stored stored{scales, zeros, at.row * across + at.index * run_groups * along, scale_type};
    decide<SOLVER>(run, flat, stored, team, group, run_groups, counters);
    if (n == 0) continue;
    if (run_groups == 1)
      encode_group(run, out, stored);
    else
      encode_run(run, out, stored, static_cast<int>(group));
#endif
  }
}
