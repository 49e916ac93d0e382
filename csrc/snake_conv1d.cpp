#include <torch/library.h>

#include <string_view>

#include "../kernels/common/conv_shape.h"
#include "../kernels/common/gemm_pack.h"
#include "../kernels/snake_conv1d/params.h"
#include "checks.h"

namespace dcx {
namespace {

Activation parse_activation(std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "tanh") return Activation::kTanh;
  DCX_CHECK(name == "gelu", "snake_conv1d: activation must be 'none', 'tanh' or 'gelu', got '", name, "'");
  return Activation::kGelu;
}

template <class T>
at::Tensor pack_as(const at::Tensor& weight) {
  const at::Tensor values = weight.detach().to(c10::CppTypeToScalarType<T>::value).contiguous();
  const int64_t columns = values.size(0), channels = values.size(1), taps = values.size(2);
  at::Tensor packed = at::empty({taps * channels * round_up(columns, kColumnUnit)}, values.options());
  pack_panels(packed.mutable_data_ptr<T>(), values.const_data_ptr<T>(), taps, channels, columns, 1, taps,
              channels * taps);
  return packed;
}

at::Tensor pack_conv1d_cpu(const at::Tensor& weight) {  // [Cout, Cin, K]
  DCX_CHECK(weight.dim() == 3, "pack_conv1d: weight must be [Cout, Cin, K], got ", shape_text(weight));
  check_float("pack_conv1d", "weight", weight);
  return weight.scalar_type() == at::kDouble ? pack_as<double>(weight) : pack_as<float>(weight);
}

at::Tensor snake_conv1d_cpu(const at::Tensor& x,          // [B, Cin, T] f32|f64|bf16|f16
                            const at::Tensor& weight,     // [Cout, Cin, K]
                            const OptionalTensor& bias,   // [Cout]
                            const OptionalTensor& alpha,  // [Cin]
                            int64_t stride, int64_t dilation, at::IntArrayRef padding, c10::string_view activation,
                            const OptionalTensor& residual,  // [B, Cout, T']
                            const OptionalTensor& lengths,   // [B] i64
                            const OptionalTensor& packed) {
  const char* op = "snake_conv1d";
  check_signal(op, "x", x);
  DCX_CHECK(weight.dim() == 3 && weight.size(1) == x.size(1), op,
            ": weight must be [Cout, Cin, K] with Cin = ", x.size(1), ", got ", shape_text(weight));
  DCX_CHECK(weight.size(0) > 0 && weight.size(1) > 0 && weight.size(2) > 0, op, ": weight must not be empty, got ",
            shape_text(weight));
  check_float(op, "weight", weight);
  DCX_CHECK(stride >= 1, op, ": stride must be at least 1, got ", stride);
  DCX_CHECK(dilation >= 1, op, ": dilation must be at least 1, got ", dilation);
  check_padding(op, padding);

  SnakeConv1dParams p{};
  p.batch = x.size(0);
  p.in_channels = x.size(1);
  p.in_steps = x.size(2);
  p.out_channels = weight.size(0);
  p.taps = weight.size(2);
  p.stride = stride;
  p.dilation = dilation;
  p.pad_left = padding[0];
  p.pad_right = padding[1];
  p.activation = parse_activation(std::string_view(activation.data(), activation.size()));
  p.out_steps = conv_output_steps(p.in_steps, p.taps, stride, dilation, p.pad_left, p.pad_right);

  const at::Tensor length_values = check_lengths(op, lengths, p.batch, p.in_steps);
  const at::Tensor bias_values = padded_bias(op, "bias", bias, p.out_channels, x);
  const at::Tensor alpha_values = small_vector(op, "alpha", alpha, p.in_channels, x);
  at::Tensor y = empty_signal(p.batch, p.out_channels, p.out_steps, x.options(), is_channels_last(x));
  if (residual.has_value() && residual->defined()) {
    check_shape(op, "residual", *residual, y.sizes(), "[B, Cout, T']", x);
    p.residual = view_of(*residual);
  }
  const at::Tensor panels = packed_or(op, packed, p.taps * p.in_channels * round_up(p.out_channels, kColumnUnit), x,
                                      [&] { return pack_conv1d_cpu(weight.to(accumulate_dtype(x.scalar_type()))); });
  if (y.numel() == 0) return y;
  p.x = view_of(x);
  p.y = view_of(y);
  p.weight = panels.const_data_ptr();
  p.bias = bias_values.const_data_ptr();
  p.alpha = alpha_values.defined() ? alpha_values.const_data_ptr() : nullptr;
  p.lengths = data_or_null<int64_t>(length_values);
  launch_snake_conv1d_cpu(p);
  return y;
}

}  // namespace
}  // namespace dcx

TORCH_LIBRARY_IMPL(dualcodec_ext, CPU, m) {
  m.impl("snake_conv1d", dcx::snake_conv1d_cpu);
  m.impl("pack_conv1d", dcx::pack_conv1d_cpu);
}
