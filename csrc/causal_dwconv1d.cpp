#include <torch/library.h>

#include "../kernels/causal_dwconv1d/params.h"
#include "../kernels/common/conv_shape.h"
#include "checks.h"

namespace dcx {
namespace {

constexpr int64_t kMaxTaps = 64;

at::Tensor causal_dwconv1d_cpu(const at::Tensor& x,         // [B, C, T] f32|f64|bf16|f16
                               const at::Tensor& weight,    // [C, K]
                               const OptionalTensor& bias,  // [C]
                               at::IntArrayRef padding,
                               const OptionalTensor& ln_weight,  // [C]
                               const OptionalTensor& ln_bias,    // [C]
                               double eps,
                               const OptionalTensor& lengths) {  // [B] i64
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

  const at::Tensor length_values = check_lengths(op, lengths, p.batch, p.in_steps);
  const at::Tensor bias_values = padded_bias(op, "bias", bias, channels, x);
  const at::Tensor norm_weight = has_norm ? padded_bias(op, "ln_weight", ln_weight, channels, x) : at::Tensor();
  const at::Tensor norm_bias = has_norm ? padded_bias(op, "ln_bias", ln_bias, channels, x) : at::Tensor();
  at::Tensor taps_first = at::zeros({p.taps, round_up(channels, kColumnUnit)}, bias_values.options());
  taps_first.narrow(1, 0, channels).copy_(weight.detach().t());
  at::Tensor y = empty_signal(p.batch, channels, p.out_steps, x.options(), is_channels_last(x));
  if (y.numel() == 0) return y;
  p.x = view_of(x);
  p.y = view_of(y);
  p.weight = taps_first.const_data_ptr();
  p.bias = bias_values.const_data_ptr();
  p.ln_weight = has_norm ? norm_weight.const_data_ptr() : nullptr;
  p.ln_bias = has_norm ? norm_bias.const_data_ptr() : nullptr;
  p.lengths = data_or_null<int64_t>(length_values);
  launch_causal_dwconv1d_cpu(p);
  return y;
}

}  // namespace
}  // namespace dcx

TORCH_LIBRARY_IMPL(dualcodec_ext, CPU, m) { m.impl("causal_dwconv1d", dcx::causal_dwconv1d_cpu); }
