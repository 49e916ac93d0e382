// Threads, scratch memory, tiles and panels, without torch.
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "common/conv_shape.h"
#include "common/gemm_pack.h"
#include "common/runtime.h"
#include "snake_upsample1d/phases.h"

using namespace dcx;

int main() {
  for (int64_t count : {0, 1, 2, 7, 1000}) {
    std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
    parallel(count, [&](int64_t i) { seen[static_cast<size_t>(i)]++; });
    for (const auto& times : seen) CHECK(times == 1);
  }

  // Every call once, whatever the number of threads, also where one of them has hardly begun when the others are done,
  // and where there are fewer than were asked for.
  const StartThreads late = [](int64_t threads, void (*worker)(int64_t, void*), void* context) {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(worker, i, context);
    for (std::thread& other : others) other.join();
    worker(0, context);
  };
  const StartThreads one = [](int64_t threads, void (*worker)(int64_t, void*), void* context) {
    for (int64_t i = 0; i < threads; ++i) worker(i, context);
  };
  for (StartThreads start : {late, one})
    for (int64_t threads : {0, 1, 2, 3, 5, 300})
      for (int64_t count : {0, 1, 2, 7, 100, 1000}) {
        std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
        share_out(
            count, threads, start,
            [](int64_t begin, int64_t end, void* context) {
              CHECK(begin < end);
              for (int64_t i = begin; i < end; ++i) static_cast<std::atomic<int>*>(context)[i]++;
            },
            seen.data());
        for (const auto& times : seen) CHECK(times == 1);
      }
  // More calls than a share can number one by one.
  std::atomic<int64_t> calls{0};
  share_out(
      int64_t{1} << 40, 3, late,
      [](int64_t begin, int64_t end, void* context) { *static_cast<std::atomic<int64_t>*>(context) += end - begin; },
      &calls);
  CHECK(calls == int64_t{1} << 40);

  CHECK(within_l2(1 << 20) <= 1 << 20 && within_l2(1 << 20) >= 1 << 18);

  void* a = thread_scratch(0, 100);
  void* b = thread_scratch(1, 100);
  CHECK(a != nullptr && b != nullptr && a != b);
  CHECK(reinterpret_cast<uintptr_t>(a) % 64 == 0);
  CHECK(thread_scratch(0, 50) == a);
  std::memset(thread_scratch(0, 1 << 20), 1, 1 << 20);
  std::thread([&] { CHECK(thread_scratch(1, 10) != b); }).join();

  for (int64_t rows : {1, 15, 16, 250, 240000})
    for (int64_t batch : {1, 3}) {
      const int64_t tile = tile_rows(rows, batch, 128, 16);
      CHECK(tile % 16 == 0 && tile >= 16 && tile <= 128);
    }

  for (int64_t columns : {1, 16, 48, 49, 64, 96, 100, 1536}) {
    int64_t next = 0;
    for (int64_t i = 0; i < panel_count(columns); ++i) {
      const int64_t begin = panel_begin(columns, i), end = panel_begin(columns, i + 1);
      CHECK(begin == next && end > begin && end - begin <= kMaxPanelWidth && end % kColumnUnit == 0);
      next = end;
    }
    CHECK(next == round_up(columns, kColumnUnit));
  }

  CHECK(conv_output_steps(10, 7, 1, 1, 3, 3) == 10);
  CHECK(conv_output_steps(10, 7, 1, 3, 0, 0) == 0);
  CHECK(conv_output_steps(0, 7, 1, 1, 3, 3) == 0);
  CHECK(conv_output_steps(40, 8, 4, 1, 2, 2) == 10);

  // Every tap of an upsampling is read by exactly one frame of each phase (repeat), or by one phase in all
  // (transposed).
  for (UpsampleMode mode : {UpsampleMode::kRepeat, UpsampleMode::kTransposed})
    for (int64_t stride : {1, 2, 3, 5, 8})
      for (int64_t left : {int64_t{0}, (stride + 1) / 2, 2 * stride - 1}) {
        const UpsamplePhases phases{mode, stride, left, left};
        int64_t used = 0;
        for (int64_t p = 0; p < stride; ++p)
          for (int64_t k = 0; k < 2 * stride; ++k) {
            const int64_t frame = phases.frame_of_tap(p, k);
            CHECK(frame < phases.taps(p));
            used += frame >= 0;
          }
        CHECK(used == (mode == UpsampleMode::kRepeat ? 2 * stride * stride : 2 * stride));
      }

  CHECK(isa_compiled(Isa::kGeneric) && isa_detected(Isa::kGeneric));
  CHECK(set_active_isa(Isa::kGeneric) && active_isa() == Isa::kGeneric);
  std::puts("runtime: passed");
  return 0;
}
