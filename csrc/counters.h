// Counters for kernels that find the counters at zero and leave them so. Included where DCX_WITH_CUDA is defined alone.
#pragma once
#include <ATen/core/Tensor.h>

#include "../kernels/common/cuda_context.h"

namespace dcx {

// [count] int32 zeros on x's device, for kernels that run one after another on the context's stream. While that
// captures a CUDA graph all its kernels share one range of memory that was cleared before, so that the graph need not.
at::Tensor take_counters(const CudaContext& context, int64_t count, const at::Tensor& x);

}  // namespace dcx
