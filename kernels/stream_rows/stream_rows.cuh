// Copies runs of elements between the rows of two tensors: README.md. A block copies up to kThreads * kAtOnce units of
// one run of one row; runs and where their blocks begin are parameters, which all threads read at one address.
#pragma once
#include "../common/launch.cuh"
#include "params.h"

namespace dcx {

template <class Unit>
struct StreamRows {
  using Params = StreamRowsParams;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr bool kNeedsSm80 = false;
  static constexpr int kAtOnce = 2;  // loads of a thread under way
  static constexpr int kBlockUnits = kThreads * kAtOnce;

  static DCX_DEVICE void run(const Params& p, unsigned char*) {
    const int64_t row = block_x() / p.blocks, block = block_x() % p.blocks;
    if (p.kept == nullptr) {
      if (p.error != nullptr && block_x() == 0 && thread_index() == 0) *p.error = kNoWrongCode;
    } else if (!p.kept[row] || (p.error != nullptr && *p.error != kNoWrongCode)) {
      return;
    }
    int at = 0;
    while (at + 1 < p.run_count && block >= p.runs[at + 1].block) ++at;
    const StreamRun& run = p.runs[at];
    const Unit* source = static_cast<const Unit*>(p.source) + row * p.source_stride + run.source;
    Unit* to = static_cast<Unit*>(p.to) + row * p.to_stride + run.to;
    const int64_t first = (block - run.block) * kBlockUnits + thread_index();
    Unit values[kAtOnce];
    DCX_UNROLL
    for (int k = 0; k < kAtOnce; ++k)
      if (first + k * kThreads < run.count) values[k] = source[first + k * kThreads];
    DCX_UNROLL
    for (int k = 0; k < kAtOnce; ++k)
      if (first + k * kThreads < run.count) to[first + k * kThreads] = values[k];
  }
};

// p counts in units of `bytes`; false where a run begins or ends within one, or a row does not lie on 16 bytes.
template <class Unit>
bool start_stream_rows(const CudaContext& context, StreamRowsParams p, int64_t bytes) {
  using K = StreamRows<Unit>;
  const int64_t size = static_cast<int64_t>(sizeof(Unit));
  bool whole = reinterpret_cast<uintptr_t>(p.to) % sizeof(Unit) == 0 &&
               reinterpret_cast<uintptr_t>(p.source) % sizeof(Unit) == 0;
  const auto convert = [&](int64_t& count) {
    whole = whole && count * bytes % size == 0;
    count = count * bytes / size;
  };
  convert(p.to_stride);
  convert(p.source_stride);
  p.blocks = 0;
  for (int i = 0; i < p.run_count; ++i) {
    StreamRun& run = p.runs[i];
    convert(run.to);
    convert(run.source);
    convert(run.count);
    run.block = p.blocks;
    p.blocks += ceil_div(run.count, int64_t{K::kBlockUnits});
  }
  if (!whole) return false;
  launch<K>(context, p, Grid{p.batch * p.blocks, 1, 1}, 0);
  return true;
}

// 16 bytes at a time where every run allows it.
inline void launch_stream_rows_of(const CudaContext& context, const StreamRowsParams& p, int64_t element_bytes) {
  if (!start_stream_rows<Vector16<uint16_t>>(context, p, element_bytes) &&
      !start_stream_rows<uint16_t>(context, p, element_bytes))
    throw std::runtime_error("stream_rows: elements must lie on 2 bytes");
}

}  // namespace dcx
