// Copies codes to where a recording reads them, and looks at each on its way: README.md. A thread copies up to kAtOnce
// codes, kThreads apart.
#pragma once
#include "../common/launch.cuh"
#include "params.h"

namespace dcx {

struct TakeCodes {
  using Params = TakeCodesParams;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr bool kNeedsSm80 = false;
  static constexpr int kAtOnce = 2;  // loads of a thread under way
  static constexpr int kBlockCodes = kThreads * kAtOnce;

  static DCX_DEVICE void run(const Params& p, unsigned char*) {
    const uint32_t first = static_cast<uint32_t>(p.parts[0].count),
                   all = first + static_cast<uint32_t>(p.parts[1].count);
    const uint32_t frames = static_cast<uint32_t>(p.frames);
    const uint32_t begin = static_cast<uint32_t>(block_x()) * kBlockCodes + static_cast<uint32_t>(thread_index());
    int64_t codes[kAtOnce], *to[kAtOnce];
    bool wrong = false;
    DCX_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      uint32_t i = begin + static_cast<uint32_t>(k * kThreads);
      to[k] = nullptr;
      if (i >= all) continue;
      const CodesTaken& part = p.parts[i < first ? 0 : 1];
      if (i >= first) i -= first;
      const uint32_t row = i / frames, f = i - row * frames, stages = static_cast<uint32_t>(part.stages);
      const uint32_t b = row / stages, q = row - b * stages;
      codes[k] = part.from[b * part.stride_b + q * part.stride_q + f * part.stride_f];
      to[k] = part.to + row * part.to_frames + f;
      wrong |= codes[k] < 0 || codes[k] >= part.entries;
    }
    DCX_UNROLL
    for (int k = 0; k < kAtOnce; ++k)
      if (to[k] != nullptr) *to[k] = codes[k];
    if (wrong) tell_host(p.wrong, 1);
  }
};

inline void launch_take_codes_of(const CudaContext& context, TakeCodesParams p) {
  int64_t all = 0;
  for (CodesTaken& part : p.parts) all += part.count = p.batch * part.stages * p.frames;
  if (all > INT32_MAX) throw std::runtime_error("take_codes: there may be 2^31 - 1 codes, got " + std::to_string(all));
  launch<TakeCodes>(context, p, Grid{ceil_div(all, int64_t{TakeCodes::kBlockCodes}), 1, 1}, 0);
}

}  // namespace dcx
