#pragma once
#include "../common/cuda_context.h"
#include "../common/dtype.h"

namespace dcx {

// h[b, c, t] = bias[c] + sum_k weight[c, k] x[b, c, t - pad_left + k]; y = LayerNorm over c of h, or h itself.
// The vectors are in the compute type (float, or double when x is f64). On the CPU they are zero-padded to
// round_up(C, 16) values; on CUDA they are [C] as they come.
struct CausalDwconv1dParams {
  TensorView x;           // [B, C, T]
  TensorView y;           // [B, C, T']
  const void* weight;     // CPU: [K][round_up(C, 16)], zero-padded; CUDA: [C][K]
  const void* bias;       // null on CUDA alone: none
  const void* ln_weight;  // null: no LayerNorm
  const void* ln_bias;    // given with ln_weight; null on CUDA alone: zeros
  double eps;
  const int64_t* lengths;  // [B], null: T each; CUDA: on the device
  int64_t batch, channels, in_steps, out_steps;
  int64_t taps, pad_left, pad_right;
  bool weights_stand;  // CUDA: nothing that may still run in front of the kernel writes them or the vectors
};

void launch_causal_dwconv1d_cpu(const CausalDwconv1dParams& params);

// Throws std::runtime_error where a row does not fit the device's shared memory.
void launch_causal_dwconv1d_cuda(const CudaContext& context, const CausalDwconv1dParams& params);

}  // namespace dcx
