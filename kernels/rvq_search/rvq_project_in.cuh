// The projection of a tile's frames for all stages, rvq_search's first step: code[column] = sum over channels of
// W[channel][column] z[channel] + bias[column]. A thread owns four columns of a part of the frames and each splits-th
// channel of a chunk of z in shared memory; chains of at most kChain products in float32, then a tree over the threads
// that share columns. How many share them follows from the layer alone, and so do the bits: 256 threads take a part,
// all the frames where a block has no more threads.
#pragma once
#include "params.h"
#include "rvq_device.cuh"

namespace dcx {

// slots: groups of four columns taken at once, a power of two up to kMostSlots.
template <int kFrames, int kThreads>
struct RvqProjectIn {
  using Four = Vector16<float>;
  static constexpr int kChunk = 512;     // channels of z in shared memory
  static constexpr int kChain = 128;     // channels that one accumulator sums
  static constexpr int kMostSlots = 64;  // at least 4 threads share a column
  static constexpr int kPitch = kFramePitch<kFrames>;
  static constexpr int kPartThreads = 256;
  static constexpr int kOwn = kFrames / (kThreads / kPartThreads);  // frames of a part
  static_assert(kChunk % (kPartThreads / kMostSlots) == 0 && kChain * (kPartThreads / kMostSlots) % kChunk == 0,
                "sums end with a chunk");

  // A block that has a multiprocessor to itself has the next chunk of float32 under way while it sums this one.
  static constexpr bool kAhead = kThreads > kPartThreads;
  static constexpr int kChunkFloats = kChunk * kPitch;
  static_assert(!kAhead || (kFrames == 16 && kThreads / 2 * kOwn * 4 <= kChunkFloats), "copy_chunk's frames; sums fit");

  static constexpr int64_t smem_bytes() {
    constexpr int64_t z = int64_t{kChunkFloats} * (kAhead ? 8 : 4), sums = int64_t{kThreads / 2} * kOwn * 16;
    return z > sums ? z : sums;
  }

  // kChunk channels of every frame from channel c0 on, zeros past the last; lanes run along what lies side by side.
  template <class T>
  static DCX_DEVICE void load_chunk_as(const RvqSearchParams& p, const FrameTile<kFrames>& tile, int64_t c0,
                                       float* to) {
    constexpr int kEach = kChunk * kFrames / kThreads, kBatch = kEach < 8 ? kEach : 8;
    const T* z = static_cast<const T*>(p.z.data);
    const bool along_channels = kFrames > 1 && p.z.stride_c == 1;
    DCX_NO_UNROLL
    for (int first = 0; first < kEach; first += kBatch) {
      float values[kBatch];
      int places[kBatch];
      DCX_UNROLL
      for (int k = 0; k < kBatch; ++k) {
        const int i = (first + k) * kThreads + thread_index();
        const int f = along_channels ? i / 8 % 4 + i / (4 * kChunk) * 4 : i % kFrames;
        const int c = along_channels ? i % 8 + i / 32 % (kChunk / 8) * 8 : i / kFrames;
        places[k] = c * kPitch + f;
        values[k] = 0.0f;
        if (c0 + c < p.layout.channels && tile.counts[f])
          values[k] = to_float(z[tile.offset(p.z, f) + (c0 + c) * p.z.stride_c]);
      }
      DCX_UNROLL
      for (int k = 0; k < kBatch; ++k) to[places[k]] = values[k];
    }
  }
  // The same by copies behind the threads' backs, which the caller commits.
  static DCX_DEVICE void copy_chunk(const RvqSearchParams& p, const FrameTile<kFrames>& tile, int64_t c0, float* to) {
    constexpr int kParts = 4, kRun = kChunk * kFrames / kThreads / kParts;
    const float* z = static_cast<const float*>(p.z.data);
    const int64_t count = p.layout.channels - c0;
    // In a part a thread stays with its frame. Along channels 8 lanes take neighbours of one frame, 4 frames a warp.
    const bool along_channels = p.z.stride_c == 1;
    const int f0 = along_channels ? thread_index() / 8 % 4 : thread_index() % kFrames;
    const int first = along_channels ? thread_index() % 8 + thread_index() / 32 * 8 : thread_index() / kFrames;
    const int step = along_channels ? kThreads / 4 : kThreads / kFrames;
    DCX_NO_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int f = along_channels ? f0 + 4 * part : f0, c = along_channels ? first : first + part * kRun * step;
      const float* from = z + tile.offset(p.z, f) + (c0 + c) * p.z.stride_c;
      const bool counts = tile.counts[f] != 0;
      DCX_UNROLL
      for (int k = 0; k < kRun; ++k) {
        const bool valid = counts && c + k * step < count;
        cp_async4(to + (c + k * step) * kPitch + f, valid ? from + k * step * p.z.stride_c : z, valid);
      }
    }
  }
  static DCX_DEVICE void load_chunk(const RvqSearchParams& p, const FrameTile<kFrames>& tile, int64_t c0, float* to) {
    if (kAhead && p.z.dtype == DType::kF32)
      copy_chunk(p, tile, c0, to);
    else if (p.z.dtype == DType::kF32)
      load_chunk_as<float>(p, tile, c0, to);
    else if (p.z.dtype == DType::kBF16)
      load_chunk_as<bf16>(p, tile, c0, to);
    else
      load_chunk_as<f16>(p, tile, c0, to);
  }

  // Adds up the sums of the threads that share a slot, as a tree, into those of split 0.
  static DCX_DEVICE void add_splits(float (&sums)[4 * kOwn], int slot, int split, int slots, int splits,
                                    Four* partial) {
    for (int half = splits / 2; half >= 1; half /= 2) {
      sync_threads();
      if (split >= half && split < 2 * half) {
        Four* own = partial + (split - half) * slots + slot;
        DCX_UNROLL
        for (int i = 0; i < kOwn; ++i)
          own[i * (kPartThreads / 2)] = Four{{sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]}};
      }
      sync_threads();
      if (split < half) {
        const Four* other = partial + split * slots + slot;
        DCX_UNROLL
        for (int i = 0; i < kOwn; ++i) {
          const Four four = other[i * (kPartThreads / 2)];
          DCX_UNROLL
          for (int k = 0; k < 4; ++k) sums[4 * i + k] += four.values[k];
        }
      }
    }
  }

  // code = W z + bias, [round_up(used D, 4)][kFrames]. work: smem_bytes() of shared memory. The caller puts a barrier
  // behind it.
  static DCX_DEVICE void run(const RvqSearchParams& p, int slots, const FrameTile<kFrames>& tile, float* work,
                             float* code) {
    const RvqLayout& layout = p.layout;
    const float* packed = static_cast<const float*>(p.packed);
    const int part = kOwn < kFrames ? thread_index() / kPartThreads : 0;
    const int splits = kPartThreads / slots, slot = thread_index() % slots;
    const int split = (thread_index() - part * kPartThreads) / slots;
    const int64_t columns = layout.stages * layout.dim, groups = ceil_div(p.used * layout.dim, 4);
    const int64_t block = int64_t{kChain} * splits;  // channels that are summed before they are added to code
    for (int64_t group = slot; group - slot < groups; group += slots) {
      const bool mine = group < groups;
      const int64_t column = mine ? 4 * group : 0;
      const int64_t panel = panel_of(columns, column), begin = panel_begin(columns, panel);
      const int64_t width = panel_begin(columns, panel + 1) - begin;
      const float* weight = packed + layout.in_panels() + begin * layout.channels + (column - begin);
      float sums[4 * kOwn];  // [4 columns][kOwn]
      if constexpr (kAhead) {
        sync_threads();  // the tile stands, or the groups before are done with work
        load_chunk(p, tile, 0, work);
        cp_async_commit();
      }
      DCX_NO_UNROLL
      for (int64_t c0 = 0; c0 < layout.channels; c0 += kChunk) {
        if (c0 % block == 0) {
          DCX_UNROLL
          for (int i = 0; i < 4 * kOwn; ++i) sums[i] = 0.0f;
        }
        const int64_t half = kAhead ? c0 / kChunk % 2 : 0;  // of work
        float* chunk = work + half * kChunkFloats;
        sync_threads();
        if constexpr (kAhead) {
          if (c0 + kChunk < layout.channels) load_chunk(p, tile, c0 + kChunk, work + (1 - half) * kChunkFloats);
          cp_async_commit();
          cp_async_wait<1>();
        } else {
          load_chunk(p, tile, c0, chunk);
        }
        sync_threads();
        const int count = static_cast<int>(minimum(int64_t{kChunk}, layout.channels - c0));
        const auto add = [&](const Four& w, int c) {
          float z[kOwn];
          load_frames(z, chunk + c * kPitch + part * kOwn);
          DCX_UNROLL
          for (int k = 0; k < 4; ++k) DCX_UNROLL
          for (int f = 0; f < kOwn; ++f) sums[k * kOwn + f] = fused_multiply_add(w.values[k], z[f], sums[k * kOwn + f]);
        };
        if (mine) {
          constexpr int kAtOnce = 4;
          int c = split;
          const auto weight_of = [&](int at) { return *reinterpret_cast<const Four*>(weight + (c0 + at) * width); };
          DCX_NO_UNROLL
          for (; c + (kAtOnce - 1) * splits < count; c += kAtOnce * splits) {
            Four w[kAtOnce];
            DCX_UNROLL
            for (int k = 0; k < kAtOnce; ++k) w[k] = weight_of(c + k * splits);
            DCX_UNROLL
            for (int k = 0; k < kAtOnce; ++k) add(w[k], c + k * splits);
          }
          DCX_NO_UNROLL
          for (; c < count; c += splits) add(weight_of(c), c);
        }
        const bool last = c0 + kChunk >= layout.channels;
        if (!last && (c0 + kChunk) % block != 0) continue;
        add_splits(sums, slot, split, slots, splits, reinterpret_cast<Four*>(chunk) + part * (kPartThreads / 2 * kOwn));
        if (split != 0 || !mine) continue;
        DCX_UNROLL
        for (int i = 0; i < 4 * kOwn; ++i) {
          float* cell = code + (column + i / kOwn) * kFrames + part * kOwn + i % kOwn;
          float value = c0 < block ? sums[i] : *cell + sums[i];
          if (last) value += packed[layout.in_bias() + column + i / kOwn];
          *cell = value;
        }
      }
    }
  }
};

}  // namespace dcx
