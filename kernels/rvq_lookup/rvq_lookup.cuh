// y[b, :, f] = sum over stages i < q of V_i row_i(codes[b, i, f]) + b_i, plus addend[b, :, f]. A block owns kFrames
// frames and kThreads columns, a thread one column: it walks the stages' weights, which lie side by side over the
// threads, against the frames' rows in shared memory. float32 sums, a stage at a time. A code out of range is never
// followed: row 0 stands in, its frame is NaN, and the lowest flat position of such codes goes to *error.
#pragma once
#include "../common/launch.cuh"
#include "../rvq_search/rvq_device.cuh"
#include "params.h"

namespace dcx {

template <int kDim, int kFrames>
struct RvqLookup {
  using Params = RvqLookupParams;
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 4;
  static constexpr bool kNeedsSm80 = false;
  static constexpr int kPitch = kFramePitch<kFrames>;

  static int64_t smem_bytes(const Params& p) {
    return static_cast<int64_t>(sizeof(FrameTile<kFrames>)) +
           (round_up(p.used * p.layout.dim * kFrames, 4) + kThreads * kPitch) * 4;
  }

  // rows: [used D][kFrames].
  static DCX_DEVICE void gather(const Params& p, FrameTile<kFrames>& tile, bool tells, float* rows) {
    const int dim = kDim > 0 ? kDim : static_cast<int>(p.layout.dim);
    const float* table = static_cast<const float*>(p.packed) + p.layout.rows();
    const int64_t items = p.used * kFrames * dim;
    for (int64_t i = thread_index(); i < items; i += kThreads) {
      const int d = static_cast<int>(i % dim), f = static_cast<int>(i / dim % kFrames);
      const int64_t stage = i / dim / kFrames;
      float value = 0.0f;
      if (tile.counts[f]) {
        const int64_t position = (tile.clip[f] * p.used + stage) * p.frames + tile.step[f];
        int64_t entry = p.codes[position];
        if (entry < 0 || entry >= p.layout.entries) {
          entry = 0;
          if (d == 0) atomic_add(&tile.broken[f], 1);  // a plain store would be a race, if of equal values
          if (d == 0 && tells) atomic_min(p.error, position);
        }
        value = table[(stage * p.layout.entries + entry) * dim + d];
      }
      rows[(stage * dim + d) * kFrames + f] = value;
    }
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    auto& tile = *reinterpret_cast<FrameTile<kFrames>*>(smem);
    float* rows = reinterpret_cast<float*>(smem + sizeof(FrameTile<kFrames>));
    float* staged = rows + round_up(p.used * p.layout.dim * kFrames, 4);
    const int64_t column_tiles = ceil_div(p.layout.channels, kThreads);
    const int64_t first = block_x() % column_tiles * kThreads;
    const int count = static_cast<int>(minimum(int64_t{kThreads}, p.layout.channels - first));
    tile.fill(block_x() / column_tiles * kFrames, p.batch, p.frames, p.lengths);
    sync_threads();
    gather(p, tile, p.error != nullptr && first == 0, rows);
    sync_threads();
    if (thread_index() < count) {
      float sums[kFrames];
      project_out<kDim>(sums, static_cast<const float*>(p.packed), p.layout, p.used, rows, first + thread_index());
      store_frames(staged + thread_index() * kPitch, sums);
    }
    sync_threads();
    store_columns<kFrames, kThreads>(p.y, p.addend, tile, staged, first, count);
  }
};

template <int kDim, int kFrames>
bool start_rvq_lookup(const CudaContext& context, const RvqLookupParams& p) {
  using K = RvqLookup<kDim, kFrames>;
  const int64_t bytes = K::smem_bytes(p);
  if (bytes > context.shared_bytes) return false;
  const int64_t tiles = ceil_div(p.batch * p.frames, kFrames) * ceil_div(p.layout.channels, K::kThreads);
  launch<K>(context, p, Grid{tiles, 1, 1}, bytes);
  return true;
}

// The tile decides who computes a frame, never how.
inline void start_rvq_lookup_of(const CudaContext& context, const RvqLookupParams& p) {
  const bool few = p.batch * p.frames <= 16;
  const bool started = p.layout.dim == 8
                           ? (!few && start_rvq_lookup<8, 16>(context, p)) || start_rvq_lookup<8, 1>(context, p)
                           : (!few && start_rvq_lookup<0, 16>(context, p)) || start_rvq_lookup<0, 1>(context, p);
  if (!started)
    throw std::runtime_error("rvq_lookup: so many code dimensions need more shared memory than this GPU has");
}

}  // namespace dcx
