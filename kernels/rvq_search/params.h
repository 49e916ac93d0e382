#pragma once
#include "../common/cuda_context.h"
#include "layout.h"

namespace dcx {

// Codes that were searched for, and those among them that were redone in float64. Added to atomically.
struct RvqSearchCounts {
  int64_t codes, redone;
};

// For stages i = 0 .. used - 1: e = W_i r + in_bias_i, code = the row nearest to e (both L2-normalised, lowest index on
// a tie), r -= V_i row + out_bias_i; r starts as z.
struct RvqSearchParams {
  TensorView z;            // [B, C, F]
  int64_t* codes;          // [B, used, F] contiguous
  TensorView quantized;    // [B, C, F] the sum over the stages, data null: not wanted
  void* margin;            // [B, used, F] contiguous, compute type; null: not wanted
  const void* packed;      // RvqLayout, compute type (float, or double when z is f64)
  const int64_t* lengths;  // [B], null: F each
  RvqLayout layout;
  int64_t batch, frames, used;
  RvqSearchCounts* counts;  // CPU, float: added to; null: not wanted
  double bound_factor;      // CPU, float: the error bound times this; 1 but in tests of the bound
  double slack_factor;      // CPU, float: the slack of the pass over bytes times this; 1 but in tests of the slack
};

void launch_rvq_search_cpu(const RvqSearchParams& params);
// On the GPU everything is float32 and pointers are the device's; packed is aligned to 16 bytes.
void launch_rvq_search_cuda(const CudaContext& context, const RvqSearchParams& params);

}  // namespace dcx
