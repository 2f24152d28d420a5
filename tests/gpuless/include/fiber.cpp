// Fibers, barriers and warp meetings of the CPU shim; see fiber.h.
#include "fiber.h"

#include <sys/mman.h>

#include <cfenv>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers on the running stack, stores its pointer, and continues on another one.
extern "C" void shim_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl shim_switch
.type shim_switch,@function
.hidden shim_switch
shim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size shim_switch, .-shim_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl shim_switch
.type shim_switch,%function
.hidden shim_switch
shim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size shim_switch, .-shim_switch
)");
#else
#error "the CPU shim has no context switch for this processor"
#endif

namespace shim {

constexpr std::size_t STACK_BYTES = 64 * 1024, GUARD_BYTES = 4096;
constexpr int MAX_MEETINGS = 8;

// One rendezvous per mask. Two generations of values, because fast lanes may reach the next meeting early; the lanes in
// `unread` have still to take theirs, so that the slot cannot serve another mask yet.
struct Meeting {
  unsigned mask, arrived, unread, generation;
  int line, op;
  std::uint64_t values[2][32];
};

struct Warp {
  unsigned exited, existing;
  int n_meetings;
  Meeting meetings[MAX_MEETINGS];
};

struct Barrier {
  unsigned generation, arrived;
  int line;
  Votes votes, result;
};

Fiber* current = nullptr;
uint3 block_index;
dim3 grid_size, block_size;

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<unsigned> order;
static Barrier block_barrier;
static unsigned n_threads, n_done, position;
static unsigned long long idle;
static void* launcher_stack_pointer = nullptr;
static void (*kernel_entry)(void*);
static void* kernel_argument;
static char message[512];
static bool failed;
#if defined(__SANITIZE_ADDRESS__)
static void* launcher_fake_stack = nullptr;
static const void* launcher_bottom = nullptr;
static std::size_t launcher_size = 0;
#endif

[[gnu::noinline]] static void switch_to(Fiber* next) {
  Fiber* self = current;
  if (next == self) return;
  current = next;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(self->done ? nullptr : &self->fake_stack, next->stack, STACK_BYTES);
#endif
  shim_switch(&self->stack_pointer, next->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

[[gnu::noinline]] static void leave_block() {
  Fiber* self = current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(self->done ? nullptr : &self->fake_stack, launcher_bottom, launcher_size);
#endif
  shim_switch(&self->stack_pointer, launcher_stack_pointer);
}

void fail(const char* format, ...) {
  failed = true;
  int n = std::snprintf(message, sizeof message, "block (%u,%u,%u) thread (%u,%u,%u): ", block_index.x, block_index.y,
                        block_index.z, current->index.x, current->index.y, current->index.z);
  va_list rest;
  va_start(rest, format);
  std::vsnprintf(message + n, sizeof message - n, format, rest);
  va_end(rest);
  leave_block();  // never resumed: the launch is abandoned
  __builtin_unreachable();
}

// Lets the next thread in order run. Threads only ever wait for each other, so a full idle round is a deadlock.
static void yield() {
  if (++idle > 4ull * n_threads + 8) fail("deadlock: all threads wait, this one at line %d", current->waits_at);
  for (unsigned i = 0; i < n_threads; i++) {
    position = position + 1 == n_threads ? 0 : position + 1;
    Fiber* next = &fibers[order[position]];
    if (!next->done) return switch_to(next);
  }
}

template <class Ready>
static void wait_until(Ready ready, int line) {
  current->waits_at = line;
  while (!ready()) yield();
  current->waits_at = 0;
  idle = 0;
}

static void release_barrier_if_complete() {
  Barrier& b = block_barrier;
  if (b.arrived == 0 || b.arrived + n_done != n_threads) return;
  b.result = b.votes;
  b.votes = {1, 0, 0};
  b.arrived = 0;
  b.generation++;
}

Votes barrier(bool predicate, int line) {
  Barrier& b = block_barrier;
  if (b.arrived && b.line != line) fail("divergent __syncthreads: lines %d and %d", b.line, line);
  b.line = line;
  const unsigned generation = b.generation;
  b.arrived++;
  b.votes.all &= predicate;
  b.votes.any |= predicate;
  b.votes.count += predicate;
  idle = 0;
  release_barrier_if_complete();
  wait_until([&] { return b.generation != generation; }, line);
  return b.result;
}

static Meeting& find_meeting(Warp& warp, unsigned mask, int line) {
  Meeting* free_one = nullptr;
  for (int i = 0; i < warp.n_meetings; i++) {
    Meeting& m = warp.meetings[i];
    if (m.mask == mask) return m;
    if (m.arrived == 0 && m.unread == 0 && !free_one) free_one = &m;
  }
  if (!free_one) {
    if (warp.n_meetings == MAX_MEETINGS) fail("line %d: too many different warp masks at once", line);
    free_one = &warp.meetings[warp.n_meetings++];
    *free_one = Meeting{};
  }
  free_one->mask = mask;
  return *free_one;
}

unsigned existing(unsigned mask) { return mask & current->warp->existing; }

const std::uint64_t* meet(unsigned mask, std::uint64_t value, int op, int line) {
  Warp& warp = *current->warp;
  const unsigned self = 1u << current->lane;
  if (!(mask & self)) fail("line %d: the calling lane is not in its mask 0x%x", line, mask);
  mask &= warp.existing;
  if (warp.exited & mask) fail("line %d: mask 0x%x names a lane that has returned", line, mask);
  Meeting& m = find_meeting(warp, mask, line);
  if (m.arrived && (m.line != line || m.op != op)) fail("warp primitives differ: line %d meets line %d", line, m.line);
  m.line = line;
  m.op = op;
  const unsigned generation = m.generation;
  std::uint64_t* values = m.values[generation & 1];
  values[current->lane] = value;
  m.arrived |= self;
  idle = 0;
  if (m.arrived == mask) {
    m.arrived = 0;
    m.unread = mask & ~self;
    m.generation++;
  } else {
    wait_until([&] { return m.generation != generation; }, line);
    m.unread &= ~self;
  }
  return values;
}

[[gnu::noinline]] static void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  std::size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!launcher_bottom) {
    launcher_bottom = bottom;
    launcher_size = size;
  }
#endif
  kernel_entry(kernel_argument);
  current->done = true;
  current->warp->exited |= 1u << current->lane;
  n_done++;
  idle = 0;
  release_barrier_if_complete();
  if (n_done == n_threads)
    leave_block();
  else
    yield();
  std::abort();  // a finished fiber is never continued
}

static void prepare_stack(Fiber& fiber) {
  char* top = static_cast<char*>(fiber.stack) + STACK_BYTES;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, STACK_BYTES);
#endif
#if defined(__x86_64__)
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; i++) *--sp = nullptr;
#else
  char* frame = top - 160;
  std::memset(frame, 0, 160);
  *reinterpret_cast<void**>(frame + 88) = reinterpret_cast<void*>(fiber_main);
  void** sp = reinterpret_cast<void**>(frame);
#endif
  fiber.stack_pointer = sp;
  fiber.fake_stack = nullptr;
  fiber.done = false;
  fiber.waits_at = 0;
}

// Byte by byte and unchecked, because AddressSanitizer's poisoned red zones lie between the variables.
[[gnu::noinline]]
__attribute__((no_sanitize("address", "undefined"),
               optimize("no-tree-loop-distribute-patterns"))) static void fill_shared(const Launch& launch) {
  for (volatile char* p = launch.shared_begin; p < launch.shared_end; ++p) *p = static_cast<char>(launch.fill);
}

static std::uint64_t random_state;
static unsigned random_below(unsigned n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<unsigned>(random_state >> 32) % n;
}

// 0, 1, ... in the order that the launch asks for.
static void put_in_order(std::vector<unsigned>& items, unsigned n, unsigned how) {
  items.resize(n);
  for (unsigned i = 0; i < n; i++) items[i] = how == 1 ? n - 1 - i : i;
  if (how > 1)
    for (unsigned i = n; i > 1; i--) std::swap(items[i - 1], items[random_below(i)]);
}

static void run_block(const Launch& launch) {
  for (Warp& w : warps) w.exited = w.existing = w.n_meetings = 0;
  const dim3& b = launch.block;
  for (unsigned i = 0; i < n_threads; i++) {
    Fiber& f = fibers[i];
    prepare_stack(f);
    f.index = {i % b.x, i / b.x % b.y, i / (b.x * b.y)};
    f.lane = i % 32;
    f.warp = &warps[i / 32];
    f.warp->existing |= 1u << f.lane;
  }
  put_in_order(order, n_threads, launch.order);
  fill_shared(launch);
  block_barrier = {0, 0, 0, {1, 0, 0}, {1, 0, 0}};
  n_done = position = 0;
  idle = 0;
  current = &fibers[order[0]];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&launcher_fake_stack, current->stack, STACK_BYTES);
#endif
  shim_switch(&launcher_stack_pointer, current->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(launcher_fake_stack, nullptr, nullptr);
#endif
}

int run_grid(const Launch& launch, void (*entry)(void*), void* argument) {
  failed = false;
  message[0] = 0;
  grid_size = launch.grid;
  block_size = launch.block;
  n_threads = block_size.x * block_size.y * block_size.z;
  kernel_entry = entry;
  kernel_argument = argument;
  while (fibers.size() < n_threads) {
    Fiber f;
    char* memory = static_cast<char*>(mmap(nullptr, STACK_BYTES + GUARD_BYTES, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED || mprotect(memory, GUARD_BYTES, PROT_NONE)) {
      std::snprintf(message, sizeof message, "no memory for the stack of a thread");
      return 1;
    }
    f.stack = memory + GUARD_BYTES;
    fibers.push_back(f);
  }
  warps.assign((n_threads + 31) / 32, Warp());
  random_state = launch.order * 0x9E3779B97F4A7C15ull + 1;
  std::vector<unsigned> blocks;
  put_in_order(blocks, grid_size.x * grid_size.y * grid_size.z, launch.order);
  std::fenv_t environment;  // round to nearest with subnormals, whatever another library has set
  std::fegetenv(&environment);
  std::fesetenv(FE_DFL_ENV);
  for (unsigned i : blocks) {
    block_index = {i % grid_size.x, i / grid_size.x % grid_size.y, i / (grid_size.x * grid_size.y)};
    run_block(launch);
    if (failed) break;
  }
  std::fesetenv(&environment);
  return failed ? 1 : 0;
}

}  // namespace shim

extern "C" __attribute__((visibility("default"))) const char* shim_error() { return shim::message; }
