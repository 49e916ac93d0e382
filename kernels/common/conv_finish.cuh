// What the tiles of conv_gemm.cuh and conv_wgmma.cuh share: valid lengths, adding up ranges, and the way from sums in
// shared memory to y.
#pragma once
#include <math.h>

#include "conv_gemm_params.h"
#include "conv_shape.h"
#include "device.cuh"
#include "snake_device.cuh"

namespace dcx {

DCX_DEVICE float finish_activation(float value, Activation activation) {
  if (activation == Activation::kTanh) return tanhf(value);
  if (activation == Activation::kGelu) return 0.5f * value * (1.0f + erff(value * 0.70710678118654752f));
  return value;
}

// Input steps of clip b that count, in what lengths counts.
DCX_DEVICE int64_t conv_in_valid(const ConvGemmParams& p, int64_t b) {
  const int64_t steps = p.op_in_steps > 0 ? p.op_in_steps : p.in_steps;
  return p.lengths != nullptr ? maximum(int64_t{0}, minimum(p.lengths[b], steps)) : steps;
}
DCX_DEVICE int64_t conv_out_valid(const ConvGemmParams& p, int64_t b) {
  if (p.lengths == nullptr) return p.out_steps;
  const int64_t steps = conv_in_valid(p, b);
  return p.phases.stride > 0
             ? p.phases.output_steps(steps)
             : conv_output_steps(steps, p.conv_taps, p.conv_stride, p.conv_dilation, p.conv_left, p.conv_right);
}

// Where a block stands.
struct ConvPlace {
  int64_t clip, row, column;  // first of the tile
  int64_t phase, first;       // first: the phase's first tap
  int64_t weight_rows;        // of all channels, in front of the phase's taps
  int taps;
  int columns;  // of the phase, or of all phases that stand side by side, from this one on
};

// Rows of the tile, from its number among the tiles of one column.
DCX_DEVICE void place_rows(const ConvGemmParams& p, int tile_row, ConvPlace& at) {
  const int row_tiles = static_cast<int>(p.row_tiles);
  at.clip = tile_row / row_tiles * p.tile_items;
  at.row = tile_row % row_tiles * p.tile_rows;
}

template <int kColumns>
DCX_DEVICE ConvPlace conv_place(const ConvGemmParams& p) {
  ConvPlace at;
  const int phases = p.phases.stride > 0 ? static_cast<int>(p.phases.stride) : 1;
  const int across = static_cast<int>(p.column_tiles) * phases;
  const int block = static_cast<int>(block_x()), tile_column = block % across;
  place_rows(p, block / across, at);
  at.phase = tile_column / static_cast<int>(p.column_tiles);
  at.column = tile_column % static_cast<int>(p.column_tiles) * kColumns;
  at.first = 0;
  at.taps = static_cast<int>(p.taps);
  int64_t tap = 0;
  if (p.phases.stride > 0) {
    at.first = p.phases.first(at.phase);
    at.taps = static_cast<int>(p.phases.taps(at.phase));
    for (int64_t i = 0; i < at.phase; ++i) tap += p.phases.taps(i);
  }
  at.weight_rows = tap * p.channels_padded;
  at.columns = static_cast<int>(p.columns);
  return at;
}

// The same where the phases of a run stand side by side.
template <int kColumns>
DCX_DEVICE ConvPlace run_place(const ConvGemmParams& p) {
  ConvPlace at;
  const int across = static_cast<int>(p.column_tiles), block = static_cast<int>(block_x());
  const int tile_column = block % across;
  place_rows(p, block / across, at);
  int run = 0;
  while (run + 1 < p.run_count && tile_column >= p.runs[run + 1].tile) ++run;
  at.column = (tile_column - p.runs[run].tile) * kColumns;
  at.phase = p.runs[run].phase;
  at.first = p.runs[run].first;
  at.taps = p.runs[run].taps;
  at.weight_rows = p.runs[run].weight_taps * p.channels_padded;
  at.columns = p.runs[run].phases * static_cast<int>(p.step_columns);
  return at;
}

// Adds up the ranges' sums in order, in the block that comes last; false: not this one.
template <int kThreads, int kSums>
DCX_DEVICE bool gather_ranges(const ConvGemmParams& p, float (&total)[kSums], uint32_t* flag) {
  constexpr int64_t kStride = int64_t{kSums} * kThreads;
  float* own = p.partial + (block_x() * p.ranges + block_z()) * kStride + thread_index();
  DCX_UNROLL
  for (int i = 0; i < kSums; ++i) own[i * kThreads] = total[i];
  thread_fence();
  sync_threads();
  if (thread_index() == 0) *flag = atomic_count(p.counters + block_x(), static_cast<uint32_t>(p.ranges - 1));
  sync_threads();
  if (*flag != static_cast<uint32_t>(p.ranges - 1)) return false;
  thread_fence();
  DCX_UNROLL
  for (int i = 0; i < kSums; ++i) total[i] = 0.0f;
  DCX_NO_UNROLL
  for (int range = 0; range < p.ranges; ++range) {
    const float* from = p.partial + (block_x() * p.ranges + range) * kStride + thread_index();
    DCX_UNROLL
    for (int i = 0; i < kSums; ++i) total[i] += load_coherent(from + i * kThreads);
  }
  return true;
}

// Bias, activation, Snake, residual, rounding, and the store, 16 bytes of a row at a time; sums lie kLd floats apart.
// A thread keeps its columns from row to row; threads past the last whole row of vectors rest.
template <class T, int kRows, int kColumns, int kThreads, int kLd>
DCX_DEVICE void conv_finish(const ConvGemmParams& p, const ConvPlace& at, const float* sums) {
  constexpr int kVector = Vector16<T>::kCount, kPerRow = kColumns / kVector, kRowsAtOnce = kThreads / kPerRow;
  static_assert(kLd % 4 == 0 && kRowsAtOnce > 0, "vectors of a row lie on 16 bytes");
  const int offset = thread_index() % kPerRow * kVector, wide = static_cast<int>(at.column) + offset;
  if (thread_index() >= kRowsAtOnce * kPerRow || wide >= at.columns) return;
  const int columns = static_cast<int>(p.step_columns), beside = wide / columns, column = wide - beside * columns;
  const int64_t phase = at.phase + beside;
  const T* residual = static_cast<const T*>(p.residual.data);
  float bias[kVector], alpha[kVector], inverse[kVector];
  DCX_UNROLL
  for (int v = 0; v < kVector; ++v) {
    const bool valid = column + v < columns;
    bias[v] = valid && p.bias != nullptr ? p.bias[column + v] : 0.0f;
    alpha[v] = valid && p.out_alpha != nullptr ? p.out_alpha[column + v] : 0.0f;
    inverse[v] = snake_inverse(alpha[v]);
  }
  const int stride = p.phases.stride > 0 ? static_cast<int>(p.phases.stride) : 1;
  const int tile_rows = static_cast<int>(p.tile_rows);
  DCX_NO_UNROLL
  for (int row = thread_index() / kPerRow; row < kRows; row += kRowsAtOnce) {
    const int item = p.tile_items == 1 ? 0 : row / tile_rows;
    const int64_t b = at.clip + item, q = at.row + row - item * tile_rows, t = q * stride + phase;
    if (item >= p.tile_items || b >= p.batch || row - item * tile_rows >= tile_rows || q >= p.rows || t >= p.out_steps)
      continue;
    const bool counts = t < conv_out_valid(p, b);
    const int64_t source = t + p.residual_shift;
    const bool adds =
        residual != nullptr && counts && (p.residual_valid == 0 || (source >= 0 && source < conv_in_valid(p, b)));
    float values[kVector];
    DCX_UNROLL
    for (int v = 0; v < kVector; v += 4) {
      const auto four = *reinterpret_cast<const Vector16<float>*>(sums + row * kLd + offset + v);
      DCX_UNROLL
      for (int i = 0; i < 4; ++i) values[v + i] = counts ? four.values[i] + bias[v + i] : 0.0f;
    }
    if (counts && p.activation != Activation::kNone) {
      DCX_UNROLL
      for (int v = 0; v < kVector; ++v) values[v] = finish_activation(values[v], p.activation);
    }
    if (counts && p.out_alpha != nullptr) {
      DCX_UNROLL
      for (int v = 0; v < kVector; ++v) values[v] = snake_as<T>(values[v], alpha[v], inverse[v]);
    }
    if (adds) {
      const T* extra = residual + b * p.residual.stride_b + source * p.residual.stride_t + column * p.residual.stride_c;
      if (p.vector_residual) {
        const auto more = *reinterpret_cast<const Vector16<T>*>(extra);
        DCX_UNROLL
        for (int v = 0; v < kVector; ++v) values[v] += to_float(more.values[v]);
      } else {
        DCX_UNROLL
        for (int v = 0; v < kVector; ++v)
          if (column + v < columns) values[v] += to_float(extra[v * p.residual.stride_c]);
      }
    }
    T* to = static_cast<T*>(const_cast<void*>(p.y.data)) + b * p.y.stride_b + t * p.y.stride_t + column * p.y.stride_c;
    Vector16<T> out;
    DCX_UNROLL
    for (int v = 0; v < kVector; ++v) out.values[v] = from_float<T>(values[v]);
    if (p.vector_store) {
      *reinterpret_cast<Vector16<T>*>(to) = out;
    } else {
      DCX_UNROLL
      for (int v = 0; v < kVector; ++v)
        if (column + v < columns) to[v * p.y.stride_c] = out.values[v];
    }
  }
}

}  // namespace dcx
