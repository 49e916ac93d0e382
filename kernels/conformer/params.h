#pragma once
#include "../common/dtype.h"

namespace dcx {

// A Conformer layer, as w2v-BERT has it. Signals are [B, C, T] with stride 1 on C, float32 or bfloat16; what is
// computed on the way is float32.

// softmax over j of scale * (q_i . k_j + q_i . distances[clamp(j - i, -left, right) + left]), times v_j.
struct ConformerAttentionParams {
  TensorView q, k, v;    // [B, H * D, T]
  TensorView y;          // [B, H * D, T], of their dtype
  TensorView distances;  // [1, D, left + 1 + right], of their dtype
  const uint8_t* valid;  // [B][T], 0: a step that nothing attends to; null: every step is valid
  int64_t batch, steps, heads, size, left, right;
  float scale;
};

// x += alpha * addend; y = LayerNorm over c of x. With next_weight x becomes that row, and y its LayerNorm by the next
// vectors.
struct ConformerNormParams {
  float* x;             // [rows][C]
  TensorView addend;    // [1, C, rows]; data null: none
  TensorView y;         // [1, C, rows]
  const float* weight;  // [round_up(C, 16)], padded with zeros, as bias is
  const float* bias;
  const float* next_weight;  // null: none
  const float* next_bias;
  int64_t rows, channels;
  float alpha, eps;
};

// z = x weight^T + bias, swished where that is asked for; y = z, or sum += alpha * z.
struct ConformerLinearParams {
  const void* x;       // [rows][channels], float32 or bfloat16
  const void* weight;  // its panels, of gemm_pack.h or gemm_pack_bf16.h
  const float* bias;   // [columns]; null: none
  void* y;             // [rows][columns], of x's dtype; null: sum is what is written
  float* sum;          // [rows][columns]
  DType dtype;
  int64_t rows, channels, columns;  // columns: a multiple of 16; channels: even in bfloat16
  float alpha;
  bool swish;
};

// Channels that the convolution takes at a time: its vectors and rows of weights are padded with zeros to their
// multiple.
constexpr int64_t kConformerChannels = 64;

// h = x[c] * sigmoid(x[C + c]), zero at invalid steps; y = swish(LayerNorm over c of sum_k weight[k][c] h[t - K + 1 +
// k]).
struct ConformerConvolutionParams {
  TensorView x;         // [B, 2 * C, T]
  TensorView y;         // [B, C, T], of its dtype
  const float* weight;  // [K][round_up(C, 64)]
  const float* ln_weight;
  const float* ln_bias;
  const uint8_t* valid;  // [B][T]; null: every step is valid
  int64_t batch, steps, channels, taps;
  float eps;
};

void launch_conformer_attention_cpu(const ConformerAttentionParams& params);
void launch_conformer_linear_cpu(const ConformerLinearParams& params);
void launch_conformer_norm_cpu(const ConformerNormParams& params);
void launch_conformer_convolution_cpu(const ConformerConvolutionParams& params);

}  // namespace dcx
