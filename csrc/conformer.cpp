#include <torch/library.h>

#include <cmath>

#include "../kernels/conformer/params.h"
#include "checks.h"
#include "packing.h"

namespace dcx {
namespace {

// [B, T, C] float32 or bfloat16.
void check_steps(const char* op, const char* name, const at::Tensor& x) {
  DCX_CHECK(x.dim() == 3, op, ": ", name, " must be [B, T, C], got ", shape_text(x));
  DCX_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, op, ": ", name,
            " must be float32 or bfloat16, got ", x.scalar_type());
}

TensorView steps_view(const at::Tensor& x) { return view_of(x.transpose(1, 2)); }

// [B, T] bool, contiguous; undefined when absent.
at::Tensor check_valid(const char* op, const OptionalTensor& valid, const at::Tensor& x) {
  if (!valid.has_value() || !valid->defined()) return at::Tensor();
  const bool fits = valid->dim() == 2 && valid->size(0) == x.size(0) && valid->size(1) == x.size(1);
  DCX_CHECK(fits && valid->scalar_type() == at::kBool, op, ": valid must be [B, T] = [", x.size(0), ", ", x.size(1),
            "] bool, got ", shape_text(*valid), " ", valid->scalar_type());
  return valid->contiguous();
}

const uint8_t* bytes_of(const at::Tensor& valid) {
  return valid.defined() ? reinterpret_cast<const uint8_t*>(valid.const_data_ptr<bool>()) : nullptr;
}

// The [C] vector as float32, padded with zeros to a multiple of `unit`.
at::Tensor padded_vector(const char* op, const char* name, const at::Tensor& vector, int64_t channels, int64_t unit) {
  DCX_CHECK(vector.dim() == 1 && vector.size(0) == channels && vector.scalar_type() == at::kFloat, op, ": ", name,
            " must be [C] = [", channels, "] float32, got ", shape_text(vector), " ", vector.scalar_type());
  if (channels % unit == 0) return vector.contiguous();
  at::Tensor padded = at::zeros({round_up(channels, unit)}, vector.options());
  padded.narrow(0, 0, channels).copy_(vector);
  return padded;
}

at::Tensor conformer_attention(const at::Tensor& projected,  // [B, T, 3 * H * D] f32|bf16: queries, keys, values
                               const at::Tensor& distances,  // [left + 1 + right, D], projected's dtype
                               int64_t heads, int64_t left,
                               const OptionalTensor& valid) {  // [B, T] bool
  const char* op = "conformer_attention";
  check_steps(op, "projected", projected);
  DCX_CHECK(heads > 0 && projected.size(2) > 0 && projected.size(2) % (3 * heads) == 0, op,
            ": projected must have 3 * D channels for each of ", heads, " heads, got ", shape_text(projected));
  const int64_t width = projected.size(2) / 3;
  ConformerAttentionParams p{};
  p.batch = projected.size(0);
  p.steps = projected.size(1);
  p.heads = heads;
  p.size = width / heads;
  p.left = left;
  const bool fits = distances.dim() == 2 && distances.size(1) == p.size && distances.size(0) > left && left >= 0;
  DCX_CHECK(fits && distances.scalar_type() == projected.scalar_type(), op, ": distances must be [more than ", left,
            ", D] = [.., ", p.size, "] ", projected.scalar_type(), ", got ", shape_text(distances), " ",
            distances.scalar_type());
  p.right = distances.size(0) - 1 - left;
  p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.size)));
  const at::Tensor mask = check_valid(op, valid, projected);
  at::Tensor y = at::empty({p.batch, p.steps, width}, projected.options());
  if (y.numel() == 0) return y;
  p.q = steps_view(projected);
  p.k = view_from(p.q, width);
  p.v = view_from(p.q, 2 * width);
  p.y = steps_view(y);
  p.distances = steps_view(distances.unsqueeze(0));
  p.valid = bytes_of(mask);
  launch_conformer_attention_cpu(p);
  return y;
}

// What both forms need; `bias_values` keeps the bias.
ConformerLinearParams check_linear(const char* op, const at::Tensor& x, const at::Tensor& packed,
                                   const OptionalTensor& bias, int64_t columns, at::Tensor& bias_values) {
  check_steps(op, "x", x);
  DCX_CHECK(x.is_contiguous() && x.size(2) > 0 && x.size(2) % 2 == 0, op,
            ": x must be contiguous with an even number of channels, got ", shape_text(x));
  DCX_CHECK(columns > 0 && columns % kColumnUnit == 0, op, ": columns must be a multiple of ", kColumnUnit, ", got ",
            columns);
  ConformerLinearParams p{};
  p.rows = x.size(0) * x.size(1);
  p.channels = x.size(2);
  p.columns = columns;
  const bool fits = packed.numel() == panels_numel(x.scalar_type(), 1, p.channels, columns) && packed.is_contiguous();
  DCX_CHECK(fits && packed.scalar_type() == x.scalar_type(), op, ": packed must be pack_conv1d's of [N, K, 1] = [",
            columns, ", ", p.channels, ", 1] ", x.scalar_type(), ", got ", shape_text(packed), " ",
            packed.scalar_type());
  if (bias.has_value() && bias->defined()) bias_values = padded_vector(op, "bias", *bias, columns, kColumnUnit);
  p.x = x.const_data_ptr();
  p.weight = packed.const_data_ptr();
  p.bias = data_or_null<float>(bias_values);
  p.dtype = kernel_dtype(x.scalar_type());
  return p;
}

at::Tensor conformer_linear(const at::Tensor& x,         // [B, T, K] f32|bf16, contiguous
                            const at::Tensor& packed,    // pack_conv1d's of the weight [N, K, 1], x's dtype
                            const OptionalTensor& bias,  // [N] f32
                            int64_t columns, bool swish) {
  at::Tensor bias_values;
  ConformerLinearParams p = check_linear("conformer_linear", x, packed, bias, columns, bias_values);
  at::Tensor y = at::empty({x.size(0), x.size(1), columns}, x.options());
  if (p.rows == 0) return y;
  p.y = y.mutable_data_ptr();
  p.swish = swish;
  launch_conformer_linear_cpu(p);
  return y;
}

// sum += alpha * (x weight^T + bias).
void conformer_linear_add(at::Tensor& sum,             // [B, T, N] f32, contiguous
                          const at::Tensor& x,         // [B, T, K] f32|bf16, contiguous
                          const at::Tensor& packed,    // pack_conv1d's of the weight [N, K, 1], x's dtype
                          const OptionalTensor& bias,  // [N] f32
                          double alpha) {
  const char* op = "conformer_linear_add";
  const bool fits = sum.dim() == 3 && x.dim() == 3 && sum.size(0) == x.size(0) && sum.size(1) == x.size(1);
  DCX_CHECK(fits && sum.scalar_type() == at::kFloat && sum.is_contiguous(), op,
            ": sum must be [B, T, N] float32, contiguous, with x's B and T, got ", shape_text(sum), " ",
            sum.scalar_type(), " for x ", shape_text(x));
  at::Tensor bias_values;
  ConformerLinearParams p = check_linear(op, x, packed, bias, sum.size(2), bias_values);
  if (p.rows == 0) return;
  p.sum = sum.mutable_data_ptr<float>();
  p.alpha = static_cast<float>(alpha);
  launch_conformer_linear_cpu(p);
}

// With next_weight and next_bias x becomes its norm, and what is returned is that one's norm by them.
at::Tensor conformer_norm(at::Tensor& x,                 // [B, T, C] f32, contiguous; alpha * addend is added to it
                          const OptionalTensor& addend,  // [B, T, C] f32|bf16
                          double alpha,
                          const at::Tensor& weight,  // [C] f32
                          const at::Tensor& bias,    // [C] f32
                          double eps, at::ScalarType dtype,
                          const OptionalTensor& next_weight,  // [C] f32
                          const OptionalTensor& next_bias) {  // [C] f32
  const char* op = "conformer_norm";
  check_steps(op, "x", x);
  DCX_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.size(2) > 0, op,
            ": x must be contiguous float32 with at least one channel, got ", x.scalar_type(), " ", shape_text(x));
  DCX_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, op, ": dtype must be float32 or bfloat16, got ", dtype);
  ConformerNormParams p{};
  p.channels = x.size(2);
  p.rows = x.size(0) * x.size(1);
  p.alpha = static_cast<float>(alpha);
  p.eps = static_cast<float>(eps);
  const at::Tensor weight_values = padded_vector(op, "weight", weight, p.channels, kColumnUnit);
  const at::Tensor bias_values = padded_vector(op, "bias", bias, p.channels, kColumnUnit);
  at::Tensor next_weight_values, next_bias_values;
  const bool has_next = next_weight.has_value() && next_weight->defined();
  DCX_CHECK(has_next == (next_bias.has_value() && next_bias->defined()), op,
            ": next_weight and next_bias must come together, got one of them");
  if (has_next) {
    next_weight_values = padded_vector(op, "next_weight", *next_weight, p.channels, kColumnUnit);
    next_bias_values = padded_vector(op, "next_bias", *next_bias, p.channels, kColumnUnit);
  }
  at::Tensor added;
  if (addend.has_value() && addend->defined()) {
    check_steps(op, "addend", *addend);
    DCX_CHECK(addend->sizes() == x.sizes(), op, ": addend must be x's shape ", shape_text(x), ", got ",
              shape_text(*addend));
    added = addend->contiguous().view({1, p.rows, p.channels});
    p.addend = steps_view(added);
  }
  at::Tensor y = at::empty(x.sizes(), x.options().dtype(dtype));
  if (y.numel() == 0) return y;
  p.x = x.mutable_data_ptr<float>();
  p.y = steps_view(y.view({1, p.rows, p.channels}));
  p.weight = weight_values.const_data_ptr<float>();
  p.bias = bias_values.const_data_ptr<float>();
  p.next_weight = data_or_null<float>(next_weight_values);
  p.next_bias = data_or_null<float>(next_bias_values);
  launch_conformer_norm_cpu(p);
  return y;
}

at::Tensor conformer_convolution(const at::Tensor& x,       // [B, T, 2 * C] f32|bf16: values, gates
                                 const at::Tensor& weight,  // [K, C] f32
                                 const at::Tensor& ln_weight, const at::Tensor& ln_bias, double eps,
                                 const OptionalTensor& valid) {  // [B, T] bool
  const char* op = "conformer_convolution";
  check_steps(op, "x", x);
  DCX_CHECK(x.size(2) > 0 && x.size(2) % 2 == 0, op, ": x must have 2 * C channels, got ", shape_text(x));
  ConformerConvolutionParams p{};
  p.batch = x.size(0);
  p.steps = x.size(1);
  p.channels = x.size(2) / 2;
  p.eps = static_cast<float>(eps);
  const bool fits = weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == p.channels;
  DCX_CHECK(fits && weight.scalar_type() == at::kFloat, op, ": weight must be [K, C] = [K, ", p.channels,
            "] float32, got ", shape_text(weight), " ", weight.scalar_type());
  p.taps = weight.size(0);
  at::Tensor taps = weight.contiguous();
  if (p.channels % kConformerChannels != 0) {
    taps = at::zeros({p.taps, round_up(p.channels, kConformerChannels)}, weight.options());
    taps.narrow(1, 0, p.channels).copy_(weight);
  }
  const at::Tensor norm_weight = padded_vector(op, "ln_weight", ln_weight, p.channels, kConformerChannels);
  const at::Tensor norm_bias = padded_vector(op, "ln_bias", ln_bias, p.channels, kConformerChannels);
  const at::Tensor mask = check_valid(op, valid, x);
  at::Tensor y = at::empty({p.batch, p.steps, p.channels}, x.options());
  if (y.numel() == 0) return y;
  p.x = steps_view(x);
  p.y = steps_view(y);
  p.weight = taps.const_data_ptr<float>();
  p.ln_weight = norm_weight.const_data_ptr<float>();
  p.ln_bias = norm_bias.const_data_ptr<float>();
  p.valid = bytes_of(mask);
  launch_conformer_convolution_cpu(p);
  return y;
}

}  // namespace
}  // namespace dcx

TORCH_LIBRARY_IMPL(dualcodec_ext, CPU, m) {
  m.impl("conformer_attention", dcx::conformer_attention);
  m.impl("conformer_convolution", dcx::conformer_convolution);
  m.impl("conformer_linear", dcx::conformer_linear);
  m.impl("conformer_linear_add", dcx::conformer_linear_add);
  m.impl("conformer_norm", dcx::conformer_norm);
}
