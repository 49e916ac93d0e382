// What kernels need from their host: threads, and optionally a library GEMM. csrc fills it with torch's;
// without torch the defaults (std::thread, our own micro-kernel) stand.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace dcx {

// C[M, N] (+)= A[M, K] * B[K, N], row-major, float; leading dimensions in elements.
using SmallGemm = void (*)(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_c,
                           const float* a, const float* b, float* c);
// Calls fn(begin, end, context) over a partition of [0, count). Results must not depend on the partition.
using ParallelFor = void (*)(int64_t count, void (*fn)(int64_t begin, int64_t end, void* context), void* context);

// Calls worker(i, context) for every i of [0, threads), each on a thread of its own as far as there are that many.
using StartThreads = void (*)(int64_t threads, void (*worker)(int64_t i, void* context), void* context);
// A ParallelFor on threads that `start` starts: each begins with a share of neighbouring calls, and once that is done
// takes from what others have left. Cores that other work holds up, or that are slower, are not waited for longer than
// a part of a share lasts; which thread runs what differs from call to call.
void share_out(int64_t count, int64_t threads, StartThreads start,
               void (*fn)(int64_t begin, int64_t end, void* context), void* context);

struct Runtime {
  ParallelFor parallel_for;
  int (*num_threads)();
  SmallGemm small_gemm;  // null: the micro-kernel of gemm.h
};
Runtime& runtime();

// avx512_bf16 has VNNI's products of bytes as well: no CPU has the one without the other, a hypervisor may show it so.
// amx_bf16 is avx512_bf16 with bfloat16 multiplied in AMX's tiles.
enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmxBf16 = 4 };
constexpr Isa kAllIsas[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmxBf16};
// The best set that both this build and this machine have; DUALCODEC_EXT_ISA=generic|avx2|avx512|avx512_bf16|amx_bf16
// asks for another one.
// An Isa that can't run is refused: active_isa_error() then tells why, and the best one is used.
Isa active_isa();
const char* isa_name(Isa isa);
bool isa_compiled(Isa isa);
bool isa_detected(Isa isa);
const char* active_isa_error();
// For tests: false (and no change) when the machine or the build lacks it.
bool set_active_isa(Isa isa);

// Per-thread memory, page-aligned, kept and grown on demand; a slot's content is undefined on return. Slots are
// independent of one another. Throws std::bad_alloc when memory is short.
constexpr int kScratchSlots = 8;
void* thread_scratch(int slot, size_t bytes);

// What a tile may take on this machine: `bytes`, chosen for a second-level cache of 1 MB, or its share of a smaller
// one.
int64_t within_l2(int64_t bytes);

// parallel_for over a callable, without a standard-library template.
template <class F>
inline void parallel(int64_t count, const F& body) {
  if (count <= 0) return;
  runtime().parallel_for(
      count,
      [](int64_t begin, int64_t end, void* context) {
        const F& f = *static_cast<const F*>(context);
        for (int64_t i = begin; i < end; ++i) f(i);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// parallel where the work, in multiply-adds, is worth waking threads for; else in the calling thread. With 64k one row
// of a layer is 256 KB of weights, some 10 microseconds, and a wake-up takes 2 to 5.
constexpr int64_t kMinParallelWork = 64 * 1024;
template <class F>
inline void parallel(int64_t count, int64_t work, const F& body) {
  if (work >= kMinParallelWork) {
    parallel(count, body);
    return;
  }
  for (int64_t i = 0; i < count; ++i) body(i);
}

// Whether a call should share out a layer's columns instead of time tiles: its rows, over all clips, are so few that
// reading the weights bounds it, so that every weight should be read once, by one thread.
constexpr int64_t kShortRows = 64;
inline bool is_short(int64_t rows, int64_t batch) { return rows * batch <= kShortRows; }
// The same for a layer whose columns, `panels` of them, give every thread enough: time tiles of so few rows would leave
// threads unequal work, and each of them would read all weights.
inline bool is_short(int64_t rows, int64_t batch, int64_t panels) {
  return is_short(rows, batch) || (rows * batch <= 2 * kShortRows && panels >= 2 * runtime().num_threads());
}

// Rows per time tile: at most max_rows or a unit more, and as many tiles as keep every thread busy, equally many for
// each where there are few: a ninth tile of two threads would leave one of them waiting for a tenth of the time. Free
// to choose, since no kernel's result depends on where a tile starts.
inline int64_t tile_rows(int64_t rows, int64_t batch, int64_t max_rows, int64_t unit) {
  int64_t tiles = (rows + max_rows - 1) / max_rows;
  const int64_t threads = runtime().num_threads();
  if (tiles * batch < 16 * threads && rows >= threads * unit) tiles = (tiles + threads - 1) / threads * threads;
  const int64_t per_tile = (rows + tiles - 1) / (tiles > 0 ? tiles : 1);
  const int64_t rounded = (per_tile + unit - 1) / unit * unit;
  return rounded > 0 ? rounded : unit;
}

}  // namespace dcx
