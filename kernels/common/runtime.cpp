#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#include <thread>
#include <vector>

namespace dcx {
namespace {

int default_num_threads() {
  static const int count = [] {
    const unsigned hardware = std::thread::hardware_concurrency();
    return hardware == 0 ? 1 : static_cast<int>(hardware);
  }();
  return count;
}

void default_parallel_for(int64_t count, void (*fn)(int64_t, int64_t, void*), void* context) {
  const int64_t threads = default_num_threads() < count ? default_num_threads() : count;
  if (threads <= 1) {
    fn(0, count, context);
    return;
  }
  std::vector<std::thread> workers;
  workers.reserve(static_cast<size_t>(threads - 1));
  for (int64_t i = 1; i < threads; ++i)
    workers.emplace_back(fn, count * i / threads, count * (i + 1) / threads, context);
  fn(0, count / threads, context);
  for (std::thread& worker : workers) worker.join();
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

Isa best_isa() {
  for (Isa isa : {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2})
    if (isa_compiled(isa) && isa_detected(isa)) return isa;
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
               isa_compiled(isa) ? "this CPU lacks it" : "this build lacks it");
    }
    return choice;
  }
  snprintf(choice.error, sizeof(choice.error),
           "DUALCODEC_EXT_ISA must be generic, avx2, avx512 or avx512_bf16, got %.60s", wanted);
  return choice;
}

IsaChoice& isa_choice() {
  static IsaChoice choice = choose_isa();
  return choice;
}

}  // namespace

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
  constexpr const char* names[] = {"generic", "avx2", "avx512", "avx512_bf16"};
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
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::kAvx512) return avx512;
  return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
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
