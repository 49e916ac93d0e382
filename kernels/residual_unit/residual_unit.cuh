// y[t] = x[t + shift] + b2 + W2 snake2(b1 + sum_k W1_k snake1(x[t - left + k d])) on a GPU, 16-bit, at most 192
// channels. A block owns kRows steps of one clip and all channels: its rows and their reach of 6 d stand in shared
// memory, snaked once; a tap is a row offset; the hidden values and then the residual take the rows' place. Weights
// stream through a ring of kStep channels. A warp owns kRows / kWarpsM x kColumns / kWarpsN sums, float32. Rows of x
// and y move 16 bytes at a time where their layout allows it (vectors, vector_store), else value by value. Wider,
// float32 and far-reaching units are two convolutions by conv_gemm.cuh.
#pragma once
#include "../common/conv_geometry.h"
#include "../common/conv_shape.h"
#include "../common/gemm_tile.cuh"
#include "../common/launch.cuh"
#include "../common/snake_device.cuh"
#include "plan.h"

namespace dcx {

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

template <class T, int kColumns, int kRows, int kWarpsM, int kWarpsN, int kStep, int kBlocks>
struct FusedUnit {
  using Params = FusedUnitParams;
  using Tile = HalfTile<T, kRows, kColumns, kWarpsM, kWarpsN>;
  static constexpr int kThreads = Tile::kThreads;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr int kMinBlocks = 1;  // 64 KB of shared memory hold no more
#else
  static constexpr int kMinBlocks = kBlocks;
#endif
  static constexpr bool kNeedsSm80 = Tile::kNeedsSm80;
  static constexpr int kTileRows = kRows, kTileColumns = kColumns;
  static constexpr int kStages = kColumns <= 48 ? 4 : 3;
  static constexpr int kLd = kWeightPitch<kColumns>;  // of every tile
  static constexpr int kVector = Vector16<T>::kCount, kVectors = kColumns / kVector;
  static constexpr int kChunks = kColumns / kStep;
  static constexpr int kTaps = static_cast<int>(kResidualUnitTaps);
  static_assert(kChunks * kStep == kColumns && kStep % 16 == 0, "a tap is whole steps");
  // Threads past the last whole row of vectors rest, so that a thread keeps its channels from row to row.
  static constexpr int kRowsAtOnce = kThreads / kVectors;

  static int64_t segment(int64_t dilation) {
    return kRows + maximum((kResidualUnitTaps - 1) * dilation, int64_t{kRows});
  }
  static int64_t smem_bytes(int64_t dilation) {
    return (segment(dilation) + kStages * kStep) * kLd * static_cast<int64_t>(sizeof(T)) + kColumns * 16;
  }

  static DCX_DEVICE void load_weights(const Params& p, int step, T* to) {
    const int first = step / kChunks * static_cast<int>(p.channels_padded), within = step % kChunks * kStep;
    const T* from = static_cast<const T*>(p.weight);
    for (int i = thread_index(); i < kStep * kVectors; i += kThreads) {
      const int k = i / kVectors, n = i % kVectors * kVector;
      const bool valid = within + k < p.channels_padded && n < p.columns_padded;
      cp_async16(to + k * kLd + n, valid ? from + (first + within + k) * p.columns_padded + n : from, valid);
    }
  }

  // Rows of x from step `begin` on, zero outside [0, valid); kSnaked: snaked where they are not copied asynchronously.
  template <bool kSnaked>
  static DCX_DEVICE void load_rows(const Params& p, int64_t clip, int64_t begin, int64_t valid, int count, T* to) {
    const T* x = static_cast<const T*>(p.x.data) + clip * p.x.stride_b;
    if (p.vectors) {
      const int channel = thread_index() % kVectors * kVector;
      if (thread_index() >= kRowsAtOnce * kVectors) return;
      for (int row = thread_index() / kVectors; row < count; row += kRowsAtOnce) {
        const int64_t t = begin + row;
        const bool counts = t >= 0 && t < valid && channel < p.channels;
        cp_async16(to + row * kLd + channel, counts ? x + t * p.x.stride_t + channel : x, counts);
      }
      return;
    }
    const bool along_time = p.x.stride_c != 1;  // neighbouring threads read neighbouring values
    DCX_NO_UNROLL
    for (int i = thread_index(); i < count * kColumns; i += kThreads) {
      const int row = along_time ? i % count : i / kColumns, channel = along_time ? i / count : i % kColumns;
      const int64_t t = begin + row;
      float value = 0.0f;
      if (t >= 0 && t < valid && channel < p.channels) {
        value = to_float(x[t * p.x.stride_t + channel * p.x.stride_c]);
        if (kSnaked) value = snake_as<T>(value, p.alpha1[channel], snake_inverse(p.alpha1[channel]));
      }
      to[row * kLd + channel] = from_float<T>(value);
    }
  }

  // Snake on the vectors that this thread has copied, in place.
  static DCX_DEVICE void snake_rows(const Params& p, int count, T* rows) {
    const int channel = thread_index() % kVectors * kVector;
    if (thread_index() >= kRowsAtOnce * kVectors || channel >= p.channels) return;
    float alpha[kVector], inverse[kVector];
    DCX_UNROLL
    for (int i = 0; i < kVector; ++i) {
      alpha[i] = p.alpha1[channel + i];
      inverse[i] = snake_inverse(alpha[i]);
    }
    DCX_NO_UNROLL
    for (int row = thread_index() / kVectors; row < count; row += kRowsAtOnce) {
      auto* cell = reinterpret_cast<Vector16<T>*>(rows + row * kLd + channel);
      Vector16<T> values = *cell;
      DCX_UNROLL
      for (int i = 0; i < kVector; ++i)
        values.values[i] = from_float<T>(snake_as<T>(to_float(values.values[i]), alpha[i], inverse[i]));
      *cell = values;
    }
  }

  // The small vectors: bias1, alpha2, its inverse, bias2, zeros past the channels.
  static DCX_DEVICE void load_vectors(const Params& p, float* to) {
    for (int c = thread_index(); c < kColumns; c += kThreads) {
      const bool valid = c < p.channels;
      const float alpha = valid ? p.alpha2[c] : 0.0f;
      to[c] = valid && p.bias1 != nullptr ? p.bias1[c] : 0.0f;
      to[kColumns + c] = alpha;
      to[2 * kColumns + c] = valid ? snake_inverse(alpha) : 0.0f;
      to[3 * kColumns + c] = valid && p.bias2 != nullptr ? p.bias2[c] : 0.0f;
    }
  }

  // Calls visit(column, then for each pair of sums in it: row, sums) with as few columns' values alive as possible.
  template <class Prepare, class Visit>
  static DCX_DEVICE void each_pair(float (&sums)[Tile::kSums], const Prepare& prepare, const Visit& visit) {
    const int lane = thread_index() % kWarp;
    DCX_UNROLL
    for (int n = 0; n < Tile::kN * 2; ++n) {
      const int column = Tile::first_column() + n * 8 + lane % 4 * 2;
      const auto prepared = prepare(column);
      DCX_UNROLL
      for (int i = 0; i < Tile::kM * 2; ++i) {
        const int row = Tile::first_row() + i / 2 * 16 + i % 2 * 8 + lane / 4;
        const float* pair = sums + (i / 2 * Tile::kN * 2 + n) * 4 + i % 2 * 2;
        visit(row, column, prepared, pair[0], pair[1]);
      }
    }
  }

  static DCX_DEVICE void store_rows(const Params& p, int64_t clip, int64_t begin, int64_t valid, const T* from) {
    T* y = static_cast<T*>(const_cast<void*>(p.y.data)) + clip * p.y.stride_b;
    if (p.vector_store) {
      for (int i = thread_index(); i < kRows * kVectors; i += kThreads) {
        const int row = i / kVectors, channel = i % kVectors * kVector;
        const int64_t t = begin + row;
        if (t >= p.out_steps || channel >= p.channels) continue;
        Vector16<T> values{};
        if (t < valid) values = *reinterpret_cast<const Vector16<T>*>(from + row * kLd + channel);
        *reinterpret_cast<Vector16<T>*>(y + t * p.y.stride_t + channel) = values;
      }
      return;
    }
    const bool along_time = p.y.stride_c != 1;
    DCX_NO_UNROLL
    for (int i = thread_index(); i < kRows * kColumns; i += kThreads) {
      const int row = along_time ? i % kRows : i / kColumns, channel = along_time ? i / kRows : i % kColumns;
      const int64_t t = begin + row;
      if (t < p.out_steps && channel < p.channels)
        y[t * p.y.stride_t + channel * p.y.stride_c] = t < valid ? from[row * kLd + channel] : T{};
    }
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    float* vectors = reinterpret_cast<float*>(smem);
    T* rows = reinterpret_cast<T*>(vectors + 4 * kColumns);
    T* residual = rows + kRows * kLd;  // behind the hidden values, in the input's place
    T* ring = rows + p.segment * kLd;
    const int64_t clip = block_x() / p.row_tiles, begin = block_x() % p.row_tiles * kRows;
    int64_t in_valid = p.in_steps, out_valid = p.out_steps;
    if (p.lengths != nullptr) {
      in_valid = maximum(int64_t{0}, minimum(p.lengths[clip], p.in_steps));
      out_valid = conv_output_steps(in_valid, kTaps, 1, p.dilation, p.pad_left, p.pad_right);
    }
    if (begin >= out_valid) {
      store_rows(p, clip, begin, out_valid, residual);
      return;
    }
    const auto stage = [&](int step) { return ring + step % kStages * (kStep * kLd); };
    const auto issue = [&](int step) {
      if (step < (kTaps + 1) * kChunks) load_weights(p, step, stage(step));
      cp_async_commit();
    };
    const int count = kRows + (kTaps - 1) * static_cast<int>(p.dilation);
    load_rows<true>(p, clip, begin - p.pad_left, in_valid, count, rows);
    cp_async_commit();
    for (int step = 0; step < kStages - 1; ++step) issue(step);
    load_vectors(p, vectors);
    int offsets[Tile::kRowPointers];
    DCX_UNROLL
    for (int i = 0; i < Tile::kRowPointers; ++i) offsets[i] = Tile::pointer_row(i) * kLd;
    float sums[Tile::kSums];
    DCX_UNROLL
    for (int i = 0; i < Tile::kSums; ++i) sums[i] = 0.0f;
    cp_async_wait<kStages - 1>();
    if (p.vectors) snake_rows(p, count, rows);

    const int tap_offset = static_cast<int>(p.dilation) * kLd;
    DCX_NO_UNROLL
    for (int step = 0; step < kTaps * kChunks; ++step) {
      cp_async_wait<kStages - 2>();
      sync_threads();
      issue(step + kStages - 1);
      Tile::template step<kStep>(sums, rows + step / kChunks * tap_offset + step % kChunks * kStep, offsets,
                                 stage(step));
    }
    sync_threads();  // the input's memory is free
    load_rows<false>(p, clip, begin + p.residual_shift, in_valid, kRows, residual);
    struct Column {
      Pair<float> bias, alpha, inverse;
    };
    const auto pair_of = [&](int vector, int column) {
      return *reinterpret_cast<const Pair<float>*>(vectors + vector * kColumns + column);
    };
    each_pair(
        sums, [&](int column) { return Column{pair_of(0, column), pair_of(1, column), pair_of(2, column)}; },
        [&](int row, int column, const Column& at, float low, float high) {
          low = snake_as<T>(low + at.bias.low, at.alpha.low, at.inverse.low);
          high = snake_as<T>(high + at.bias.high, at.alpha.high, at.inverse.high);
          *reinterpret_cast<Pair<T>*>(rows + row * kLd + column) = Pair<T>{from_float<T>(low), from_float<T>(high)};
        });
    DCX_UNROLL
    for (int i = 0; i < Tile::kSums; ++i) sums[i] = 0.0f;
    DCX_NO_UNROLL
    for (int step = kTaps * kChunks; step < (kTaps + 1) * kChunks; ++step) {
      cp_async_wait<kStages - 2>();
      sync_threads();
      issue(step + kStages - 1);
      Tile::template step<kStep>(sums, rows + step % kChunks * kStep, offsets, stage(step));
    }
    cp_async_wait<0>();
    sync_threads();  // the residual is everyone's
    each_pair(
        sums,
        [&](int column) {
          Column at{pair_of(3, column), {}, {}};
          if (p.out_alpha != nullptr && column < p.channels) {
            at.alpha = {p.out_alpha[column], column + 1 < p.channels ? p.out_alpha[column + 1] : 0.0f};
            at.inverse = {snake_inverse(at.alpha.low), snake_inverse(at.alpha.high)};
          }
          return at;
        },
        [&](int row, int column, const Column& at, float low, float high) {
          auto* cell = reinterpret_cast<Pair<T>*>(residual + row * kLd + column);
          low = low + at.bias.low + to_float(cell->low);
          high = high + at.bias.high + to_float(cell->high);
          if (p.out_alpha != nullptr) {
            low = snake_as<T>(to_float(from_float<T>(low)), at.alpha.low, at.inverse.low);
            high = snake_as<T>(to_float(from_float<T>(high)), at.alpha.high, at.inverse.high);
          }
          *cell = Pair<T>{from_float<T>(low), from_float<T>(high)};
        });
    sync_threads();
    store_rows(p, clip, begin, out_valid, residual);
  }
};

}  // namespace dcx
