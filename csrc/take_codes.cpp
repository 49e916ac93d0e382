#include "../kernels/take_codes/params.h"

#include <torch/library.h>

#include "checks.h"
#ifdef DCX_WITH_CUDA
#include "cuda.h"
#include "take_codes.h"

namespace dcx {

CodesTaken codes_part(const at::Tensor& to, const at::Tensor& codes, int64_t entries) {
  CodesTaken part{};
  part.from = codes.const_data_ptr<int64_t>();
  part.to = to.mutable_data_ptr<int64_t>();
  part.stride_b = codes.stride(0);
  part.stride_q = codes.stride(1);
  part.stride_f = codes.stride(2);
  part.stages = codes.size(1);
  part.entries = entries;
  part.to_frames = to.size(2);
  return part;
}

int64_t* pinned_on_device(const at::Tensor& value) {
  cudaPointerAttributes told{};
  C10_CUDA_CHECK(cudaPointerGetAttributes(&told, value.const_data_ptr<int64_t>()));
  DCX_CHECK(told.type == cudaMemoryTypeHost && told.devicePointer != nullptr, "take_codes",
            ": wrong must lie in pinned memory");
  return static_cast<int64_t*>(told.devicePointer);
}

namespace {

// `values` holds what the parameters point to.
CodesTaken codes_taken(const at::Tensor& to, const at::Tensor& codes, int64_t entries, const at::Tensor& like,
                       at::Tensor& values) {
  const char* op = "take_codes";
  DCX_CHECK(codes.dim() == 3 && codes.size(0) == like.size(0) && codes.size(2) == like.size(2), op,
            ": codes must be [B, q, F] of the same B and F, got ", shape_text(codes), " and ", shape_text(like));
  DCX_CHECK(c10::isIntegralType(codes.scalar_type(), false), op, ": codes must be integers, got ", codes.scalar_type());
  DCX_CHECK(codes.is_cuda() && codes.device() == like.device(), op, ": codes must be on one CUDA device, got ",
            codes.device(), " and ", like.device());
  DCX_CHECK(to.dim() == 3 && to.size(0) == codes.size(0) && to.size(1) == codes.size(1) &&
                to.size(2) >= codes.size(2) && to.scalar_type() == at::kLong && to.is_contiguous() &&
                to.device() == codes.device(),
            op, ": what codes ", shape_text(codes), " are copied to must be int64, contiguous, on ", codes.device(),
            " and of as many frames or more, got ", to.scalar_type(), " ", shape_text(to), " on ", to.device());
  values = codes.to(at::kLong);
  return codes_part(to, values, entries);
}

void take_codes_cuda(at::Tensor& to,           // [B, q, W] i64, W >= F
                     const at::Tensor& codes,  // [B, q, F] integers
                     int64_t entries, const OptionalTensor& more_to, const OptionalTensor& more_codes,
                     int64_t more_entries,
                     at::Tensor& wrong) {  // [1] i64 in pinned memory
  const char* op = "take_codes";
  DCX_CHECK(more_to.has_value() == more_codes.has_value(), op, ": more_to and more_codes must come together");
  DCX_CHECK(wrong.is_cpu() && wrong.numel() == 1 && wrong.scalar_type() == at::kLong, op,
            ": wrong must be one int64 in pinned memory, got ", wrong.scalar_type(), " ", shape_text(wrong), " on ",
            wrong.device());
  at::Tensor values, more_values;
  const c10::cuda::CUDAGuard guard(to.device());
  TakeCodesParams p{};
  p.parts[0] = codes_taken(to, codes, entries, codes, values);
  if (more_codes.has_value()) p.parts[1] = codes_taken(*more_to, *more_codes, more_entries, codes, more_values);
  p.batch = codes.size(0);
  p.frames = codes.size(2);
  p.wrong = pinned_on_device(wrong);
  launch_take_codes_cuda(cuda_context(), p);
}

}  // namespace
}  // namespace dcx

TORCH_LIBRARY_IMPL(dualcodec_ext, CUDA, m) { m.impl("take_codes", dcx::take_codes_cuda); }
#endif  // DCX_WITH_CUDA
