#pragma once
#include "../common/cuda_context.h"

namespace dcx {

// Codes of one codebook or more: from [batch, stages, frames], any strides, to [batch, stages, frames of to].
struct CodesTaken {
  const int64_t* from;
  int64_t* to;
  int64_t stride_b, stride_q, stride_f;  // of from, in elements
  int64_t stages, entries;
  int64_t to_frames;
  int64_t count;  // batch * stages * frames; by the launcher
};

struct TakeCodesParams {
  CodesTaken parts[2];  // the second may have no stages
  int64_t batch, frames;
  int64_t* wrong;  // on the host, which the GPU writes to: becomes 1 where a code is not in [0, entries)
};

void launch_take_codes_cuda(const CudaContext& context, const TakeCodesParams& params);

}  // namespace dcx
