// What rvq_search and rvq_lookup share on the device: the frames of a tile, the sum of the stages' output projections,
// and the store. Both ops add in the same order, so that a code's sum has the same bits in either.
#pragma once
#include "../common/device.cuh"
#include "../common/gemm_pack.h"
#include "layout.h"

namespace dcx {

// kFrames neighbours in the sequence of all clips' frames: number g is frame g % F of clip g / F.
template <int kFrames>
struct alignas(16) FrameTile {
  int64_t clip[kFrames], step[kFrames];
  int32_t exists[kFrames];   // the tail's tile has fewer
  int32_t counts[kFrames];   // lies before its clip's length
  uint32_t broken[kFrames];  // other than 0: its output is NaN

  DCX_DEVICE void fill(int64_t first, int64_t batch, int64_t frames, const int64_t* lengths) {
    const int f = thread_index();
    if (f >= kFrames) return;
    const int64_t number = first + f;
    exists[f] = number < batch * frames;
    clip[f] = exists[f] ? number / frames : 0;
    step[f] = exists[f] ? number % frames : 0;
    counts[f] = exists[f] && (lengths == nullptr || step[f] < lengths[clip[f]]);
    broken[f] = 0;
  }
  DCX_DEVICE int64_t offset(const TensorView& view, int f) const {
    return clip[f] * view.stride_b + step[f] * view.stride_t;
  }
};

// Floats from one row of frames in shared memory to the next: rows that lie 4 apart share no bank, so that lanes that
// run along the rows don't wait for each other.
template <int kFrames>
constexpr int kFramePitch = kFrames >= 16 ? kFrames + 4 : kFrames;

// kCount is 1 or a multiple of 4, `from` then aligned to 16 bytes.
template <int kCount>
DCX_DEVICE void load_frames(float (&to)[kCount], const float* from) {
  if constexpr (kCount == 1) {
    to[0] = from[0];
  } else {
    DCX_UNROLL
    for (int i = 0; i < kCount; i += 4) {
      const auto four = *reinterpret_cast<const Vector16<float>*>(from + i);
      DCX_UNROLL
      for (int k = 0; k < 4; ++k) to[i + k] = four.values[k];
    }
  }
}
template <int kCount>
DCX_DEVICE void store_frames(float* to, const float (&from)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = from[0];
  } else {
    DCX_UNROLL
    for (int i = 0; i < kCount; i += 4)
      *reinterpret_cast<Vector16<float>*>(to + i) = Vector16<float>{{from[i], from[i + 1], from[i + 2], from[i + 3]}};
  }
}

// A column of the output projections: weights of one code dimension after the other, stage after stage, `width` apart.
struct ColumnWeights {
  const float* weight;
  int64_t width;
  const float* bias;  // of so many stages together
};
// kDim 0: the layout's.
template <int kDim>
DCX_DEVICE ColumnWeights column_weights(const float* packed, const RvqLayout& layout, int64_t used, int64_t column) {
  const int dim = kDim > 0 ? kDim : static_cast<int>(layout.dim);
  const int64_t panel = panel_of(layout.channels, column), begin = panel_begin(layout.channels, panel);
  return ColumnWeights{packed + layout.out_panels() + begin * layout.stages * dim + (column - begin),
                       panel_begin(layout.channels, panel + 1) - begin,
                       packed + layout.out_bias() + (used - 1) * layout.channel_columns() + column};
}

// sums[f] = out_bias[column] + sum over stages i < used of V_i[column] . row_i of frame f. rows: [used D][kFrames].
// Each stage is summed on its own and then added: one chain over all of Q D rounds more. kDim 0: the layout's.
template <int kDim, int kFrames>
DCX_DEVICE void project_out(float (&sums)[kFrames], const float* packed, const RvqLayout& layout, int64_t used,
                            const float* rows, int64_t column) {
  const int dim = kDim > 0 ? kDim : static_cast<int>(layout.dim);
  const ColumnWeights own = column_weights<kDim>(packed, layout, used, column);
  const float* weight = own.weight;
  const int64_t width = own.width;
  DCX_UNROLL
  for (int f = 0; f < kFrames; ++f) sums[f] = 0.0f;
  const auto add = [&](float (&part)[kFrames], float w, const float* row) {
    float values[kFrames];
    load_frames(values, row);
    DCX_UNROLL
    for (int f = 0; f < kFrames; ++f) part[f] = fused_multiply_add(w, values[f], part[f]);
  };
  const auto add_stage = [&] {
    float part[kFrames] = {};
    if constexpr (kDim > 0) {
      float w[kDim];
      DCX_UNROLL
      for (int d = 0; d < kDim; ++d) w[d] = weight[d * width];
      DCX_UNROLL
      for (int d = 0; d < kDim; ++d) add(part, w[d], rows + d * kFrames);
    } else {
      for (int d = 0; d < dim; ++d) add(part, weight[d * width], rows + d * kFrames);
    }
    weight += dim * width;
    rows += dim * kFrames;
    DCX_UNROLL
    for (int f = 0; f < kFrames; ++f) sums[f] += part[f];
  };
  if constexpr (kFrames < 16) {  // most of the time is the weights' way from memory: four stages' are under way
    DCX_UNROLL_BY_4
    for (int stage = 0; stage < static_cast<int>(used); ++stage) add_stage();
  } else {
    DCX_NO_UNROLL
    for (int stage = 0; stage < static_cast<int>(used); ++stage) add_stage();
  }
  const float bias = *own.bias;
  DCX_UNROLL
  for (int f = 0; f < kFrames; ++f) sums[f] += bias;
}

// One value of a tensor of any of the three types.
DCX_DEVICE float load_as_float(const TensorView& view, int64_t clip, int64_t step, int64_t column) {
  const int64_t at = clip * view.stride_b + step * view.stride_t + column * view.stride_c;
  if (view.dtype == DType::kF32) return static_cast<const float*>(view.data)[at];
  if (view.dtype == DType::kBF16) return to_float(static_cast<const bf16*>(view.data)[at]);
  return to_float(static_cast<const f16*>(view.data)[at]);
}
DCX_DEVICE void store_float(const TensorView& view, int64_t clip, int64_t step, int64_t column, float value) {
  const int64_t at = clip * view.stride_b + step * view.stride_t + column * view.stride_c;
  if (view.dtype == DType::kF32)
    static_cast<float*>(view.data)[at] = value;
  else if (view.dtype == DType::kBF16)
    static_cast<bf16*>(view.data)[at] = from_float<bf16>(value);
  else
    static_cast<f16*>(view.data)[at] = from_float<f16>(value);
}

// Writes `count` columns from `first` on out of staged [count][kFramePitch], plus addend (data null: none).
template <class T, int kFrames, int kThreads>
DCX_DEVICE void store_columns_as(const TensorView& to, const TensorView& addend, const FrameTile<kFrames>& tile,
                                 const float* staged, int64_t first, int count) {
  T* y = static_cast<T*>(to.data);
  const T* extra = static_cast<const T*>(addend.data);
  const bool along_columns = to.stride_c == 1;
  constexpr int kAtOnce = kFrames < 4 ? kFrames : 4;  // addends under way, since y may not be told apart from them
  for (int i = thread_index(); i < count * kFrames; i += kAtOnce * kThreads) {
    float values[kAtOnce];
    T* to_cells[kAtOnce];
    DCX_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const int cell = i + k * kThreads;
      const int f = along_columns ? cell / count : cell % kFrames, n = along_columns ? cell % count : cell / kFrames;
      values[k] = 0.0f;
      to_cells[k] = nullptr;
      if (cell >= count * kFrames || !tile.exists[f]) continue;
      const int64_t column = first + n;
      to_cells[k] = y + tile.offset(to, f) + column * to.stride_c;
      if (!tile.counts[f]) continue;
      values[k] = staged[n * kFramePitch<kFrames> + f];
      if (extra != nullptr) values[k] += to_float(extra[tile.offset(addend, f) + column * addend.stride_c]);
      if (tile.broken[f] != 0) values[k] = not_a_number();
    }
    DCX_UNROLL
    for (int k = 0; k < kAtOnce; ++k)
      if (to_cells[k] != nullptr) *to_cells[k] = from_float<T>(values[k]);
  }
}
template <int kFrames, int kThreads>
DCX_DEVICE void store_columns(const TensorView& to, const TensorView& addend, const FrameTile<kFrames>& tile,
                              const float* staged, int64_t first, int count) {
  if (to.dtype == DType::kF32)
    store_columns_as<float, kFrames, kThreads>(to, addend, tile, staged, first, count);
  else if (to.dtype == DType::kBF16)
    store_columns_as<bf16, kFrames, kThreads>(to, addend, tile, staged, first, count);
  else
    store_columns_as<f16, kFrames, kThreads>(to, addend, tile, staged, first, count);
}

}  // namespace dcx
