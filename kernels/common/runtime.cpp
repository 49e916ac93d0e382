#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef DCX_X86
#include <cpuid.h>
#endif

namespace dcx {
namespace {

int default_num_threads() {
  static const int count = [] {
    const unsigned hardware = std::thread::hardware_concurrency();
    return hardware == 0 ? 1 : static_cast<int>(hardware);
  }();
  return count;
}

void default_start(int64_t threads, void (*worker)(int64_t, void*), void* context) {
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads - 1));
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(worker, i, context);
  worker(0, context);
  for (std::thread& other : others) other.join();
}

void default_parallel_for(int64_t count, void (*fn)(int64_t, int64_t, void*), void* context) {
  share_out(count, default_num_threads(), default_start, fn, context);
}

// More threads than this do not begin with a share.
constexpr int64_t kMostShares = 256;
// A share is taken in about as many parts.
constexpr int64_t kParts = 16;
constexpr int64_t kMostUnits = int64_t{1} << 31;

// The units of work [begin, end) that are left of one thread's share, on a cache line of their own: its thread takes
// from the front, in order, others from the back. Only the units' numbers pass from thread to thread here; what the
// calls write is seen where the threads meet.
struct alignas(64) Share {
  uint64_t left;  // begin in the upper half
  int64_t part;

  static uint64_t packed(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }

  bool take(bool front, int64_t& begin, int64_t& end) {
    std::atomic_ref<uint64_t> shared(left);
    uint64_t now = shared.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t first = static_cast<int64_t>(now >> 32), last = static_cast<int64_t>(now & 0xffffffffu);
      if (first >= last) return false;
      begin = front ? first : std::max(first, last - part);
      end = front ? std::min(first + part, last) : last;
      const uint64_t rest = front ? packed(end, last) : packed(first, begin);
      if (shared.compare_exchange_weak(now, rest, std::memory_order_relaxed)) return true;
    }
  }
};

int64_t l2_bytes() {
  static const int64_t bytes = [] {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
    const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (found > 0) return static_cast<int64_t>(found);
#endif
    return int64_t{1} << 20;
  }();
  return bytes;
}

struct ScratchArena {
  void* data[kScratchSlots] = {};
  size_t bytes[kScratchSlots] = {};
  ~ScratchArena() {
    for (void* p : data) free(p);
  }
};

struct IsaChoice {
  Isa isa;
  char error[160];
};

// Whether the CPU has AMX's tiles and products of bfloat16, and the system lets the process use them, which on Linux it
// has to be asked for, once for all threads.
bool amx_granted() {
#if defined(DCX_X86) && defined(__linux__)
  static const bool granted = [] {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // of EDX
    return (d & kAmxBf16) != 0 && (d & kAmxTile) != 0 && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

// Intel's VDPBF16PS multiplies at half of float32's rate: without AMX, which a hypervisor or a sandbox may withhold,
// bfloat16 is faster widened to float32.
bool slow_bf16() {
#if defined(DCX_X86) && !defined(DCX_AVX512_EMULATED)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
}

Isa best_isa() {
  for (Isa isa : {Isa::kAmxBf16, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2})
    if (isa_compiled(isa) && isa_detected(isa) && !(isa == Isa::kAvx512Bf16 && slow_bf16())) return isa;
  return Isa::kGeneric;
}

IsaChoice choose_isa() {
  IsaChoice choice{best_isa(), {}};
  const char* wanted = getenv("DUALCODEC_EXT_ISA");
  if (wanted == nullptr || *wanted == '\0') return choice;
  for (Isa isa : kAllIsas) {
    if (strcmp(wanted, isa_name(isa)) != 0) continue;
    if (isa_compiled(isa) && isa_detected(isa)) {
      choice.isa = isa;
    } else {
      snprintf(choice.error, sizeof(choice.error), "DUALCODEC_EXT_ISA=%s can't run: %s", wanted,
               isa_compiled(isa) ? "this machine lacks it" : "this build lacks it");
    }
    return choice;
  }
  snprintf(choice.error, sizeof(choice.error),
           "DUALCODEC_EXT_ISA must be generic, avx2, avx512, avx512_bf16 or amx_bf16, got %.60s", wanted);
  return choice;
}

IsaChoice& isa_choice() {
  static IsaChoice choice = choose_isa();
  return choice;
}

}  // namespace

void share_out(int64_t count, int64_t threads, StartThreads start, void (*fn)(int64_t, int64_t, void*), void* context) {
  if (count <= 0) return;
  threads = std::min({threads, count, kMostShares});
  if (threads <= 1) {
    fn(0, count, context);
    return;
  }
  Share shares[kMostShares];  // left as it is but for the first `threads`
  struct Job {
    int64_t count, threads, unit;
    Share* shares;
    void (*fn)(int64_t, int64_t, void*);
    void* context;
  } job{count, threads, count / kMostUnits + 1, shares, fn, context};
  const int64_t units = (count + job.unit - 1) / job.unit;
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t begin = units * i / threads, end = units * (i + 1) / threads;
    shares[i] = {Share::packed(begin, end), std::max<int64_t>((end - begin) / kParts, 1)};
  }
  start(
      threads,
      [](int64_t own, void* given) {
        const Job& j = *static_cast<const Job*>(given);
        for (int64_t i = 0; i < j.threads; ++i)
          for (int64_t begin, end; j.shares[(own + i) % j.threads].take(i == 0, begin, end);)
            j.fn(begin * j.unit, std::min(end * j.unit, j.count), j.context);
      },
      &job);
}

int64_t within_l2(int64_t bytes) {
  constexpr int64_t kChosenFor = int64_t{1} << 20;
  return l2_bytes() >= kChosenFor ? bytes : bytes * std::max(l2_bytes(), kChosenFor / 4) / kChosenFor;
}

Runtime& runtime() {
  static Runtime instance{default_parallel_for, default_num_threads, nullptr};
  return instance;
}

Isa active_isa() { return isa_choice().isa; }
const char* active_isa_error() { return isa_choice().error; }

bool set_active_isa(Isa isa) {
  if (!isa_compiled(isa) || !isa_detected(isa)) return false;
  isa_choice().isa = isa;
  return true;
}

const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
  return names[static_cast<int>(isa)];
}

bool isa_compiled(Isa isa) {
#ifdef DCX_X86
  (void)isa;
  return true;
#else
  return isa == Isa::kGeneric;
#endif
}

bool isa_detected(Isa isa) {
  if (isa == Isa::kGeneric) return true;
#ifdef DCX_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::kAvx2) return avx2;
#ifdef DCX_AVX512_EMULATED  // by tests/emulated.py, which compiles those units for AVX2
  return avx2;
#endif
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::kAvx512) return avx512;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return isa == Isa::kAvx512Bf16 ? bf16 : bf16 && amx_granted();
#else
  return false;
#endif
}

void* thread_scratch(int slot, size_t bytes) {
  static thread_local ScratchArena arena;
  if (arena.bytes[slot] < bytes) {
    free(arena.data[slot]);
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    arena.data[slot] = aligned_alloc(4096, rounded);
    arena.bytes[slot] = arena.data[slot] == nullptr ? 0 : rounded;
    if (arena.data[slot] == nullptr) throw std::bad_alloc();
  }
  return arena.data[slot];
}

}  // namespace dcx
