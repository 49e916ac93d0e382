#pragma once
#include "../common/dtype.h"

namespace dcx {

// h[b, c, t] = bias[c] + sum_k weight[c, k] x[b, c, t - pad_left + k]; y = LayerNorm over c of h, or h itself
struct CausalDwconv1dParams {
  TensorView x;           // [B, C, T]
  TensorView y;           // [B, C, T']
  const void* weight;     // [K][round_up(C, 16)], compute type (float, or double when x is f64), zero-padded
  const void* bias;       // [round_up(C, 16)], compute type, zero-padded
  const void* ln_weight;  // [round_up(C, 16)], zero-padded, null: no LayerNorm
  const void* ln_bias;    // [round_up(C, 16)], zero-padded; given with ln_weight
  double eps;
  const int64_t* lengths;  // [B], null: T each
  int64_t batch, channels, in_steps, out_steps;
  int64_t taps, pad_left, pad_right;
};

void launch_causal_dwconv1d_cpu(const CausalDwconv1dParams& params);

}  // namespace dcx
