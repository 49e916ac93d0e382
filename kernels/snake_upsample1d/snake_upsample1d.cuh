// y[b, :, q S + p] = bias + sum_j W_{p, j} snake(x[b, :, q + first(p) + j]) on a GPU: conv_gemm.cuh, whose rows are the
// frames q and whose columns are every phase's outputs, each phase with its own taps; neither the repeated signal nor
// the columns of a transposed convolution are ever stored.
#pragma once
#include "../common/conv_gemm.cuh"
#include "params.h"

namespace dcx {

// p.weight: [every phase's taps][round_up(Cin, 32)][round_up(Cout, 16)]; p.bias [Cout] or null, p.alpha [Cin],
// p.out_alpha [Cout].
inline ConvGemmPlan plan_snake_upsample1d_of(const CudaContext& context, const SnakeUpsample1dParams& p) {
  ConvGemmParams g{};
  g.x = signal_of(p.x);
  g.y = signal_of(p.y);
  g.weight = p.weight;
  g.bias = static_cast<const float*>(p.bias);
  g.alpha = static_cast<const float*>(p.alpha);
  g.after_alpha = static_cast<const float*>(p.out_alpha);
  g.snaked = bytes_between(p.y.data, p.y_snaked);
  g.lengths = p.lengths;
  g.batch = p.batch;
  g.in_steps = p.in_steps;
  g.in_channels = g.channels = p.in_channels;
  g.channels_padded = round_up(p.in_channels, kDepth);
  g.columns = p.out_channels;
  g.columns_padded = round_up(p.out_channels, kColumnUnit);
  g.out_steps = p.out_steps;
  g.rows = ceil_div(p.out_steps, p.phases.stride);
  g.row_step = g.row_scale = g.dilation = 1;
  g.phases = p.phases;
  return plan_conv_gemm(context, p.x.dtype, g);
}

}  // namespace dcx
