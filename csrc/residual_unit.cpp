#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <type_traits>

#include "../kernels/common/conv_shape.h"
#include "../kernels/residual_unit/params.h"
#include "../kernels/residual_unit/winograd.h"
#include "checks.h"
#include "packing.h"
#include "program.h"
#ifdef DCX_WITH_CUDA
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>

#include "../kernels/common/conv_geometry.h"
#include "../kernels/residual_unit/plan.h"
#include "cuda.h"
#endif

namespace dcx {
namespace {

// Returns C.
int64_t check_unit_weights(const at::Tensor& weight1, const at::Tensor& weight2) {
  const char* op = "pack_residual_unit";
  DCX_CHECK(weight1.dim() == 3 && weight1.size(0) == weight1.size(1) && weight1.size(2) == kResidualUnitTaps, op,
            ": weight1 must be [C, C, 7], got ", shape_text(weight1));
  const int64_t channels = weight1.size(0);
  check_float(op, "weight1", weight1);
  check_shape(op, "weight2", weight2, {channels, channels, 1}, "[C, C, 1]", weight1);
  return channels;
}

// How many [C, C] matrices weight1 packs as.
int64_t check_winograd(const char* op, int64_t winograd) {
  DCX_CHECK(winograd == 0 || with_winograd_form(winograd, [](auto) {}), op,
            ": winograd must be 0 (direct), 10, 13 or 22, got ", winograd);
  return winograd == 0 ? kResidualUnitTaps : winograd;
}

// conv_gemm panels of both weights, one behind the other; weight1 transformed where winograd is not 0, then in float32
// at least.
at::Tensor pack_residual_unit_cpu(const at::Tensor& weight1,  // [C, C, 7]
                                  const at::Tensor& weight2,  // [C, C, 1]
                                  int64_t winograd) {
  const int64_t channels = check_unit_weights(weight1, weight2);
  const int64_t products = check_winograd("pack_residual_unit", winograd);
  const at::ScalarType wide = accumulate_dtype(weight1.scalar_type());
  const at::ScalarType dtype = winograd == 0 ? packed_dtype(weight1.scalar_type()) : wide;
  const int64_t pointwise = panels_numel(dtype, 1, channels, channels);
  at::Tensor packed = empty_weights((products + 1) * pointwise, weight1.options().dtype(dtype));
  const at::Tensor taps = weight1.detach().to(wide).contiguous();
  const auto transform = [&](auto* out) {
    with_winograd_form(winograd, [&](auto form) {
      pack_winograd<decltype(form)>(out, taps.const_data_ptr<std::remove_pointer_t<decltype(out)>>(), channels);
    });
  };
  if (winograd == 0)
    pack_panels_into(packed, 0, taps, kResidualUnitTaps, channels, channels, 1, kResidualUnitTaps,
                     channels * kResidualUnitTaps);
  else if (dtype == at::kDouble)
    transform(packed.mutable_data_ptr<double>());
  else
    transform(packed.mutable_data_ptr<float>());
  pack_panels_into(packed, products * pointwise, weight2.detach().to(wide).contiguous(), 1, channels, channels, 1, 1,
                   channels);
  return packed;
}

// Checks every argument and fills in what does not depend on the device.
ResidualUnitParams check_residual_unit(const at::Tensor& x, const at::Tensor& weight1, const at::Tensor& weight2,
                                       int64_t dilation, at::IntArrayRef padding, bool causal) {
  const char* op = "residual_unit";
  check_signal(op, "x", x);
  const int64_t channels = x.size(1);
  DCX_CHECK(channels > 0, op, ": x must have at least one channel, got ", shape_text(x));
  check_shape(op, "weight1", weight1, {channels, channels, kResidualUnitTaps}, "[C, C, 7]", x);
  check_shape(op, "weight2", weight2, {channels, channels, 1}, "[C, C, 1]", x);
  DCX_CHECK(dilation >= 1, op, ": dilation must be at least 1, got ", dilation);
  check_padding(op, padding);

  ResidualUnitParams p{};
  p.x = view_of(x);
  p.batch = x.size(0);
  p.channels = channels;
  p.in_steps = x.size(2);
  p.dilation = dilation;
  p.pad_left = padding[0];
  p.pad_right = padding[1];
  p.centre = causal ? kResidualUnitTaps - 1 : kResidualUnitTaps / 2;
  p.out_steps = conv_output_steps(p.in_steps, kResidualUnitTaps, 1, dilation, p.pad_left, p.pad_right);
  return p;
}

void check_none(const char* op, const char* name, const OptionalTensor& t, const char* where) {
  DCX_CHECK(!t.has_value() || !t->defined(), op, ": ", name, " must be None", where, ", got ", shape_text(*t));
}

at::Tensor residual_unit_cpu(const OptionalTensor& out,    // [B, C, T'], x's dtype
                             const at::Tensor& x,          // [B, C, T] f32|f64|bf16|f16
                             const at::Tensor& alpha1,     // [C]
                             const at::Tensor& weight1,    // [C, C, 7]
                             const OptionalTensor& bias1,  // [C]
                             const at::Tensor& alpha2,     // [C]
                             const at::Tensor& weight2,    // [C, C, 1]
                             const OptionalTensor& bias2,  // [C]
                             int64_t dilation, at::IntArrayRef padding, bool causal,
                             const OptionalTensor& lengths,  // [B] i64
                             const OptionalTensor& packed,   // both weights' panels, joined
                             int64_t winograd, const OptionalTensor& out_alpha, const OptionalTensor& snaked) {
  const char* op = "residual_unit";
  check_none(op, "out_alpha", out_alpha, " on the CPU");
  check_none(op, "snaked", snaked, " on the CPU");
  const int64_t products = check_winograd(op, winograd);
  DCX_CHECK(winograd == 0 || x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, op,
            ": winograd must be 0 unless x is float32 or float64, got ", winograd, " with ", x.scalar_type());
  ResidualUnitParams p = check_residual_unit(x, weight1, weight2, dilation, padding, causal);
  const int64_t channels = p.channels;
  const at::Tensor length_values = check_lengths(op, lengths, p.batch, p.in_steps);
  const at::Tensor alpha1_values = small_vector(op, "alpha1", alpha1, channels, x);
  const at::Tensor alpha2_values = small_vector(op, "alpha2", alpha2, channels, x);
  const at::Tensor bias1_values = padded_bias(op, "bias1", bias1, channels, x);
  const at::Tensor bias2_values = padded_bias(op, "bias2", bias2, channels, x);
  const at::ScalarType dtype = packed_dtype(x.scalar_type());
  const int64_t pointwise_numel = panels_numel(dtype, 1, channels, channels);
  const at::Tensor panels = packed_or(op, packed, (products + 1) * pointwise_numel, dtype, [&] {
    return pack_residual_unit_cpu(weight1.to(dtype), weight2.to(dtype), winograd);
  });
  at::Tensor y = output_signal(op, out, p.batch, channels, p.out_steps, x);
  if (y.numel() == 0) return y;
  p.y = view_of(y);
  p.weight1 = panels.const_data_ptr();
  p.weight2 = static_cast<const char*>(panels.const_data_ptr()) +
              products * pointwise_numel * static_cast<int64_t>(panels.element_size());
  p.winograd = winograd;
  p.bias1 = bias1_values.const_data_ptr();
  p.bias2 = bias2_values.const_data_ptr();
  p.alpha1 = alpha1_values.const_data_ptr();
  p.alpha2 = alpha2_values.const_data_ptr();
  p.lengths = data_or_null<int64_t>(length_values);
  launch(launch_residual_unit_cpu, p, x, y, panels, bias1_values, bias2_values, alpha1_values, alpha2_values,
         length_values);
  return y;
}

#ifdef DCX_WITH_CUDA

void check_direct(const char* op, int64_t winograd) {
  DCX_CHECK(winograd == 0, op, ": winograd must be 0 on CUDA, got ", winograd);
}

// [7][round_up(C, 32)][round_up(C, 16)] and [1][..][..], zero-padded, one behind the other, in the weights' dtype.
at::Tensor pack_residual_unit_cuda(const at::Tensor& weight1,  // [C, C, 7]
                                   const at::Tensor& weight2,  // [C, C, 1]
                                   int64_t winograd) {
  const int64_t channels = check_unit_weights(weight1, weight2);
  check_direct("pack_residual_unit", winograd);
  check_cuda_dtype("pack_residual_unit", "weight1", weight1);
  const c10::cuda::CUDAGuard guard(weight1.device());
  const at::Tensor taps = at::cat({weight1.detach(), weight2.detach().to(weight1.scalar_type())}, 2).permute({2, 1, 0});
  return at::constant_pad_nd(
             taps, {0, round_up(channels, kColumnUnit) - channels, 0, round_up(channels, kChannelUnit) - channels})
      .contiguous()
      .reshape({-1});
}

// With y_snaked what goes through out_alpha's Snake goes there, and what is returned is plain.
at::Tensor run_unit_cuda(const char* op, at::Tensor* y_snaked, const OptionalTensor& out, const at::Tensor& x,
                         const at::Tensor& alpha1, const at::Tensor& weight1, const OptionalTensor& bias1,
                         const at::Tensor& alpha2, const at::Tensor& weight2, const OptionalTensor& bias2,
                         int64_t dilation, at::IntArrayRef padding, bool causal, const OptionalTensor& lengths,
                         const OptionalTensor& packed, int64_t winograd, const OptionalTensor& out_alpha,
                         const OptionalTensor& snaked) {
  ResidualUnitParams p = check_residual_unit(x, weight1, weight2, dilation, padding, causal);
  check_cuda_dtype(op, "x", x);
  check_direct(op, winograd);
  const bool two_kernels = x.scalar_type() == at::kFloat || p.channels > kMostFusedChannels;
  if (!two_kernels) check_none(op, "snaked", snaked, " where one kernel computes the unit (16 bits, C up to 192)");
  DCX_CHECK(two_kernels || y_snaked == nullptr, op, ": x must be float32 or have more than ", kMostFusedChannels,
            " channels, got ", x.scalar_type(), " ", shape_text(x));
  if (snaked.has_value() && snaked->defined()) {
    check_shape(op, "snaked", *snaked, x.sizes(), "as x", x);
    DCX_CHECK(snaked->scalar_type() == x.scalar_type(), op, ": snaked must be ", x.scalar_type(), " as x is, got ",
              snaked->scalar_type());
    p.x_snaked = view_of(*snaked);
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor length_values = device_lengths(op, lengths, p.batch, p.in_steps, x);
  const at::Tensor alpha1_values = small_vector(op, "alpha1", alpha1, p.channels, x);
  const at::Tensor alpha2_values = small_vector(op, "alpha2", alpha2, p.channels, x);
  const at::Tensor out_alpha_values = small_vector(op, "out_alpha", out_alpha, p.channels, x);
  const at::Tensor bias1_values = small_vector(op, "bias1", bias1, p.channels, x);
  const at::Tensor bias2_values = small_vector(op, "bias2", bias2, p.channels, x);
  const int64_t pointwise_numel = round_up(p.channels, kChannelUnit) * round_up(p.channels, kColumnUnit);
  const at::Tensor values = cuda_packed_or(op, packed, (kResidualUnitTaps + 1) * pointwise_numel, x, [&] {
    return pack_residual_unit_cuda(weight1.to(x.scalar_type()), weight2.to(x.scalar_type()), 0);
  });
  at::Tensor y = output_signal(op, out, p.batch, p.channels, p.out_steps, x);
  if (y_snaked != nullptr) *y_snaked = output_signal(op, std::nullopt, p.batch, p.channels, p.out_steps, x);
  if (y.numel() == 0) return y;
  p.y = view_of(y);
  if (y_snaked != nullptr) p.y_snaked = y_snaked->mutable_data_ptr();
  p.weight1 = values.const_data_ptr();
  p.weight2 = static_cast<const char*>(p.weight1) +
              kResidualUnitTaps * pointwise_numel * static_cast<int64_t>(values.element_size());
  p.bias1 = data_or_null<float>(bias1_values);
  p.bias2 = data_or_null<float>(bias2_values);
  p.alpha1 = data_or_null<float>(alpha1_values);
  p.alpha2 = data_or_null<float>(alpha2_values);
  p.out_alpha = data_or_null<float>(out_alpha_values);
  p.lengths = data_or_null<int64_t>(length_values);
  const CudaContext context = cuda_context();
  at::Tensor hidden;
  if (const int64_t numel = residual_unit_hidden(context, p); numel > 0) hidden = at::empty({numel}, x.options());
  ResidualUnitPlan plan = plan_residual_unit_cuda(context, p, hidden.defined() ? hidden.mutable_data_ptr() : nullptr);
  const bool weights_stand = is_given(values, packed) && is_given(alpha1_values, alpha1) &&
                             is_given(alpha2_values, alpha2) && is_given(bias1_values, bias1) &&
                             is_given(bias2_values, bias2) && is_given(out_alpha_values, out_alpha);
  if (plan.fused) {
    plan.params.weights_stand = weights_stand;
    plan.start(context, plan);
  } else {
    start_plan(context, plan.first, x, weights_stand);
    start_plan(context, plan.second, x, weights_stand);
  }
  return y;
}

at::Tensor residual_unit_cuda(const OptionalTensor& out, const at::Tensor& x, const at::Tensor& alpha1,
                              const at::Tensor& weight1, const OptionalTensor& bias1, const at::Tensor& alpha2,
                              const at::Tensor& weight2, const OptionalTensor& bias2, int64_t dilation,
                              at::IntArrayRef padding, bool causal, const OptionalTensor& lengths,
                              const OptionalTensor& packed, int64_t winograd, const OptionalTensor& out_alpha,
                              const OptionalTensor& snaked) {
  return run_unit_cuda("residual_unit", nullptr, out, x, alpha1, weight1, bias1, alpha2, weight2, bias2, dilation,
                       padding, causal, lengths, packed, winograd, out_alpha, snaked);
}

std::tuple<at::Tensor, at::Tensor> residual_unit_pair_cuda(
    const at::Tensor& x, const at::Tensor& alpha1, const at::Tensor& weight1, const OptionalTensor& bias1,
    const at::Tensor& alpha2, const at::Tensor& weight2, const OptionalTensor& bias2, int64_t dilation,
    at::IntArrayRef padding, bool causal, const OptionalTensor& lengths, const OptionalTensor& packed, int64_t winograd,
    const at::Tensor& out_alpha, const OptionalTensor& snaked) {
  at::Tensor y_snaked;
  at::Tensor y = run_unit_cuda("residual_unit_pair", &y_snaked, std::nullopt, x, alpha1, weight1, bias1, alpha2,
                               weight2, bias2, dilation, padding, causal, lengths, packed, winograd, out_alpha, snaked);
  return {y, y_snaked};
}

#endif  // DCX_WITH_CUDA

}  // namespace
}  // namespace dcx

TORCH_LIBRARY_IMPL(dualcodec_ext, CPU, m) {
  m.impl("residual_unit", dcx::WithOut<&dcx::residual_unit_cpu>::functional);
  m.impl("residual_unit.out", dcx::WithOut<&dcx::residual_unit_cpu>::out);
  m.impl("pack_residual_unit", dcx::pack_residual_unit_cpu);
}

#ifdef DCX_WITH_CUDA
TORCH_LIBRARY_IMPL(dualcodec_ext, CUDA, m) {
  m.impl("residual_unit", dcx::WithOut<&dcx::residual_unit_cuda>::functional);
  m.impl("residual_unit.out", dcx::WithOut<&dcx::residual_unit_cuda>::out);
  m.impl("residual_unit_pair", dcx::residual_unit_pair_cuda);
  m.impl("pack_residual_unit", dcx::pack_residual_unit_cuda);
}
#endif
