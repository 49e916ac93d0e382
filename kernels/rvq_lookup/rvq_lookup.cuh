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
  static constexpr bool kNeedsSm80 = false, kWaitsItself = true;
  static constexpr int kPitch = kFramePitch<kFrames>;

  static int64_t smem_bytes(const Params& p) {
    return static_cast<int64_t>(sizeof(FrameTile<kFrames>)) +
           (round_up(p.used * p.layout.dim * kFrames, 4) + maximum(int64_t{kThreads} * kPitch, p.used * kFrames)) * 4;
  }

  // entries: [used][kFrames], of frames that count; a code out of range is told of once.
  static DCX_DEVICE void take_codes(const Params& p, FrameTile<kFrames>& tile, bool tells, int32_t* entries) {
    const int count = static_cast<int>(p.used) * kFrames;
    for (int i = thread_index(); i < count; i += kThreads) {
      const int f = i % kFrames, stage = i / kFrames;
      if (!tile.counts[f]) continue;
      const int64_t position = (tile.clip[f] * p.used + stage) * p.frames + tile.step[f];
      int64_t entry = p.codes[position];
      if (entry < 0 || entry >= p.layout.entries) {
        entry = 0;
        atomic_add(&tile.broken[f], 1);  // a plain store would be a race, if of equal values
        if (tells) atomic_min(p.error, position);
      }
      entries[i] = static_cast<int32_t>(entry);
    }
  }

  // rows: [used D][kFrames].
  static DCX_DEVICE void gather(const Params& p, const FrameTile<kFrames>& tile, const int32_t* entries, float* rows) {
    const int dim = kDim > 0 ? kDim : static_cast<int>(p.layout.dim);
    const float* table = static_cast<const float*>(p.packed) + p.layout.rows();
    const int items = static_cast<int>(p.used) * kFrames * dim;
    DCX_UNROLL_BY_4
    for (int i = thread_index(); i < items; i += kThreads) {
      const int d = i % dim, cell = i / dim, f = cell % kFrames, stage = cell / kFrames;
      rows[(stage * dim + d) * kFrames + f] =
          tile.counts[f] ? table[(stage * p.layout.entries + entries[cell]) * dim + d] : 0.0f;
    }
  }

  // One frame, as a stream has it: its time is that of ways to memory, one behind the other. So the weights' way to L2
  // is behind them when the kernel in front ends; then theirs to registers, the addend's and the codes' are one, and
  // the codebooks' rows another.
  static DCX_DEVICE void run_frame(const Params& p, unsigned char* smem) {
    constexpr int kEarly = 8;  // stages whose weights have registers
    const float* packed = static_cast<const float*>(p.packed);
    float* rows = reinterpret_cast<float*>(smem + sizeof(FrameTile<1>));
    uint32_t& broken = reinterpret_cast<FrameTile<1>*>(smem)->broken[0];
    const int64_t column_tiles = ceil_div(p.layout.channels, kThreads), frame = block_x() / column_tiles;
    const int64_t column = block_x() % column_tiles * kThreads + thread_index();
    const int64_t clip = frame / p.frames, step = frame % p.frames;
    const int used = static_cast<int>(p.used), items = used * kDim;
    const bool there = column < p.layout.channels;
    const ColumnWeights own = column_weights<kDim>(packed, p.layout, p.used, there ? column : 0);
    for (int i = thread_index() % kWarp; i < items; i += kWarp) prefetch_l2(own.weight + i * own.width);
    prefetch_l2(own.bias);
    if (thread_index() == 0) broken = 0;
    sync_threads();
    grid_wait();
    float weights[kEarly][kDim];
    DCX_UNROLL
    for (int stage = 0; stage < kEarly; ++stage) DCX_UNROLL
    for (int d = 0; d < kDim; ++d) weights[stage][d] = stage < used ? own.weight[(stage * kDim + d) * own.width] : 0.0f;
    const float bias = *own.bias;
    const bool counts = p.lengths == nullptr || step < p.lengths[clip], adds = there && p.addend.data != nullptr;
    const float more = adds && counts ? load_as_float(p.addend, clip, step, column) : 0.0f;
    const float* table = packed + p.layout.rows();
    for (int i = thread_index(); i < items; i += kThreads) {
      const int stage = i / kDim, d = i % kDim;
      const int64_t position = (clip * p.used + stage) * p.frames + step;
      int64_t entry = counts ? p.codes[position] : 0;
      if (entry < 0 || entry >= p.layout.entries) {
        entry = 0;
        atomic_add(&broken, 1);
        if (d == 0 && column == thread_index() && p.error != nullptr) atomic_min(p.error, position);
      }
      rows[i] = counts ? table[(stage * p.layout.entries + entry) * kDim + d] : 0.0f;
    }
    sync_threads();
    if (!there) return;
    float sum = 0.0f;
    const auto add_stage = [&](int stage, const auto& weight) {
      float part = 0.0f;
      DCX_UNROLL
      for (int d = 0; d < kDim; ++d) part = fused_multiply_add(weight(d), rows[stage * kDim + d], part);
      sum += part;
    };
    DCX_UNROLL
    for (int stage = 0; stage < kEarly; ++stage)
      if (stage < used) add_stage(stage, [&](int d) { return weights[stage][d]; });
    for (int stage = kEarly; stage < used; ++stage)
      add_stage(stage, [&](int d) { return own.weight[(stage * kDim + d) * own.width]; });
    sum += bias;
    if (adds) sum += more;
    store_float(p.y, clip, step, column, !counts ? 0.0f : broken != 0 ? not_a_number() : sum);
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    if constexpr (kFrames == 1 && kDim > 0) {
      run_frame(p, smem);
    } else {
      grid_wait();
      run_tile(p, smem);
    }
  }

  static DCX_DEVICE void run_tile(const Params& p, unsigned char* smem) {
    auto& tile = *reinterpret_cast<FrameTile<kFrames>*>(smem);
    float* rows = reinterpret_cast<float*>(smem + sizeof(FrameTile<kFrames>));
    float* staged = rows + round_up(p.used * p.layout.dim * kFrames, 4);
    const int64_t column_tiles = ceil_div(p.layout.channels, kThreads);
    const int64_t first = block_x() % column_tiles * kThreads;
    const int count = static_cast<int>(minimum(int64_t{kThreads}, p.layout.channels - first));
    tile.fill(block_x() / column_tiles * kFrames, p.batch, p.frames, p.lengths);
    sync_threads();
    auto* entries = reinterpret_cast<int32_t*>(staged);  // read before the sums come to lie there
    take_codes(p, tile, p.error != nullptr && first == 0, entries);
    sync_threads();
    gather(p, tile, entries, rows);
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
  const int64_t frames = p.batch * p.frames, columns = ceil_div(p.layout.channels, int64_t{128});
  const bool many = ceil_div(frames, int64_t{16}) * columns >= 2 * context.multiprocessors, some = frames > 16;
  const bool started = p.layout.dim == 8
                           ? (some && many && start_rvq_lookup<8, 16>(context, p)) ||
                                 (some && start_rvq_lookup<8, 4>(context, p)) || start_rvq_lookup<8, 1>(context, p)
                           : (some && many && start_rvq_lookup<0, 16>(context, p)) ||
                                 (some && start_rvq_lookup<0, 4>(context, p)) || start_rvq_lookup<0, 1>(context, p);
  if (!started)
    throw std::runtime_error("rvq_lookup: so many code dimensions need more shared memory than this GPU has");
}

}  // namespace dcx
