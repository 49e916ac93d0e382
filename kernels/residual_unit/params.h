#pragma once
#include "../common/conv_shape.h"

namespace dcx {

constexpr int64_t kResidualUnitTaps = 7;
// On a GPU units of 16 bits with more channels are two kernels, and so are all in float32.
constexpr int64_t kMostFusedChannels = 192;

// h[t] = bias1 + sum_k W1_k snake(x[t - pad_left + k * dilation], alpha1), k = 0..6
// y[t] = x[t - pad_left + centre * dilation] + bias2 + W2 snake(h[t], alpha2), rounded; with out_alpha snake(y[t])
struct ResidualUnitParams {
  TensorView x;         // [B, C, T]
  TensorView y;         // [B, C, T']
  TensorView x_snaked;  // snake(x, alpha1), rounded; data null: it is worked out; of a GPU's two kernels alone
  void* y_snaked;       // laid out as y: takes snake(y, out_alpha), y is plain then; null: none; as x_snaked
  const void* weight1;  // gemm_pack.h panels of [7][C] x C: float; double or bf16 pairs when x is f64 or bf16
  const void* weight2;  // panels of [1][C] x C
  const void* bias1;    // [round_up(C, 16)], compute type, zero-padded
  const void* bias2;
  const void* alpha1;  // [C], compute type
  const void* alpha2;
  const void* out_alpha;   // [C], compute type: Snake on y; null: none; a GPU's alone
  const int64_t* lengths;  // [B], null: T each
  int64_t batch, channels, in_steps, out_steps;
  int64_t dilation, pad_left, pad_right;
  int64_t centre;  // the tap that the residual is aligned with: 3 centred, 6 causal
  // On the CPU: 0, direct, or a form of winograd.h; weight1 is then what its pack_winograd makes.
  int64_t winograd;

  // Steps of item b that count, on input and output.
  DCX_HOST_DEVICE int64_t in_valid(int64_t b) const { return lengths != nullptr ? lengths[b] : in_steps; }
  DCX_HOST_DEVICE int64_t out_valid(int64_t b) const {
    return lengths != nullptr ? conv_output_steps(lengths[b], kResidualUnitTaps, 1, dilation, pad_left, pad_right)
                              : out_steps;
  }
};

void launch_residual_unit_cpu(const ResidualUnitParams& params);

}  // namespace dcx
