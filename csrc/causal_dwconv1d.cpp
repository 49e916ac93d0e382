#include <torch/library.h>

#include "../kernels/causal_dwconv1d/params.h"
#include "../kernels/common/conv_shape.h"
#include "checks.h"
#include "program.h"
#ifdef DCX_WITH_CUDA
#include "cuda.h"
#endif

namespace dcx {
namespace {

constexpr int64_t kMaxTaps = 64;

// Checks what does not depend on the device and fills it in.
CausalDwconv1dParams check_causal_dwconv1d(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef padding,
                                           const OptionalTensor& ln_weight, const OptionalTensor& ln_bias, double eps) {
  const char* op = "causal_dwconv1d";
  check_signal(op, "x", x);
  const int64_t channels = x.size(1);
  DCX_CHECK(channels > 0, op, ": x must have at least one channel, got ", shape_text(x));
  DCX_CHECK(weight.dim() == 2 && weight.size(0) == channels && weight.size(1) >= 1 && weight.size(1) <= kMaxTaps, op,
            ": weight must be [C, K] with C = ", channels, " and K in 1..", kMaxTaps, ", got ", shape_text(weight));
  check_shape(op, "weight", weight, weight.sizes(), "[C, K]", x);
  check_padding(op, padding);
  const bool has_ln_bias = ln_bias.has_value() && ln_bias->defined();
  const bool has_norm = ln_weight.has_value() && ln_weight->defined();
  DCX_CHECK(has_norm || !has_ln_bias, op, ": ln_bias must come with ln_weight, got ln_bias alone");

  CausalDwconv1dParams p{};
  p.batch = x.size(0);
  p.channels = channels;
  p.in_steps = x.size(2);
  p.taps = weight.size(1);
  p.pad_left = padding[0];
  p.pad_right = padding[1];
  p.eps = eps;
  p.out_steps = conv_output_steps(p.in_steps, p.taps, 1, 1, p.pad_left, p.pad_right);
  p.x = view_of(x);
  return p;
}

at::Tensor causal_dwconv1d_cpu(const OptionalTensor& out,   // [B, C, T'], x's dtype
                               const at::Tensor& x,         // [B, C, T] f32|f64|bf16|f16
                               const at::Tensor& weight,    // [C, K]
                               const OptionalTensor& bias,  // [C]
                               at::IntArrayRef padding,
                               const OptionalTensor& ln_weight,  // [C]
                               const OptionalTensor& ln_bias,    // [C]
                               double eps,
                               const OptionalTensor& lengths) {  // [B] i64
  const char* op = "causal_dwconv1d";
  CausalDwconv1dParams p = check_causal_dwconv1d(x, weight, padding, ln_weight, ln_bias, eps);
  const bool has_norm = ln_weight.has_value() && ln_weight->defined();
  const at::Tensor length_values = check_lengths(op, lengths, p.batch, p.in_steps);
  const at::Tensor bias_values = padded_bias(op, "bias", bias, p.channels, x);
  const at::Tensor norm_weight = has_norm ? padded_bias(op, "ln_weight", ln_weight, p.channels, x) : at::Tensor();
  const at::Tensor norm_bias = has_norm ? padded_bias(op, "ln_bias", ln_bias, p.channels, x) : at::Tensor();
  // A weight that lies [K][C] already is read where it is: a copy costs as much as a few rows.
  at::Tensor taps_first = weight.detach().to(bias_values.scalar_type()).t();
  if (!taps_first.is_contiguous() || p.channels % kColumnUnit != 0) {
    taps_first = at::zeros({p.taps, round_up(p.channels, kColumnUnit)}, bias_values.options());
    taps_first.narrow(1, 0, p.channels).copy_(weight.detach().t());
  }
  at::Tensor y = output_signal(op, out, p.batch, p.channels, p.out_steps, x);
  if (y.numel() == 0) return y;
  p.y = view_of(y);
  p.weight = taps_first.const_data_ptr();
  p.bias = bias_values.const_data_ptr();
  p.ln_weight = has_norm ? norm_weight.const_data_ptr() : nullptr;
  p.ln_bias = has_norm ? norm_bias.const_data_ptr() : nullptr;
  p.lengths = data_or_null<int64_t>(length_values);
  launch(launch_causal_dwconv1d_cpu, p, x, y, taps_first, bias_values, norm_weight, norm_bias, length_values);
  return y;
}

#ifdef DCX_WITH_CUDA

// Contiguous float32 weights go to the kernel as they are: one launch and no other.
at::Tensor causal_dwconv1d_cuda(const OptionalTensor& out, const at::Tensor& x, const at::Tensor& weight,
                                const OptionalTensor& bias, at::IntArrayRef padding, const OptionalTensor& ln_weight,
                                const OptionalTensor& ln_bias, double eps, const OptionalTensor& lengths) {
  const char* op = "causal_dwconv1d";
  CausalDwconv1dParams p = check_causal_dwconv1d(x, weight, padding, ln_weight, ln_bias, eps);
  check_cuda_dtype(op, "x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor length_values = device_lengths(op, lengths, p.batch, p.in_steps, x);
  const at::Tensor weight_values = weight.detach().to(at::kFloat).contiguous();
  const at::Tensor bias_values = small_vector(op, "bias", bias, p.channels, x);
  const at::Tensor norm_weight = small_vector(op, "ln_weight", ln_weight, p.channels, x);
  const at::Tensor norm_bias = small_vector(op, "ln_bias", ln_bias, p.channels, x);
  at::Tensor y = output_signal(op, out, p.batch, p.channels, p.out_steps, x);
  if (y.numel() == 0) return y;
  p.y = view_of(y);
  p.weight = weight_values.const_data_ptr();
  p.bias = data_or_null<float>(bias_values);
  p.ln_weight = data_or_null<float>(norm_weight);
  p.ln_bias = data_or_null<float>(norm_bias);
  p.lengths = data_or_null<int64_t>(length_values);
  p.weights_stand = weight_values.is_alias_of(weight) && is_given(bias_values, bias) &&
                    is_given(norm_weight, ln_weight) && is_given(norm_bias, ln_bias);
  launch_causal_dwconv1d_cuda(cuda_context(), p);
  return y;
}

#endif  // DCX_WITH_CUDA

}  // namespace
}  // namespace dcx

TORCH_LIBRARY_IMPL(dualcodec_ext, CPU, m) {
  m.impl("causal_dwconv1d", dcx::WithOut<&dcx::causal_dwconv1d_cpu>::functional);
  m.impl("causal_dwconv1d.out", dcx::WithOut<&dcx::causal_dwconv1d_cpu>::out);
}

#ifdef DCX_WITH_CUDA
TORCH_LIBRARY_IMPL(dualcodec_ext, CUDA, m) {
  m.impl("causal_dwconv1d", dcx::WithOut<&dcx::causal_dwconv1d_cuda>::functional);
  m.impl("causal_dwconv1d.out", dcx::WithOut<&dcx::causal_dwconv1d_cuda>::out);
}
#endif
