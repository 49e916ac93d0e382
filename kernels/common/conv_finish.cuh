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

// Adds up rows of sums, in the order of the ranges, each of which a block of the cluster has at the same place as this
// one has at `sums`; rows lie kLd floats apart.
template <int kThreads, int kColumns, int kLd, int kMostRanges>
DCX_DEVICE void add_ranges(const float* sums, float* to, int rows, int ranges) {
  constexpr int kPerRow = kColumns / 4;
  DCX_NO_UNROLL
  for (int i = thread_index(); i < rows * kPerRow; i += kThreads) {
    const int at = i / kPerRow * kLd + i % kPerRow * 4;
    Vector16<float> parts[kMostRanges];
    DCX_UNROLL
    for (int range = 0; range < kMostRanges; ++range)
      if (range < ranges) parts[range] = load_from_block(sums + at, range);
    Vector16<float> total{};
    DCX_UNROLL
    for (int range = 0; range < kMostRanges; ++range) {
      if (range >= ranges) continue;
      DCX_UNROLL
      for (int v = 0; v < 4; ++v) total.values[v] += parts[range].values[v];
    }
    *reinterpret_cast<Vector16<float>*>(to + at) = total;
  }
}

// Where the value of y at `to` goes once it has been through after_alpha's Snake.
template <class T>
DCX_DEVICE T* snaked_of(const ConvGemmParams& p, T* to) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(to) + p.snaked);
}

// What finishing does to a thread's 16 bytes of columns, the same in every row.
template <class T>
struct ConvColumns {
  static constexpr int kVector = Vector16<T>::kCount;
  float bias[kVector], alpha[kVector], inverse[kVector];
  int count;  // columns that there are

  DCX_DEVICE ConvColumns(const ConvGemmParams& p, int column) : count(static_cast<int>(p.step_columns) - column) {
    DCX_UNROLL
    for (int v = 0; v < kVector; ++v) {
      bias[v] = v < count && p.bias != nullptr ? p.bias[column + v] : 0.0f;
      alpha[v] = inverse[v] = 0.0f;
    }
    const float* snake = p.out_alpha != nullptr ? p.out_alpha : p.after_alpha;
    if (snake == nullptr) return;
    DCX_UNROLL
    for (int v = 0; v < kVector; ++v) {
      if (v < count) alpha[v] = snake[column + v];
      inverse[v] = snake_inverse(alpha[v]);
    }
  }

  using Words = Vector16<uint32_t>;
  DCX_DEVICE Words load_residual(const ConvGemmParams& p, const T* from) const {
    if (p.vector_residual) return *reinterpret_cast<const Words*>(from);
    Vector16<T> values{};
    DCX_UNROLL
    for (int v = 0; v < kVector; ++v)
      if (v < count) values.values[v] = from[v * p.residual.stride_c];
    Words words;
    memcpy(&words, &values, sizeof(words));
    return words;
  }

  static DCX_DEVICE Words rounded(const float (&values)[kVector]) {
    Words words;
    DCX_UNROLL
    for (int w = 0; w < 4; ++w) {
      if constexpr (sizeof(T) == 2)
        words.values[w] = pack_pair<T>(values[2 * w], values[2 * w + 1]);
      else
        memcpy(&words.values[w], &values[w], sizeof(uint32_t));
    }
    return words;
  }
  DCX_DEVICE void store(const ConvGemmParams& p, Words words, bool counts, T* to) const {
    DCX_UNROLL
    for (int w = 0; w < 4; ++w) words.values[w] = counts ? words.values[w] : 0;
    if (p.vector_store) {
      *reinterpret_cast<Words*>(to) = words;
    } else {
      Vector16<T> values;
      memcpy(&values, &words, sizeof(values));
      DCX_UNROLL
      for (int v = 0; v < kVector; ++v)
        if (v < count) to[v * p.y.stride_c] = values.values[v];
    }
  }

  // counts: whether the row lies within the clip, else it becomes zeros; more: the residual, looked at where it adds.
  template <bool kActivates>
  DCX_DEVICE void finish(const ConvGemmParams& p, const float* sums, bool counts, bool adds, const Words& more,
                         T* to) const {
    float values[kVector];
    DCX_UNROLL
    for (int v = 0; v < kVector; v += 4) {
      const auto four = *reinterpret_cast<const Vector16<float>*>(sums + v);
      DCX_UNROLL
      for (int i = 0; i < 4; ++i) values[v + i] = four.values[i] + bias[v + i];
    }
    if constexpr (kActivates) {
      DCX_UNROLL
      for (int v = 0; v < kVector; ++v) values[v] = finish_activation(values[v], p.activation);
    }
    if (p.out_alpha != nullptr) {
      DCX_UNROLL
      for (int v = 0; v < kVector; ++v) values[v] = snake_as<T>(values[v], alpha[v], inverse[v]);
    }
    if (adds) {
      DCX_UNROLL
      for (int v = 0; v < kVector; ++v) values[v] += value_of<T>(more, v);
    }
    Words out = rounded(values);
    if (p.after_alpha != nullptr) {
      if (p.snaked != 0) store(p, out, counts, to);
      DCX_UNROLL
      for (int v = 0; v < kVector; ++v) values[v] = snake_as<T>(value_of<T>(out, v), alpha[v], inverse[v]);
      out = rounded(values);
    }
    store(p, out, counts, snaked_of(p, to));
  }
};

// Bias, activation, Snake, residual, rounding, and the store, 16 bytes of a row at a time; sums lie kLd floats apart.
// A thread keeps its columns from row to row; threads past the last whole row of vectors rest. Of the tile's rows those
// from `first` to `end` are finished; the sums begin with the first of them.
template <class T, int kRows, int kColumns, int kThreads, int kLd>
struct ConvFinish {
  static constexpr int kVector = Vector16<T>::kCount, kPerRow = kColumns / kVector, kRowsAtOnce = kThreads / kPerRow;
  static constexpr int kPasses = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;
  static_assert(kLd % 4 == 0 && kRowsAtOnce > 0, "vectors of a row lie on 16 bytes");

  // A thread's first row: everything moves on by the same amount from row to row of a clip.
  struct Rows {
    const float* sums;
    T* y;
    const T* residual;
    int64_t y_step, residual_step;
    // Rows of the tile: up to there they are of the output, up to counting of the clip, between begin and end they have
    // a residual.
    int row, there, counting, begin, end;
  };

  static DCX_DEVICE void run(const ConvGemmParams& p, const ConvPlace& at, const float* sums, int first, int end) {
    const int offset = thread_index() % kPerRow * kVector, wide = static_cast<int>(at.column) + offset;
    if (thread_index() >= kRowsAtOnce * kPerRow || wide >= at.columns) return;
    const int columns = static_cast<int>(p.step_columns), beside = wide / columns, column = wide - beside * columns;
    const ConvColumns<T> own(p, column);
    const bool adds = p.residual.data != nullptr, activates = p.activation != Activation::kNone;
    if (p.tile_items > 1 || (adds && activates)) {
      row_by_row(p, at, own, column, at.phase + beside, sums + offset, first, end);
      return;
    }
    Rows rows = rows_of(p, at, column, at.phase + beside, sums + offset, first, end);
    if (activates)
      walk<1, true, false>(p, own, rows);
    else if (adds)
      walk<(kPasses < 8 ? kPasses : 8), false, true>(p, own, rows);
    else
      walk<2, false, false>(p, own, rows);
  }

  // Rows of several clips, or what is rare.
  static DCX_DEVICE void row_by_row(const ConvGemmParams& p, const ConvPlace& at, const ConvColumns<T>& own, int column,
                                    int64_t phase, const float* sums, int first, int end) {
    const int stride = p.phases.stride > 0 ? static_cast<int>(p.phases.stride) : 1;
    const int tile_rows = static_cast<int>(p.tile_rows);
    const T* residual = static_cast<const T*>(p.residual.data);
    T* y = static_cast<T*>(const_cast<void*>(p.y.data)) + column * p.y.stride_c;
    DCX_NO_UNROLL
    for (int row = first + thread_index() / kPerRow; row < end; row += kRowsAtOnce) {
      const int item = row / tile_rows;
      const int64_t b = at.clip + item, q = at.row + row - item * tile_rows, t = q * stride + phase;
      if (item >= p.tile_items || b >= p.batch || q >= p.rows || t >= p.out_steps) continue;
      const bool counts = t < conv_out_valid(p, b);
      const int64_t source = t + p.residual_shift;
      const bool adds =
          residual != nullptr && counts && (p.residual_valid == 0 || (source >= 0 && source < conv_in_valid(p, b)));
      Vector16<uint32_t> more{};
      if (adds)
        more = own.load_residual(
            p, residual + b * p.residual.stride_b + source * p.residual.stride_t + column * p.residual.stride_c);
      T* to = y + b * p.y.stride_b + t * p.y.stride_t;
      if (p.activation != Activation::kNone)
        own.template finish<true>(p, sums + (row - first) * kLd, counts, adds, more, to);
      else
        own.template finish<false>(p, sums + (row - first) * kLd, counts, adds, more, to);
    }
  }

  static DCX_DEVICE Rows rows_of(const ConvGemmParams& p, const ConvPlace& at, int column, int64_t phase,
                                 const float* sums, int first, int end) {
    const int stride = p.phases.stride > 0 ? static_cast<int>(p.phases.stride) : 1;
    const int64_t t = at.row * stride + phase;  // of the tile's first row
    // Rows whose step, `begin` in the tile's first row, lies below limit.
    const auto below = [&](int64_t limit, int64_t begin) {
      const int64_t steps = minimum(maximum(int64_t{0}, limit - begin), int64_t{kRows} * stride);
      return (static_cast<int>(steps) + stride - 1) / stride;
    };
    Rows rows;
    rows.row = first + thread_index() / kPerRow;
    rows.there = minimum(below(p.out_steps, t), static_cast<int>(minimum(p.tile_rows, p.rows - at.row)));
    rows.there = minimum(rows.there, end);
    rows.counting = minimum(rows.there, below(conv_out_valid(p, at.clip), t));
    rows.begin = 0;
    rows.end = rows.counting;
    const int64_t source = t + p.residual_shift;
    if (p.residual.data != nullptr && p.residual_valid != 0) {
      rows.begin = below(0, source);
      rows.end = minimum(rows.end, below(conv_in_valid(p, at.clip), source));
    }
    const int64_t down = int64_t{rows.row} * stride, step = int64_t{kRowsAtOnce} * stride;
    rows.sums = sums + (rows.row - first) * kLd;
    rows.y = static_cast<T*>(const_cast<void*>(p.y.data)) + at.clip * p.y.stride_b + (t + down) * p.y.stride_t +
             column * p.y.stride_c;
    rows.y_step = step * p.y.stride_t;
    rows.residual = nullptr;
    rows.residual_step = 0;
    if (p.residual.data != nullptr) {
      rows.residual = static_cast<const T*>(p.residual.data) + at.clip * p.residual.stride_b +
                      (source + down) * p.residual.stride_t + column * p.residual.stride_c;
      rows.residual_step = step * p.residual.stride_t;
    }
    return rows;
  }

  // kBatch rows at a time, whose residuals are on their way at once.
  template <int kBatch, bool kActivates, bool kAdds>
  static DCX_DEVICE void walk(const ConvGemmParams& p, const ConvColumns<T>& own, Rows& rows) {
    DCX_NO_UNROLL
    for (; rows.row < rows.there; rows.row += kBatch * kRowsAtOnce) {
      const auto adds = [&](int row) { return kAdds && row >= rows.begin && row < rows.end; };
      Vector16<uint32_t> more[kBatch] = {};
      if (kAdds && p.vector_residual) {  // loads without a branch between them
        DCX_UNROLL
        for (int i = 0; i < kBatch; ++i)
          if (adds(rows.row + i * kRowsAtOnce))
            more[i] = *reinterpret_cast<const Vector16<uint32_t>*>(rows.residual + i * rows.residual_step);
      } else if (kAdds) {
        DCX_UNROLL
        for (int i = 0; i < kBatch; ++i)
          if (adds(rows.row + i * kRowsAtOnce)) more[i] = own.load_residual(p, rows.residual + i * rows.residual_step);
      }
      DCX_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        const int row = rows.row + i * kRowsAtOnce;
        if (row < rows.there)
          own.template finish<kActivates>(p, rows.sums + i * (kRowsAtOnce * kLd), row < rows.counting, adds(row),
                                          more[i], rows.y + i * rows.y_step);
      }
      rows.sums += kBatch * (kRowsAtOnce * kLd);
      rows.y += kBatch * rows.y_step;
      rows.residual += kBatch * rows.residual_step;
    }
  }
};

}  // namespace dcx
