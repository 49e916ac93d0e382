// What brings codes to a recording's inputs. Included where DCX_WITH_CUDA is defined alone.
#pragma once
#include <ATen/core/Tensor.h>

#include "../kernels/take_codes/params.h"

namespace dcx {

// How codes [B, q, F] int64 come to `to` [B, q, W] int64 contiguous, W >= F, on the same GPU.
CodesTaken codes_part(const at::Tensor& to, const at::Tensor& codes, int64_t entries);

// Where a GPU finds one int64 in pinned memory.
int64_t* pinned_on_device(const at::Tensor& value);

}  // namespace dcx
