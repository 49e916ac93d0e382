#pragma once
#include "../common/cuda_context.h"
#include "../rvq_search/layout.h"

namespace dcx {

constexpr int64_t kNoWrongCode = INT64_MAX;  // what `error` holds where no code was out of range

// y[b, :, f] = sum over stages i < used of V_i row_i(codes[b, i, f]) + out_bias_i, plus addend[b, :, f]
struct RvqLookupParams {
  const int64_t* codes;    // [B, used, F] contiguous
  TensorView y;            // [B, C, F]
  TensorView addend;       // [B, C, F], data null: none
  const void* packed;      // RvqLayout, compute type
  const int64_t* lengths;  // [B], null: F each
  RvqLayout layout;
  int64_t batch, frames, used;
  bool is_double;
  int64_t* error;  // out: the lowest flat position of a code out of range, untouched when there is none
};

void launch_rvq_lookup_cpu(const RvqLookupParams& params);
// On the GPU everything is float32 and pointers are the device's, error may be null; packed is aligned to 16 bytes.
// Frames with a code out of range are NaN there.
void launch_rvq_lookup_cuda(const CudaContext& context, const RvqLookupParams& params);

}  // namespace dcx
