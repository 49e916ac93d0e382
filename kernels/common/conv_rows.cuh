// Rows for conv_wgmma.cuh, made by a pass of their own where x as it lies won't do: snaked, channels side by side and
// padded to whole 16 bytes, or, for few input channels, a GEMM row's samples gathered from its time steps. Costs one
// read and one write of x; products then start from shared memory without any arithmetic on the way.
#pragma once
#include "conv_finish.cuh"
#include "launch.cuh"

namespace dcx {

// to[b, r, v] = act(x[b, r * row_step - pad_left + v / in_channels, v % in_channels]), zero outside the clip and past
// the channels.
template <class T>
struct ConvRows {
  using Params = ConvRowsParams;
  static constexpr int kThreads = 256, kMinBlocks = 3;
  static constexpr bool kNeedsSm80 = DTypeOf<T>::value == DType::kBF16, kNeedsSm90a = true;
  static constexpr int kVector = Vector16<T>::kCount, kPasses = 8;
  static constexpr int kBatch = 4;  // rows on their way at once

  static DCX_DEVICE void run(const Params& p, unsigned char*) {
    const int cells = static_cast<int>(p.width) / kVector;
    const int rows_at_once = maximum(1, kThreads / cells), cells_at_once = minimum(cells, kThreads);
    if (thread_index() >= rows_at_once * cells_at_once) return;
    const int64_t b = block_x() / p.row_blocks;
    const int64_t first = block_x() % p.row_blocks * (rows_at_once * kPasses) + thread_index() / cells_at_once;
    const int64_t steps = p.lengths != nullptr ? maximum(int64_t{0}, minimum(p.lengths[b], p.in_steps)) : p.in_steps;
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride_b;
    T* to = static_cast<T*>(p.to) + b * p.rows * p.width;
    for (int cell = thread_index() % cells_at_once; cell < cells; cell += cells_at_once) {
      if (p.vectors)
        copy(p, x, to, cell, first, rows_at_once, steps);
      else
        gather(p, x, to, cell, first, rows_at_once, steps);
    }
  }

 private:
  // A cell of every rows_at_once-th row from `first` on, where a row is one time step whose channels are whole cells.
  static DCX_DEVICE void copy(const Params& p, const T* x, T* to, int cell, int64_t first, int rows_at_once,
                              int64_t steps) {
    float alpha[kVector], inverse[kVector];
    DCX_UNROLL
    for (int i = 0; i < kVector; ++i) {
      alpha[i] = p.alpha != nullptr ? p.alpha[cell * kVector + i] : 0.0f;
      inverse[i] = snake_inverse(alpha[i]);
    }
    x += (first * p.row_step - p.pad_left) * p.x.stride_t + cell * kVector;
    to += first * p.width + cell * kVector;
    const int64_t x_step = rows_at_once * p.row_step * p.x.stride_t, to_step = rows_at_once * p.width;
    DCX_NO_UNROLL
    for (int pass = 0; pass < kPasses; pass += kBatch) {
      Vector16<uint32_t> words[kBatch] = {};
      const int64_t row = first + pass * rows_at_once;
      DCX_UNROLL
      for (int k = 0; k < kBatch; ++k) {
        const int64_t t = (row + k * rows_at_once) * p.row_step - p.pad_left;
        if (row + k * rows_at_once < p.rows && t >= 0 && t < steps)
          words[k] = *reinterpret_cast<const Vector16<uint32_t>*>(x + k * x_step);
      }
      DCX_UNROLL
      for (int k = 0; k < kBatch; ++k) {
        if (row + k * rows_at_once >= p.rows) return;
        if (p.alpha != nullptr) {
          DCX_UNROLL
          for (int i = 0; i < kVector; i += 2)
            words[k].values[i / 2] =
                pack_pair<T>(snake_as<T>(value_of<T>(words[k], i), alpha[i], inverse[i]),
                             snake_as<T>(value_of<T>(words[k], i + 1), alpha[i + 1], inverse[i + 1]));
        }
        *reinterpret_cast<Vector16<uint32_t>*>(to + k * to_step) = words[k];
      }
      x += kBatch * x_step;
      to += kBatch * to_step;
    }
  }

  // The same value by value.
  static DCX_DEVICE void gather(const Params& p, const T* x, T* to, int cell, int64_t first, int rows_at_once,
                                int64_t steps) {
    const int in_channels = static_cast<int>(p.in_channels);
    float alpha[kVector], inverse[kVector];
    int later[kVector], channel[kVector];
    DCX_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const int wide = cell * kVector + i;
      later[i] = wide / in_channels;
      channel[i] = wide < p.channels ? wide % in_channels : -1;
      alpha[i] = p.alpha != nullptr && channel[i] >= 0 ? p.alpha[channel[i]] : 0.0f;
      inverse[i] = snake_inverse(alpha[i]);
    }
    DCX_NO_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      const int64_t row = first + pass * rows_at_once;
      if (row >= p.rows) break;
      const int64_t t = row * p.row_step - p.pad_left;
      Vector16<T> values{};
      DCX_UNROLL
      for (int i = 0; i < kVector; ++i)
        if (channel[i] >= 0 && t + later[i] >= 0 && t + later[i] < steps)
          values.values[i] = x[(t + later[i]) * p.x.stride_t + channel[i] * p.x.stride_c];
      if (p.alpha != nullptr) {
        DCX_UNROLL
        for (int i = 0; i < kVector; ++i)
          values.values[i] = from_float<T>(snake_as<T>(to_float(values.values[i]), alpha[i], inverse[i]));
      }
      *reinterpret_cast<Vector16<T>*>(to + row * p.width + cell * kVector) = values;
    }
  }
};

}  // namespace dcx
