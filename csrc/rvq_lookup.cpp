#include "../kernels/rvq_lookup/params.h"

#include <torch/library.h>

#include <limits>

#include "rvq.h"

namespace dcx {
namespace {

at::Tensor rvq_lookup_cpu(const at::Tensor& codes,        // [B, q, F] integers, q <= Q
                          const at::Tensor& codebooks,    // [Q, N, D]
                          const at::Tensor& out_weight,   // [Q, C, D]
                          const at::Tensor& out_bias,     // [Q, C]
                          const OptionalTensor& addend,   // [B, C, F] f32|f64|bf16|f16
                          const OptionalTensor& lengths,  // [B] i64
                          bool channels_last,
                          const OptionalTensor& packed) {  // as pack_rvq made it
  const char* op = "rvq_lookup";
  DCX_CHECK(codes.dim() == 3, op, ": codes must be [B, q, F], got ", shape_text(codes));
  DCX_CHECK(c10::isIntegralType(codes.scalar_type(), false), op, ": codes must be integers, got ", codes.scalar_type());
  const RvqLayout layout = check_quantizer(op, codebooks, out_weight, out_bias, codes);
  DCX_CHECK(codes.size(1) >= 1 && codes.size(1) <= layout.stages, op, ": codes must have 1..", layout.stages,
            " stages, got ", shape_text(codes));

  RvqLookupParams p{};
  p.layout = layout;
  p.batch = codes.size(0);
  p.used = codes.size(1);
  p.frames = codes.size(2);
  const bool has_addend = addend.has_value() && addend->defined();
  if (has_addend) check_shape(op, "addend", *addend, {p.batch, layout.channels, p.frames}, "[B, C, F]", codes);
  const at::Tensor& like = has_addend ? *addend : out_weight;
  const at::Tensor length_values = check_lengths(op, lengths, p.batch, p.frames);
  const at::ScalarType dtype = accumulate_dtype(like.scalar_type());
  const at::Tensor values = packed_or(op, packed, layout.total(), like, [&] {
    return pack_quantizer(layout, at::Tensor(), at::Tensor(), codebooks, out_weight, out_bias, dtype);
  });
  const at::Tensor code_values = codes.to(at::kLong).contiguous();
  at::Tensor y = empty_signal(p.batch, layout.channels, p.frames, like.options(),
                              has_addend ? is_channels_last(*addend) : channels_last);
  if (y.numel() == 0) return y;
  int64_t error = std::numeric_limits<int64_t>::max();
  p.codes = code_values.const_data_ptr<int64_t>();
  p.y = view_of(y);
  if (has_addend) p.addend = view_of(*addend);
  p.packed = values.const_data_ptr();
  p.lengths = data_or_null<int64_t>(length_values);
  p.is_double = dtype == at::kDouble;
  p.error = &error;
  launch_rvq_lookup_cpu(p);
  if (error != std::numeric_limits<int64_t>::max()) {
    const int64_t batch = error / (p.used * p.frames), stage = error / p.frames % p.used, frame = error % p.frames;
    DCX_CHECK(false, op, ": codes must be in [0, ", layout.entries, "), got ", p.codes[error], " at batch ", batch,
              ", stage ", stage, ", frame ", frame);
  }
  return y;
}

}  // namespace
}  // namespace dcx

TORCH_LIBRARY_IMPL(dualcodec_ext, CPU, m) { m.impl("rvq_lookup", dcx::rvq_lookup_cpu); }
