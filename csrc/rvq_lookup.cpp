#include "../kernels/rvq_lookup/params.h"

#include <torch/library.h>

#include "rvq.h"
#ifdef DCX_WITH_CUDA
#include <ATen/ops/full.h>
#endif

namespace dcx {
namespace {

// What both devices' calls need besides the parameters.
struct Lookup {
  RvqLookupParams p{};
  at::Tensor like;  // the addend, or out_weight: gives the output's dtype
  bool has_addend = false;
  at::Tensor codes;  // int64, contiguous
};

// Checks every argument but the lengths and the packed weight, and fills in what does not depend on the device.
Lookup check_rvq_lookup(const at::Tensor& codes, const at::Tensor& codebooks, const at::Tensor& out_weight,
                        const at::Tensor& out_bias, const OptionalTensor& addend) {
  const char* op = "rvq_lookup";
  DCX_CHECK(codes.dim() == 3, op, ": codes must be [B, q, F], got ", shape_text(codes));
  DCX_CHECK(c10::isIntegralType(codes.scalar_type(), false), op, ": codes must be integers, got ", codes.scalar_type());
  const RvqLayout layout = check_quantizer(op, codebooks, out_weight, out_bias, codes);
  DCX_CHECK(codes.size(1) >= 1 && codes.size(1) <= layout.stages, op, ": codes must have 1..", layout.stages,
            " stages, got ", shape_text(codes));
  Lookup call;
  RvqLookupParams& p = call.p;
  p.layout = layout;
  p.batch = codes.size(0);
  p.used = codes.size(1);
  p.frames = codes.size(2);
  call.like = out_weight;
  if (addend.has_value() && addend->defined()) {
    check_shape(op, "addend", *addend, {p.batch, layout.channels, p.frames}, "[B, C, F]", codes);
    p.addend = view_of(*addend);
    call.like = *addend;
    call.has_addend = true;
  }
  return call;
}

// The output; a new one is laid out as the addend is where there is one.
at::Tensor lookup_output(const Lookup& call, const OptionalTensor& out, bool channels_last) {
  const RvqLookupParams& p = call.p;
  if (out.has_value()) return output_signal("rvq_lookup", out, p.batch, p.layout.channels, p.frames, call.like);
  return empty_signal(p.batch, p.layout.channels, p.frames, call.like.options(),
                      call.has_addend ? is_channels_last(call.like) : channels_last);
}

[[noreturn]] void refuse_code(const RvqLookupParams& p, int64_t position, int64_t code) {
  const int64_t batch = position / (p.used * p.frames), stage = position / p.frames % p.used;
  DCX_CHECK(false, "rvq_lookup: codes must be in [0, ", p.layout.entries, "), got ", code, " at batch ", batch,
            ", stage ", stage, ", frame ", position % p.frames);
}

// Where a call that is given `error` notes the lowest flat position of a code out of range, instead of raising; a call
// of several leaves the lowest of all.
int64_t* noted(const OptionalTensor& error, const at::Tensor& codes) {
  if (!error.has_value()) return nullptr;
  DCX_CHECK(error->numel() == 1 && error->scalar_type() == at::kLong && error->device() == codes.device(),
            "rvq_lookup: error must be one int64 on ", codes.device(), " as the codes are, got ", error->scalar_type(),
            " ", shape_text(*error), " on ", error->device());
  return error->mutable_data_ptr<int64_t>();
}

at::Tensor rvq_lookup_cpu(const OptionalTensor& error,    // [1] i64, see noted
                          const OptionalTensor& out,      // [B, C, F]; may be the addend itself
                          const at::Tensor& codes,        // [B, q, F] integers, q <= Q
                          const at::Tensor& codebooks,    // [Q, N, D]
                          const at::Tensor& out_weight,   // [Q, C, D]
                          const at::Tensor& out_bias,     // [Q, C]
                          const OptionalTensor& addend,   // [B, C, F] f32|f64|bf16|f16
                          const OptionalTensor& lengths,  // [B] i64
                          bool channels_last,
                          const OptionalTensor& packed) {  // as pack_rvq made it
  const char* op = "rvq_lookup";
  Lookup call = check_rvq_lookup(codes, codebooks, out_weight, out_bias, addend);
  RvqLookupParams& p = call.p;
  const at::Tensor length_values = check_lengths(op, lengths, p.batch, p.frames);
  const at::ScalarType dtype = accumulate_dtype(call.like.scalar_type());
  const at::Tensor values = packed_or(op, packed, p.layout.total(), dtype, [&] {
    return pack_quantizer(p.layout, at::Tensor(), at::Tensor(), codebooks, out_weight, out_bias, dtype);
  });
  const at::Tensor code_values = codes.to(at::kLong).contiguous();
  const at::Tensor y = lookup_output(call, out, channels_last);
  if (y.numel() == 0) return y;
  int64_t position = kNoWrongCode;
  int64_t* note = noted(error, codes);
  p.codes = code_values.const_data_ptr<int64_t>();
  p.y = view_of(y);
  p.packed = values.const_data_ptr();
  p.lengths = data_or_null<int64_t>(length_values);
  p.is_double = dtype == at::kDouble;
  p.error = note != nullptr ? note : &position;
  launch_rvq_lookup_cpu(p);
  if (position != kNoWrongCode) refuse_code(p, position, p.codes[position]);
  return y;
}

#ifdef DCX_WITH_CUDA

// Waits for the kernel, to raise on a code out of range. A stream that captures a CUDA graph can't be waited for: there
// the frames of such codes are NaN, and whoever replays the graph checks its codes, or gives `noting` (see noted).
at::Tensor rvq_lookup_cuda(const OptionalTensor& noting, const OptionalTensor& out, const at::Tensor& codes,
                           const at::Tensor& codebooks, const at::Tensor& out_weight, const at::Tensor& out_bias,
                           const OptionalTensor& addend, const OptionalTensor& lengths, bool channels_last,
                           const OptionalTensor& packed) {
  const char* op = "rvq_lookup";
  Lookup call = check_rvq_lookup(codes, codebooks, out_weight, out_bias, addend);
  RvqLookupParams& p = call.p;
  check_cuda_dtype(op, call.has_addend ? "addend" : "out_weight", call.like);
  const c10::cuda::CUDAGuard guard(codes.device());
  const at::Tensor length_values = device_lengths(op, lengths, p.batch, p.frames, codes);
  const at::Tensor values = cuda_packed_quantizer(op, packed, p.layout, call.like, [&] {
    return pack_quantizer(p.layout, at::Tensor(), at::Tensor(), codebooks, out_weight, out_bias, at::kFloat);
  });
  const at::Tensor code_values = codes.to(at::kLong).contiguous();
  at::Tensor y = lookup_output(call, out, channels_last);
  if (y.numel() == 0) return y;
  const CudaContext context = cuda_context();
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(static_cast<cudaStream_t>(context.stream), &capture));
  at::Tensor error;
  p.error = noted(noting, codes);
  if (p.error == nullptr && capture == cudaStreamCaptureStatusNone) {
    error = at::full({1}, kNoWrongCode, code_values.options());
    p.error = error.mutable_data_ptr<int64_t>();
  }
  p.codes = code_values.const_data_ptr<int64_t>();
  p.y = view_of(y);
  p.packed = values.const_data_ptr();
  p.lengths = data_or_null<int64_t>(length_values);
  launch_rvq_lookup_cuda(context, p);
  if (error.defined()) {
    const int64_t position = error.item<int64_t>();
    if (position != kNoWrongCode)
      refuse_code(p, position, code_values.reshape({-1}).select(0, position).item<int64_t>());
  }
  return y;
}

#endif  // DCX_WITH_CUDA

// The op and its overload `out` over one of the functions above.
template <auto kInto>
at::Tensor look_up(const at::Tensor& codes, const at::Tensor& codebooks, const at::Tensor& out_weight,
                   const at::Tensor& out_bias, const OptionalTensor& addend, const OptionalTensor& lengths,
                   bool channels_last, const OptionalTensor& packed) {
  return kInto(std::nullopt, std::nullopt, codes, codebooks, out_weight, out_bias, addend, lengths, channels_last,
               packed);
}
template <auto kInto>
void look_up_into(const at::Tensor& codes, const at::Tensor& codebooks, const at::Tensor& out_weight,
                  const at::Tensor& out_bias, const OptionalTensor& addend, const OptionalTensor& lengths,
                  bool channels_last, const OptionalTensor& packed, const OptionalTensor& error, at::Tensor& out) {
  kInto(error, out, codes, codebooks, out_weight, out_bias, addend, lengths, channels_last, packed);
}

}  // namespace
}  // namespace dcx

TORCH_LIBRARY_IMPL(dualcodec_ext, CPU, m) {
  m.impl("rvq_lookup", dcx::look_up<&dcx::rvq_lookup_cpu>);
  m.impl("rvq_lookup.out", dcx::look_up_into<&dcx::rvq_lookup_cpu>);
}

#ifdef DCX_WITH_CUDA
TORCH_LIBRARY_IMPL(dualcodec_ext, CUDA, m) {
  m.impl("rvq_lookup", dcx::look_up<&dcx::rvq_lookup_cuda>);
  m.impl("rvq_lookup.out", dcx::look_up_into<&dcx::rvq_lookup_cuda>);
}
#endif
