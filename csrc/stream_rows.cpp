#include "../kernels/stream_rows/params.h"

#include <torch/library.h>

#include "checks.h"
#ifdef DCX_WITH_CUDA
#include "cuda.h"

namespace dcx {
namespace {

void check_rows(const char* name, const at::Tensor& t, const at::Tensor& like) {
  const char* op = "stream_rows";
  DCX_CHECK(t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1), op, ": ", name,
            " must be [B, N] with stride 1 on N, got ", shape_text(t));
  check_cuda_dtype(op, name, t);
  DCX_CHECK(t.size(0) == like.size(0) && t.scalar_type() == like.scalar_type() && t.device() == like.device(), op, ": ",
            name, " must be ", like.scalar_type(), " of ", like.size(0), " rows on ", like.device(), ", got ",
            t.scalar_type(), " ", shape_text(t), " on ", t.device());
}

void check_run(const char* name, int64_t at, int64_t count, const at::Tensor& t) {
  DCX_CHECK(at >= 0 && count >= 0 && at + count <= t.size(1), "stream_rows: a run must lie in ", name, "'s ", t.size(1),
            " elements, got ", count, " from ", at, " on");
}

void stream_rows_cuda(at::Tensor& to,            // [B, N] f32|bf16|f16
                      const at::Tensor& source,  // [B, M], as to
                      at::IntArrayRef to_at, at::IntArrayRef source_at, at::IntArrayRef counts,
                      const OptionalTensor& kept,     // [B] bool
                      const OptionalTensor& error) {  // [1] i64
  const char* op = "stream_rows";
  DCX_CHECK(to_at.size() == counts.size() && source_at.size() == counts.size(), op,
            ": to_at, source_at and counts must be of one length, got ", to_at.size(), ", ", source_at.size(), " and ",
            counts.size());
  check_rows("to", to, to);
  check_rows("source", source, to);
  StreamRowsParams p{};
  p.to = to.mutable_data_ptr();
  p.source = source.const_data_ptr();
  p.to_stride = to.stride(0);
  p.source_stride = source.stride(0);
  p.batch = to.size(0);
  if (kept.has_value()) {
    DCX_CHECK(kept->dim() == 1 && kept->size(0) == p.batch && kept->scalar_type() == at::kBool &&
                  kept->is_contiguous() && kept->device() == to.device(),
              op, ": kept must be [", p.batch, "] bool on ", to.device(), ", got ", kept->scalar_type(), " ",
              shape_text(*kept));
    p.kept = kept->const_data_ptr<bool>();
  }
  if (error.has_value()) {
    DCX_CHECK(error->numel() == 1 && error->scalar_type() == at::kLong && error->device() == to.device(), op,
              ": error must be one int64 on ", to.device(), ", got ", error->scalar_type(), " ", shape_text(*error));
    p.error = error->mutable_data_ptr<int64_t>();
  }
  const c10::cuda::CUDAGuard guard(to.device());
  const CudaContext context = cuda_context();
  for (size_t i = 0; i < counts.size(); ++i) {
    check_run("to", to_at[i], counts[i], to);
    check_run("source", source_at[i], counts[i], source);
    if (counts[i] > 0) p.runs[p.run_count++] = StreamRun{to_at[i], source_at[i], counts[i], 0};
    if (p.run_count == 0 || (p.run_count < kMostStreamRuns && i + 1 < counts.size())) continue;
    launch_stream_rows_cuda(context, p, static_cast<int64_t>(to.element_size()));
    p.run_count = 0;
  }
}

}  // namespace
}  // namespace dcx

TORCH_LIBRARY_IMPL(dualcodec_ext, CUDA, m) { m.impl("stream_rows", dcx::stream_rows_cuda); }
#endif  // DCX_WITH_CUDA
