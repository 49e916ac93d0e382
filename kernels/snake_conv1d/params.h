#pragma once
#include "../common/dtype.h"

namespace dcx {

enum class Activation : int32_t { kNone = 0, kTanh = 1, kGelu = 2 };

// y[b, :, t] = act(bias + sum_k W_k snake(x[b, :, t * stride - pad_left + k * dilation])) + residual[b, :, t]
struct SnakeConv1dParams {
  TensorView x;            // [B, Cin, T]
  TensorView y;            // [B, Cout, T']
  TensorView residual;     // [B, Cout, T'], data null: none
  const void* weight;      // gemm_pack.h panels of [K][Cin] x Cout: float; double or bf16 pairs when x is f64 or bf16
  const void* bias;        // [round_up(Cout, 16)], compute type, zero-padded
  const void* alpha;       // [Cin], compute type, null: no Snake
  const int64_t* lengths;  // [B], null: T each
  int64_t batch, in_channels, out_channels, in_steps, out_steps;
  int64_t taps, stride, dilation, pad_left, pad_right;
  Activation activation;
};

void launch_snake_conv1d_cpu(const SnakeConv1dParams& params);

}  // namespace dcx
