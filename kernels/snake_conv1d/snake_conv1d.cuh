// y = act(bias + conv(snake(x))) + residual on a GPU: conv_gemm.cuh, but for convolutions of at most four outputs,
// whose columns would fill a sixteenth of a tensor-core tile: for layers shaped as the decoder's last sliding_conv.cuh
// (float32) and tap_columns_conv.cuh (16-bit), spread_conv.cuh for those shaped as the encoder's first; else a thread
// owns one output step, a block 128 neighbouring ones, whose snaked rows stand in shared memory as floats, 32 channels
// at a time. float32 sums.
#pragma once
#include "../common/conv_gemm.cuh"
#include "../common/conv_geometry.h"
#include "params.h"
#include "sliding_conv.cuh"
#include "spread_conv.cuh"
#include "tap_columns_conv.cuh"

namespace dcx {

constexpr int kNarrowOutputs = 4;

template <class T>
struct NarrowConv {
  using Params = ConvGemmParams;
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 4;
  static constexpr bool kNeedsSm80 = false;
  static constexpr int kPitch = kDepth + 1;  // odd: neighbouring steps lie in different banks

  static int64_t smem_bytes(const Params& p) {
    return (p.segment * kPitch + kDepth * p.taps * kNarrowOutputs) * static_cast<int64_t>(sizeof(float));
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    float* rows = reinterpret_cast<float*>(smem);
    float* weights = rows + p.segment * kPitch;
    const T* x = static_cast<const T*>(p.x.data);
    const T* packed = static_cast<const T*>(p.weight);
    const int64_t b = block_x() / p.row_tiles, q0 = block_x() % p.row_tiles * kThreads;
    const int64_t in_steps = p.lengths != nullptr ? maximum(int64_t{0}, minimum(p.lengths[b], p.in_steps)) : p.in_steps;
    const int64_t out_steps = p.lengths != nullptr ? conv_output_steps(in_steps, p.conv_taps, p.conv_stride,
                                                                       p.conv_dilation, p.conv_left, p.conv_right)
                                                   : p.out_steps;
    const int64_t q = q0 + thread_index();
    float sums[kNarrowOutputs] = {};
    for (int64_t c0 = 0; c0 < p.channels; c0 += kDepth) {
      sync_threads();
      for (int64_t i = thread_index(); i < p.segment * kDepth; i += kThreads) {
        const int64_t row = i / kDepth, c = c0 + i % kDepth;
        const int64_t t = (q0 * p.row_scale + row) * p.row_step - p.pad_left;
        float value = 0.0f;
        if (c < p.channels && t >= 0 && t < in_steps) {
          value = to_float(x[b * p.x.stride_b + t * p.x.stride_t + c * p.x.stride_c]);
          if (p.alpha != nullptr) value = snake_as<T>(value, p.alpha[c], snake_inverse(p.alpha[c]));
        }
        rows[row * kPitch + i % kDepth] = value;
      }
      for (int64_t i = thread_index(); i < p.taps * kDepth * kNarrowOutputs; i += kThreads) {
        const int64_t n = i % kNarrowOutputs, c = i / kNarrowOutputs % kDepth, j = i / kNarrowOutputs / kDepth;
        weights[i] = to_float(packed[(j * p.channels_padded + c0 + c) * p.columns_padded + n]);
      }
      sync_threads();
      for (int64_t j = 0; j < p.taps; ++j) {
        const float* row = rows + (thread_index() * p.row_scale + j * p.dilation) * kPitch;
        const float* tap = weights + j * kDepth * kNarrowOutputs;
        float part[kNarrowOutputs] = {};
        DCX_UNROLL
        for (int c = 0; c < kDepth; ++c) {
          const auto w = *reinterpret_cast<const Vector16<float>*>(tap + c * kNarrowOutputs);
          DCX_UNROLL
          for (int n = 0; n < kNarrowOutputs; ++n) part[n] = fused_multiply_add(row[c], w.values[n], part[n]);
        }
        DCX_UNROLL
        for (int n = 0; n < kNarrowOutputs; ++n) sums[n] += part[n];
      }
    }
    if (q >= p.rows) return;
    T* y = static_cast<T*>(const_cast<void*>(p.y.data)) + b * p.y.stride_b + q * p.y.stride_t;
    const T* residual = static_cast<const T*>(p.residual.data);
    DCX_UNROLL
    for (int n = 0; n < kNarrowOutputs; ++n) {
      if (n >= p.columns) break;
      float value = 0.0f;
      if (q < out_steps) {
        value = finish_activation(sums[n] + (p.bias != nullptr ? p.bias[n] : 0.0f), p.activation);
        if (residual != nullptr)
          value += to_float(residual[b * p.residual.stride_b + q * p.residual.stride_t + n * p.residual.stride_c]);
      }
      y[n * p.y.stride_c] = from_float<T>(value);
    }
  }
};

template <class T>
bool plan_narrow(const CudaContext& context, ConvGemmPlan& plan) {
  using K = NarrowConv<T>;
  ConvGemmParams& p = plan.params;
  if (slides(p, sizeof(T) == 4 ? 256 : 96)) {
    if constexpr (sizeof(T) == 4)
      plan_sliding(context, plan);
    else if (p.channels <= 48)
      plan_tap_columns<T, 3>(context, plan);
    else
      plan_tap_columns<T, 6>(context, plan);
    return plan.smem_bytes <= context.shared_bytes;
  }
  p.row_tiles = ceil_div(p.rows, int64_t{K::kThreads});
  p.segment = (K::kThreads - 1) * p.row_scale + (p.taps - 1) * p.dilation + 1;
  p.segment = round_up(p.segment, 4);  // the weights behind the rows are read 16 bytes at a time
  start_row_tiles<K>(plan);
  return plan.smem_bytes <= context.shared_bytes;
}

// p.weight, p.bias and p.alpha as conv_gemm.cuh has them.
inline ConvGemmPlan plan_snake_conv1d_of(const CudaContext& context, const SnakeConv1dParams& p) {
  const ConvGeometry geometry = conv_geometry(p.in_channels, p.taps, p.stride, p.dilation);
  ConvGemmParams g{};
  g.x = signal_of(p.x);
  g.y = signal_of(p.y);
  if (p.residual.data != nullptr) g.residual = signal_of(p.residual);
  g.weight = p.weight;
  g.bias = static_cast<const float*>(p.bias);
  g.alpha = static_cast<const float*>(p.alpha);
  g.lengths = p.lengths;
  g.batch = p.batch;
  g.in_steps = p.in_steps;
  g.in_channels = p.in_channels;
  g.columns = p.out_channels;
  g.columns_padded = round_up(p.out_channels, kColumnUnit);
  g.out_steps = g.rows = p.out_steps;
  g.channels = geometry.channels;
  g.channels_padded = geometry.channels_padded();
  g.row_step = geometry.row_step;
  g.row_scale = geometry.row_scale;
  g.taps = geometry.taps;
  g.dilation = p.dilation;
  g.pad_left = p.pad_left;
  g.conv_taps = p.taps;
  g.conv_stride = p.stride;
  g.conv_dilation = p.dilation;
  g.conv_left = p.pad_left;
  g.conv_right = p.pad_right;
  g.activation = p.activation;
  if (spreads(g) && (p.x.dtype != DType::kBF16 || context.capability >= 80)) {
    ConvGemmPlan plan;
    plan.params = g;
    if (p.x.dtype == DType::kBF16) plan_spread<bf16>(context, plan);
    if (p.x.dtype == DType::kF16) plan_spread<f16>(context, plan);
    if (p.x.dtype == DType::kF32) plan_spread<float>(context, plan);
    return plan;
  }
  if (p.out_channels <= kNarrowOutputs && geometry.fold == 1) {
    ConvGemmPlan plan;
    plan.params = g;
    if (p.x.dtype == DType::kBF16 && context.capability >= 80 && plan_narrow<bf16>(context, plan)) return plan;
    if (p.x.dtype == DType::kF16 && plan_narrow<f16>(context, plan)) return plan;
    if (p.x.dtype == DType::kF32 && plan_narrow<float>(context, plan)) return plan;
  }
  return plan_conv_gemm(context, p.x.dtype, g);
}

}  // namespace dcx
