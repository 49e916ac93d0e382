// How residual_unit runs on a GPU; plain C++, for the op's host side.
#pragma once
#include "../common/conv_gemm_params.h"
#include "params.h"

namespace dcx {

// The fused kernel's parameters.
struct FusedUnitParams {
  Signal x;            // [B, in_steps, C]
  Signal y;            // [B, out_steps, C], written
  const void* weight;  // [8][channels_padded][columns_padded]: W1's taps, then W2
  const float* bias1;  // [C], null: none
  const float* bias2;
  const float* alpha1;  // [C]
  const float* alpha2;
  const float* out_alpha;  // [C]: Snake on y; null: none
  const int64_t* lengths;  // [B], null: in_steps each
  int64_t channels, channels_padded, columns_padded;
  int64_t in_steps, out_steps, dilation, pad_left, pad_right;
  int64_t residual_shift;             // y[t] takes x[t + residual_shift]
  int64_t row_tiles;                  // per clip
  int segment;                        // rows of shared memory
  int clips, step_clips, step_tiles;  // where a block takes tile after tile: clips, and how far on its next one is
  bool vectors, vector_store;
  bool weights_stand;  // nothing that may still run in front of the kernel in its stream writes them or the vectors
};

struct ResidualUnitPlan {
  bool fused = false;
  FusedUnitParams params{};  // one kernel
  Grid grid;
  int64_t smem_bytes = 0;
  void (*start)(const CudaContext&, const ResidualUnitPlan&) = nullptr;
  ConvGemmPlan first, second;  // else two
};

// Elements of x's dtype that two kernels need for the values between them; 0 where one kernel does it. In which order
// sums are added follows from channels, dtype, dilation and the device's shared memory alone, so that a clip's bits do
// not depend on its length or its batch.
int64_t residual_unit_hidden(const CudaContext& context, const ResidualUnitParams& params);

// Weights as the op's CUDA packer lays them, weight2 right behind weight1; bias and alpha [C] float32, biases may be
// null. `hidden` has the elements that residual_unit_hidden asks for.
ResidualUnitPlan plan_residual_unit_cuda(const CudaContext& context, const ResidualUnitParams& params, void* hidden);

}  // namespace dcx
