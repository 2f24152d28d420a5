// A profiler for tests: a library that NVTX loads where NVTX_INJECTION64_PATH names it, and that appends every range to
// the file NVTX_LOG, one line each: what, thread, domain, category, type of payload, payload, message, with tabs
// between.
//
// The types are those of NVTX 3, whose headers need not be installed. g++ -shared -fPIC nvtx_injection.cpp
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

namespace {

struct Domain {
  std::string name;
  std::map<uint32_t, std::string> categories;
};

// nvtxEventAttributes_v2
struct Attributes {
  uint16_t version, size;
  uint32_t category;
  int32_t color_type;
  uint32_t color;
  int32_t payload_type, reserved;
  union {
    int64_t integer;
    double real;
  } payload;
  int32_t message_type;
  union {
    const char* ascii;
    const std::string* registered;
  } message;
};

using Function = void (*)();

// NvtxExportTableCallbacks, export table 1
struct Callbacks {
  size_t size;
  int (*get_module_function_table)(int module, Function*** table, unsigned* size);
};

constexpr uint32_t kCallbacks = 1;
constexpr int kCore2 = 5;
constexpr int kAscii = 1, kRegistered = 3;
// NvtxCallbackIdCore2
enum { kMarkEx = 1, kStartEx, kEnd, kPushEx, kPop, kNameCategoryA = 8, kRegisterStringA = 10, kCreateA = 12 };

std::mutex guard;
int out = -1;
uint64_t started = 0;

std::string head(const char* what, const Domain* domain) {
  return std::string(what) + '\t' + std::to_string(syscall(SYS_gettid)) + '\t' + (domain ? domain->name : "");
}

// One write per line, so that lines of several threads and processes do not mix.
void append(const std::string& line) {
  if (write(out, line.data(), line.size()) != static_cast<ssize_t>(line.size())) abort();
}

void log(const char* what, const Domain* domain, const Attributes* a) {
  const std::lock_guard<std::mutex> lock(guard);
  std::string category = std::to_string(a->category), message;
  if (domain) {
    if (auto found = domain->categories.find(a->category); found != domain->categories.end()) category = found->second;
  }
  if (a->message_type == kAscii) message = a->message.ascii;
  if (a->message_type == kRegistered) message = *a->message.registered;
  append(head(what, domain) + '\t' + category + '\t' + std::to_string(a->payload_type) + '\t' +
         std::to_string(a->payload.integer) + '\t' + message + '\n');
}

void log(const char* what, const Domain* domain) {
  const std::lock_guard<std::mutex> lock(guard);
  append(head(what, domain) + '\n');
}

Domain* create(const char* name) { return new Domain{name, {}}; }

void name_category(Domain* domain, uint32_t category, const char* name) {
  const std::lock_guard<std::mutex> lock(guard);
  domain->categories[category] = name;
}

const std::string* register_string(Domain*, const char* text) { return new std::string(text); }

void mark(Domain* domain, const Attributes* a) { log("mark", domain, a); }

int push(Domain* domain, const Attributes* a) {
  log("push", domain, a);
  return 0;
}

int pop(Domain* domain) {
  log("pop", domain);
  return 0;
}

uint64_t start(Domain* domain, const Attributes* a) {
  log("start", domain, a);
  const std::lock_guard<std::mutex> lock(guard);
  return ++started;
}

void end(Domain* domain, uint64_t) { log("end", domain); }

}  // namespace

extern "C" int InitializeInjectionNvtx2(const void* (*get_export_table)(uint32_t)) {
  const char* path = getenv("NVTX_LOG");
  const auto* callbacks = static_cast<const Callbacks*>(get_export_table(kCallbacks));
  Function** table = nullptr;
  unsigned size = 0;
  if (!path || !callbacks || !callbacks->get_module_function_table(kCore2, &table, &size) || size <= kCreateA) return 0;
  out = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (out < 0) return 0;
  *table[kMarkEx] = reinterpret_cast<Function>(mark);
  *table[kStartEx] = reinterpret_cast<Function>(start);
  *table[kEnd] = reinterpret_cast<Function>(end);
  *table[kPushEx] = reinterpret_cast<Function>(push);
  *table[kPop] = reinterpret_cast<Function>(pop);
  *table[kNameCategoryA] = reinterpret_cast<Function>(name_category);
  *table[kRegisterStringA] = reinterpret_cast<Function>(register_string);
  *table[kCreateA] = reinterpret_cast<Function>(create);
  return 1;
}
