#include <torch/library.h>

#include <string_view>

#include "../kernels/common/conv_shape.h"
#include "../kernels/snake_conv1d/params.h"
#include "checks.h"
#include "packing.h"
#include "program.h"
#ifdef DCX_WITH_CUDA
#include <ATen/ops/constant_pad_nd.h>

#include "../kernels/common/conv_geometry.h"
#include "cuda.h"
#endif

namespace dcx {
namespace {

Activation parse_activation(std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "tanh") return Activation::kTanh;
  DCX_CHECK(name == "gelu", "snake_conv1d: activation must be 'none', 'tanh' or 'gelu', got '", name, "'");
  return Activation::kGelu;
}

// Elements of packed weights: bfloat16 takes one channel's taps as channels, so that they lie in pairs.
int64_t conv1d_numel(at::ScalarType dtype, int64_t taps, int64_t channels, int64_t columns) {
  const bool unfolded = dtype == at::kBFloat16 && channels == 1;
  return unfolded ? panels_numel(dtype, 1, taps, columns) : panels_numel(dtype, taps, channels, columns);
}

at::Tensor pack_conv1d_cpu(const at::Tensor& weight,  // [Cout, Cin, K]
                           int64_t /* stride */, int64_t /* dilation */) {
  DCX_CHECK(weight.dim() == 3, "pack_conv1d: weight must be [Cout, Cin, K], got ", shape_text(weight));
  check_float("pack_conv1d", "weight", weight);
  const at::ScalarType dtype = packed_dtype(weight.scalar_type());
  const at::Tensor values = weight.detach().to(accumulate_dtype(weight.scalar_type())).contiguous();
  const int64_t columns = values.size(0), channels = values.size(1), taps = values.size(2);
  at::Tensor packed = empty_weights(conv1d_numel(dtype, taps, channels, columns), values.options().dtype(dtype));
  if (dtype == at::kBFloat16 && channels == 1)
    pack_panels_into(packed, 0, values, 1, taps, columns, 0, 1, taps);
  else
    pack_panels_into(packed, 0, values, taps, channels, columns, 1, taps, channels * taps);
  return packed;
}

// Checks every argument and fills in what does not depend on the device.
SnakeConv1dParams check_snake_conv1d(const at::Tensor& x, const at::Tensor& weight, int64_t stride, int64_t dilation,
                                     at::IntArrayRef padding, c10::string_view activation,
                                     const OptionalTensor& residual) {
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
  p.x = view_of(x);
  if (residual.has_value() && residual->defined()) {
    check_shape(op, "residual", *residual, {p.batch, p.out_channels, p.out_steps}, "[B, Cout, T']", x);
    p.residual = view_of(*residual);
  }
  return p;
}

at::Tensor snake_conv1d_cpu(const OptionalTensor& out,    // [B, Cout, T'], x's dtype
                            const at::Tensor& x,          // [B, Cin, T] f32|f64|bf16|f16
                            const at::Tensor& weight,     // [Cout, Cin, K]
                            const OptionalTensor& bias,   // [Cout]
                            const OptionalTensor& alpha,  // [Cin]
                            int64_t stride, int64_t dilation, at::IntArrayRef padding, c10::string_view activation,
                            const OptionalTensor& residual,  // [B, Cout, T']
                            const OptionalTensor& lengths,   // [B] i64
                            const OptionalTensor& packed) {
  const char* op = "snake_conv1d";
  SnakeConv1dParams p = check_snake_conv1d(x, weight, stride, dilation, padding, activation, residual);
  const at::Tensor length_values = check_lengths(op, lengths, p.batch, p.in_steps);
  // The only column of many channels is summed without a panel, and so without padding, which would be allocated.
  at::Tensor bias_values;
  if (p.out_channels == 1 && p.in_channels > 1) bias_values = small_vector(op, "bias", bias, 1, x);
  if (!bias_values.defined()) bias_values = padded_bias(op, "bias", bias, p.out_channels, x);
  const at::Tensor alpha_values = small_vector(op, "alpha", alpha, p.in_channels, x);
  at::Tensor y = output_signal(op, out, p.batch, p.out_channels, p.out_steps, x);
  const at::ScalarType dtype = packed_dtype(x.scalar_type());
  const at::Tensor panels = packed_or(op, packed, conv1d_numel(dtype, p.taps, p.in_channels, p.out_channels), dtype,
                                      [&] { return pack_conv1d_cpu(weight.to(dtype), 1, 1); });
  if (y.numel() == 0) return y;
  p.y = view_of(y);
  p.weight = panels.const_data_ptr();
  p.bias = bias_values.const_data_ptr();
  p.alpha = alpha_values.defined() ? alpha_values.const_data_ptr() : nullptr;
  p.lengths = data_or_null<int64_t>(length_values);
  launch(launch_snake_conv1d_cpu, p, x, y, panels, bias_values, alpha_values, residual, length_values);
  return y;
}

#ifdef DCX_WITH_CUDA

// [taps][channels_padded][columns_padded] in the weight's dtype: the taps and channels of conv_geometry.h.
at::Tensor pack_conv1d_cuda(const at::Tensor& weight, int64_t stride, int64_t dilation) {  // [Cout, Cin, K]
  DCX_CHECK(weight.dim() == 3, "pack_conv1d: weight must be [Cout, Cin, K], got ", shape_text(weight));
  check_cuda_dtype("pack_conv1d", "weight", weight);
  const c10::cuda::CUDAGuard guard(weight.device());
  const int64_t columns = weight.size(0), channels = weight.size(1), taps = weight.size(2);
  const ConvGeometry geometry = conv_geometry(channels, taps, stride, dilation);
  const at::Tensor rows = weight.detach()
                              .reshape({columns, channels, geometry.taps, geometry.fold})
                              .permute({2, 3, 1, 0})
                              .reshape({geometry.taps, geometry.channels, columns});
  return at::constant_pad_nd(
             rows, {0, round_up(columns, kColumnUnit) - columns, 0, geometry.channels_padded() - geometry.channels})
      .contiguous()
      .flatten();
}

at::Tensor snake_conv1d_cuda(const OptionalTensor& out, const at::Tensor& x, const at::Tensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& alpha, int64_t stride, int64_t dilation,
                             at::IntArrayRef padding, c10::string_view activation, const OptionalTensor& residual,
                             const OptionalTensor& lengths, const OptionalTensor& packed) {
  const char* op = "snake_conv1d";
  SnakeConv1dParams p = check_snake_conv1d(x, weight, stride, dilation, padding, activation, residual);
  check_cuda_dtype(op, "x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor length_values = device_lengths(op, lengths, p.batch, p.in_steps, x);
  const at::Tensor bias_values = small_vector(op, "bias", bias, p.out_channels, x);
  const at::Tensor alpha_values = small_vector(op, "alpha", alpha, p.in_channels, x);
  // The kernel reads and writes one element type.
  const at::Tensor extra = p.residual.data != nullptr ? residual->to(x.scalar_type()) : at::Tensor();
  if (extra.defined()) p.residual = view_of(extra);
  at::Tensor y = output_signal(op, out, p.batch, p.out_channels, p.out_steps, x);
  const ConvGeometry geometry = conv_geometry(p.in_channels, p.taps, stride, dilation);
  const int64_t numel = geometry.taps * geometry.channels_padded() * round_up(p.out_channels, kColumnUnit);
  const at::Tensor values = cuda_packed_or(
      op, packed, numel, x, [&] { return pack_conv1d_cuda(weight.to(x.scalar_type()), stride, dilation); });
  if (y.numel() == 0) return y;
  p.y = view_of(y);
  p.weight = values.const_data_ptr();
  p.bias = data_or_null<float>(bias_values);
  p.alpha = data_or_null<float>(alpha_values);
  p.lengths = data_or_null<int64_t>(length_values);
  const CudaContext context = cuda_context();
  ConvGemmPlan plan = plan_snake_conv1d_cuda(context, p);
  start_plan(context, plan, x,
             is_given(values, packed) && is_given(bias_values, bias) && is_given(alpha_values, alpha));
  return y;
}

#endif  // DCX_WITH_CUDA

}  // namespace
}  // namespace dcx

TORCH_LIBRARY_IMPL(dualcodec_ext, CPU, m) {
  m.impl("snake_conv1d", dcx::WithOut<&dcx::snake_conv1d_cpu>::functional);
  m.impl("snake_conv1d.out", dcx::WithOut<&dcx::snake_conv1d_cpu>::out);
  m.impl("pack_conv1d", dcx::pack_conv1d_cpu);
}

#ifdef DCX_WITH_CUDA
TORCH_LIBRARY_IMPL(dualcodec_ext, CUDA, m) {
  m.impl("snake_conv1d", dcx::WithOut<&dcx::snake_conv1d_cuda>::functional);
  m.impl("snake_conv1d.out", dcx::WithOut<&dcx::snake_conv1d_cuda>::out);
  m.impl("pack_conv1d", dcx::pack_conv1d_cuda);
}
#endif
