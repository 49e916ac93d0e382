// y[b, q S + p, n] = finish(sum over taps j and channels c of act(x[b, time(q, j, c), c]) W[p, j, c, n]): every
// convolution, upsampling and linear layer as one implicit GEMM. A block owns kRows rows (time steps of one clip, or
// all the steps of several short ones) by kColumns columns of one phase; it walks the channels in steps of 32 and,
// inside a step, the taps, which are row offsets into one tile of snaked rows in shared memory. float32 sums. Rows of x
// are copied 16 bytes at a time where its layout allows it (Params::vectors), else value by value.
#pragma once
#include "conv_finish.cuh"
#include "gemm_tile.cuh"
#include "launch.cuh"

namespace dcx {

template <class Tile, int kRows, int kColumns, int kStages, bool kRanged, int kBlocks>
struct ConvGemm {
  using Params = ConvGemmParams;
  using T = typename Tile::Element;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kMinBlocks = kBlocks;
  static constexpr bool kNeedsSm80 = Tile::kNeedsSm80;
  static constexpr int kTileRows = kRows, kTileColumns = kColumns, kDepthStages = kStages;
  static constexpr bool kHasRanges = kRanged;
  static constexpr int kVector = Vector16<T>::kCount;
  static constexpr int kRowVectors = kDepth / kVector;
  static constexpr int kRowLd = kRowPitch<T>, kWeightLd = kWeightPitch<kColumns>, kSumLd = kSumPitch<kColumns>;
  static_assert(kThreads % kRowVectors == 0, "a thread keeps its channels from row to row");

  static int64_t smem_bytes(const Params& p) {
    const int64_t tiles = p.row_buffers * p.segment * p.tile_items * kRowLd + kStages * kDepth * kWeightLd;
    const int64_t sums = int64_t{kRows} * kSumLd * 4 + 16;
    return maximum(tiles * static_cast<int64_t>(sizeof(T)), sums);
  }

  // Where this block stands, and how it walks the reduction.
  struct Place : ConvPlace {
    int begin, end, chunk_begin;
    const T* weight;
  };

  static DCX_DEVICE Place place(const Params& p) {
    Place at{conv_place<kColumns>(p), 0, 0, 0, nullptr};
    at.weight = static_cast<const T*>(p.weight) + at.weight_rows * p.columns_padded + at.column;
    const int chunks = static_cast<int>(p.channels_padded / kDepth);
    const int range = p.spread ? static_cast<int>(block_z()) : 0;
    at.chunk_begin = chunks * range / p.ranges;
    at.begin = at.chunk_begin * at.taps;
    at.end = (p.spread ? chunks * (range + 1) / p.ranges : chunks) * at.taps;
    return at;
  }

  static DCX_DEVICE void load_weights(const Params& p, const Place& at, int step, T* to) {
    const int chunk = step / at.taps, tap = step - chunk * at.taps;
    const T* from = at.weight + (tap * p.channels_padded + chunk * kDepth) * p.columns_padded;
    constexpr int kPerRow = kColumns / kVector;
    const int64_t left = p.columns_padded - at.column;
    for (int i = thread_index(); i < kDepth * kPerRow; i += kThreads) {
      const int k = i / kPerRow, n = i % kPerRow * kVector;
      const bool valid = n < left;
      cp_async16(to + k * kWeightLd + n, valid ? from + k * p.columns_padded + n : from, valid);
    }
  }

  // The rows of one chunk of channels, for all taps or for one.
  static DCX_DEVICE void load_rows(const Params& p, const Place& at, int step, T* to) {
    const int chunk = step / at.taps, tap = step - chunk * at.taps;
    const int64_t base = at.row * p.row_scale + at.first + (p.per_tap ? tap * p.dilation : 0);
    const int rows = static_cast<int>(p.segment * p.tile_items);
    const T* x = static_cast<const T*>(p.x.data);
    const int kept = thread_index() % (p.vectors ? kRowVectors : kDepth) * (p.vectors ? kVector : 1);
    const int64_t wide = int64_t{chunk} * kDepth + kept;  // channel of the GEMM row
    const int64_t later = p.channels == p.in_channels ? 0 : wide / p.in_channels;
    const int64_t channel = wide - later * p.in_channels;
    const int per_row = p.vectors ? kRowVectors : kDepth;
    for (int i = thread_index(); i < rows * per_row; i += kThreads) {
      const int row = i / per_row;
      const int item = p.tile_items == 1 ? 0 : row / static_cast<int>(p.segment);
      const int64_t b = at.clip + item;
      const int64_t t = (base + row - item * p.segment) * p.row_step - p.pad_left + later;
      const bool valid =
          b < p.batch && wide < p.channels && t >= 0 && t < (p.op_in_steps > 0 ? p.in_steps : conv_in_valid(p, b));
      T* cell = to + row * kRowLd + kept;
      const T* source = x + (valid ? b * p.x.stride_b + t * p.x.stride_t + channel * p.x.stride_c : 0);
      if (p.vectors) {
        cp_async16(cell, source, valid);
      } else {
        float value = valid ? to_float(*source) : 0.0f;
        if (p.alpha != nullptr && valid) value = snake_as<T>(value, p.alpha[channel], snake_inverse(p.alpha[channel]));
        *cell = from_float<T>(value);
      }
    }
  }

  // Snake on the values that this thread has copied, in place.
  static DCX_DEVICE void snake_rows(const Params& p, int chunk, T* rows) {
    const int kept = thread_index() % kRowVectors * kVector;
    const int64_t wide = int64_t{chunk} * kDepth + kept;
    if (wide >= p.channels) return;
    const int64_t channel = p.channels == p.in_channels ? wide : wide % p.in_channels;
    float alpha[kVector], inverse[kVector];
    DCX_UNROLL
    for (int i = 0; i < kVector; ++i) {
      alpha[i] = p.alpha[channel + i];
      inverse[i] = snake_inverse(alpha[i]);
    }
    const int count = static_cast<int>(p.segment * p.tile_items);
    DCX_NO_UNROLL
    for (int row = thread_index() / kRowVectors; row < count; row += kThreads / kRowVectors) {
      auto* cell = reinterpret_cast<Vector16<T>*>(rows + row * kRowLd + kept);
      Vector16<T> values = *cell;
      DCX_UNROLL
      for (int i = 0; i < kVector; ++i)
        values.values[i] = from_float<T>(snake_as<T>(to_float(values.values[i]), alpha[i], inverse[i]));
      *cell = values;
    }
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    const Place at = place(p);
    const int64_t row_elements = p.segment * p.tile_items * kRowLd;
    T* rows = reinterpret_cast<T*>(smem);
    T* weights = rows + p.row_buffers * row_elements;
    int offsets[Tile::kRowPointers];
    DCX_UNROLL
    for (int i = 0; i < Tile::kRowPointers; ++i) {
      const int m = Tile::pointer_row(i);
      const int item = m / static_cast<int>(p.tile_rows), row = m % static_cast<int>(p.tile_rows);
      offsets[i] =
          item < p.tile_items ? static_cast<int>(item * p.segment + row * p.row_scale) * kRowLd : 0;  // else unused
    }
    float sums[Tile::kSums], total[Tile::kSums];
    DCX_UNROLL
    for (int i = 0; i < Tile::kSums; ++i) sums[i] = total[i] = 0.0f;

    const int taps_per_group = p.per_tap ? 1 : at.taps;
    const auto row_buffer = [&](int step) {
      const int group = (step - at.begin) / taps_per_group;
      return rows + group % p.row_buffers * row_elements;
    };
    const auto issue = [&](int step) {
      if (step < at.end) {
        load_weights(p, at, step, weights + (step - at.begin) % kStages * (kDepth * kWeightLd));
        if ((step - at.begin) % taps_per_group == 0) load_rows(p, at, step, row_buffer(step));
      }
      cp_async_commit();
    };
    for (int i = 0; i < kStages - 1; ++i) issue(at.begin + i);

    const int chunks = static_cast<int>(p.channels_padded / kDepth);
    int range = 0;
    int range_end = kRanged && !p.spread ? chunks / p.ranges * at.taps : at.end;
    DCX_NO_UNROLL
    for (int step = at.begin; step < at.end; ++step) {
      const int tap = step % at.taps;
      T* tile = row_buffer(step);
      cp_async_wait<kStages - 2>();
      if (p.alpha != nullptr && p.vectors && (tap == 0 || p.per_tap)) snake_rows(p, step / at.taps, tile);
      sync_threads();
      issue(step + kStages - 1);
      Tile::step(sums, tile + (p.per_tap ? 0 : static_cast<int>(tap * p.dilation) * kRowLd), offsets,
                 weights + (step - at.begin) % kStages * (kDepth * kWeightLd));
      if constexpr (kRanged || Tile::kFlushSteps > 0) {
        const bool flush = Tile::kFlushSteps > 0 && (step - at.begin + 1) % maximum(1, Tile::kFlushSteps) == 0;
        if (flush || step + 1 == range_end) {
          DCX_UNROLL
          for (int i = 0; i < Tile::kSums; ++i) {
            total[i] += sums[i];
            sums[i] = 0.0f;
          }
          if (kRanged && step + 1 == range_end) {
            ++range;
            range_end = chunks * (range + 1) / p.ranges * at.taps;
          }
        }
      }
    }
    if constexpr (!kRanged && Tile::kFlushSteps == 0) {
      DCX_UNROLL
      for (int i = 0; i < Tile::kSums; ++i) total[i] += sums[i];
    }
    cp_async_wait<0>();
    sync_threads();  // the tiles' memory is free
    float* shared_sums = reinterpret_cast<float*>(smem);
    if constexpr (kRanged) {
      uint32_t* flag = reinterpret_cast<uint32_t*>(shared_sums + kRows * kSumLd);
      if (p.spread && !gather_ranges<kThreads>(p, total, flag)) return;
    }
    Tile::store(total, shared_sums);
    sync_threads();
    ConvFinish<T, kRows, kColumns, kThreads, kSumLd>::run(p, at, shared_sums, 0, kRows);
  }
};

}  // namespace dcx
