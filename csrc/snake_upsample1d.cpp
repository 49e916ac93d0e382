#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "../kernels/snake_upsample1d/differences.h"
#include "../kernels/snake_upsample1d/winograd.h"
#include "checks.h"
#include "packing.h"
#include "program.h"
#ifdef DCX_WITH_CUDA
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>

#include <vector>

#include "../kernels/common/conv_geometry.h"
#include "cuda.h"
#endif

namespace dcx {
namespace {

UpsamplePhases parse_phases(const char* op, int64_t stride, c10::string_view mode, at::IntArrayRef padding) {
  const std::string_view name(mode.data(), mode.size());
  DCX_CHECK(name == "transposed" || name == "repeat", op, ": mode must be 'transposed' or 'repeat', got '", name, "'");
  DCX_CHECK(stride >= 1, op, ": stride must be at least 1, got ", stride);
  check_padding(op, padding);
  return UpsamplePhases{name == "repeat" ? UpsampleMode::kRepeat : UpsampleMode::kTransposed, stride, padding[0],
                        padding[1]};
}

// Cin and Cout of the weight, whose layout the mode decides.
std::pair<int64_t, int64_t> weight_channels(const char* op, const at::Tensor& weight, const UpsamplePhases& phases) {
  const bool repeat = phases.mode == UpsampleMode::kRepeat;
  DCX_CHECK(weight.dim() == 3 && weight.size(2) == 2 * phases.stride && weight.numel() > 0, op, ": weight must be ",
            repeat ? "[Cout, Cin, 2 * stride]" : "[Cin, Cout, 2 * stride]", " with stride ", phases.stride, ", got ",
            shape_text(weight));
  check_float(op, "weight", weight);
  return repeat ? std::pair(weight.size(1), weight.size(0)) : std::pair(weight.size(0), weight.size(1));
}

// One phase's taps, [taps][Cin][Cout] in double: taps of the kernel that fall on the same frame are added there.
at::Tensor fold_phase(const at::Tensor& weight, const UpsamplePhases& phases, int64_t phase) {
  const bool repeat = phases.mode == UpsampleMode::kRepeat;
  const at::Tensor wide = (repeat ? weight.permute({2, 1, 0}) : weight.permute({2, 0, 1})).detach().to(at::kDouble);
  at::Tensor folded = at::zeros({phases.taps(phase), wide.size(1), wide.size(2)}, wide.options());
  for (int64_t k = 0; k < 2 * phases.stride; ++k) {
    const int64_t frame = phases.frame_of_tap(phase, k);
    if (frame >= 0) folded.select(0, frame).add_(wide.select(0, k));
  }
  return folded;
}

void check_winograd(const char* op, int64_t winograd, const UpsamplePhases& phases) {
  const bool transposed = phases.mode == UpsampleMode::kTransposed;
  const int products = transposed ? kUpsampleProducts : kUpsampleDifferences;
  DCX_CHECK(winograd == 0 || winograd == products, op, ": winograd must be 0 (direct) or ", products,
            " where mode is '", transposed ? "transposed" : "repeat", "', got ", winograd);
}

// How many [Cin, Cout] matrices the weight packs as.
int64_t matrices_of(int64_t winograd, const UpsamplePhases& phases) {
  return winograd == 0 ? phases.total_taps() : winograd * phases.stride;
}

// [2 S][Cin][Cout] in double: what the base phase's two frames are multiplied by, then phase by phase the two taps that
// move a frame on.
at::Tensor difference_matrices(const at::Tensor& weight, const UpsamplePhases& phases) {
  const int64_t stride = phases.stride;
  const at::Tensor wide = weight.permute({2, 1, 0}).detach().to(at::kDouble);
  at::Tensor matrices = at::empty({2 * stride, wide.size(1), wide.size(2)}, wide.options());
  for (int64_t half = 0; half < 2; ++half) {
    matrices.select(0, half).copy_(wide.narrow(0, half * stride, stride).sum(0));
    for (int64_t i = 1; i < stride; ++i)
      matrices.select(0, 2 * i + half).copy_(wide.select(0, moving_tap(phases, i) + half * stride));
  }
  return matrices;
}

// Winograd's are transformed, and in float32 at least.
at::Tensor pack_upsample1d_cpu(const at::Tensor& weight, int64_t stride, c10::string_view mode, at::IntArrayRef padding,
                               int64_t winograd) {
  const UpsamplePhases phases = parse_phases("pack_upsample1d", stride, mode, padding);
  check_winograd("pack_upsample1d", winograd, phases);
  const auto [in_channels, out_channels] = weight_channels("pack_upsample1d", weight, phases);
  const at::ScalarType dtype =
      winograd == 0 ? packed_dtype(weight.scalar_type()) : accumulate_dtype(weight.scalar_type());
  at::Tensor packed = empty_weights(panels_numel(dtype, matrices_of(winograd, phases), in_channels, out_channels),
                                    weight.options().dtype(dtype));
  int64_t offset = 0;
  const auto pack = [&](const at::Tensor& matrices) {
    pack_panels_into(packed, offset, matrices, matrices.size(0), in_channels, out_channels, in_channels * out_channels,
                     out_channels, 1);
    offset += panels_numel(dtype, matrices.size(0), in_channels, out_channels);
  };
  if (winograd == kUpsampleDifferences) {
    pack(difference_matrices(weight, phases));
    return packed;
  }
  for (int64_t phase = 0; phase < phases.stride; ++phase) {
    const at::Tensor folded = fold_phase(weight, phases, phase);
    if (winograd == 0) {
      pack(folded);
      continue;
    }
    const auto transform = [&](auto* out) {
      pack_winograd_phase(out + offset, folded.const_data_ptr<double>(), in_channels, out_channels);
    };
    if (dtype == at::kDouble)
      transform(packed.mutable_data_ptr<double>());
    else
      transform(packed.mutable_data_ptr<float>());
    offset += panels_numel(dtype, winograd, in_channels, out_channels);
  }
  return packed;
}

// Checks every argument and fills in what does not depend on the device.
SnakeUpsample1dParams check_snake_upsample1d(const at::Tensor& x, const at::Tensor& weight, int64_t stride,
                                             c10::string_view mode, at::IntArrayRef padding) {
  const char* op = "snake_upsample1d";
  check_signal(op, "x", x);
  SnakeUpsample1dParams p{};
  p.phases = parse_phases(op, stride, mode, padding);
  const auto [in_channels, out_channels] = weight_channels(op, weight, p.phases);
  DCX_CHECK(in_channels == x.size(1), op, ": weight must have Cin = ", x.size(1), " as x does, got ",
            shape_text(weight));
  p.batch = x.size(0);
  p.in_channels = in_channels;
  p.in_steps = x.size(2);
  p.out_channels = out_channels;
  p.out_steps = p.phases.output_steps(p.in_steps);
  p.x = view_of(x);
  return p;
}

void check_stretch(int64_t first, const at::Tensor& out, const SnakeUpsample1dParams& p) {
  DCX_CHECK(out.dim() == 3 && first >= 0 && first + out.size(2) <= p.out_steps,
            "snake_upsample1d: out must be [B, C, N] with first + N in 0..", p.out_steps, ", got first = ", first,
            " and ", shape_text(out));
}

at::Tensor snake_upsample1d_into_cpu(const OptionalTensor& out,    // [B, Cout, N], x's dtype; none: all T' steps
                                     int64_t first,                // output step that `out` begins with
                                     const at::Tensor& x,          // [B, Cin, T] f32|f64|bf16|f16
                                     const OptionalTensor& alpha,  // [Cin]
                                     const at::Tensor& weight,  // transposed: [Cin, Cout, 2S]; repeat: [Cout, Cin, 2S]
                                     const OptionalTensor& bias,  // [Cout]
                                     int64_t stride, c10::string_view mode, at::IntArrayRef padding,
                                     const OptionalTensor& lengths,  // [B] i64
                                     const OptionalTensor& packed, int64_t winograd) {
  const char* op = "snake_upsample1d";
  SnakeUpsample1dParams p = check_snake_upsample1d(x, weight, stride, mode, padding);
  check_winograd(op, winograd, p.phases);
  DCX_CHECK(winograd == 0 || x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, op,
            ": winograd must be 0 unless x is float32 or float64, got ", winograd, " with ", x.scalar_type());
  DCX_CHECK(winograd != kUpsampleProducts || first % stride == 0, op, ": first must be a multiple of stride = ", stride,
            " with winograd = 4, got ", first);
  p.winograd = winograd;
  const at::Tensor length_values = check_lengths(op, lengths, p.batch, p.in_steps);
  at::Tensor alpha_values = small_vector(op, "alpha", alpha, p.in_channels, x);
  if (!alpha_values.defined())  // Snake of an alpha of zero is x
    alpha_values = at::zeros({p.in_channels}, x.options().dtype(accumulate_dtype(x.scalar_type())));
  const at::Tensor bias_values = padded_bias(op, "bias", bias, p.out_channels, x);
  const at::ScalarType dtype = packed_dtype(x.scalar_type());
  const int64_t numel = panels_numel(dtype, matrices_of(winograd, p.phases), p.in_channels, p.out_channels);
  const at::Tensor panels = packed_or(
      op, packed, numel, dtype, [&] { return pack_upsample1d_cpu(weight.to(dtype), stride, mode, padding, winograd); });
  if (out.has_value()) {
    check_stretch(first, *out, p);
    p.first = first;
    p.out_steps = out->size(2);
  }
  at::Tensor y = output_signal(op, out, p.batch, p.out_channels, p.out_steps, x);
  if (y.numel() == 0) return y;
  p.y = view_of(y);
  p.weight = panels.const_data_ptr();
  p.bias = bias_values.const_data_ptr();
  p.alpha = alpha_values.const_data_ptr();
  p.lengths = data_or_null<int64_t>(length_values);
  launch(launch_snake_upsample1d_cpu, p, x, y, panels, bias_values, alpha_values, length_values);
  return y;
}

#ifdef DCX_WITH_CUDA

void check_direct(const char* op, int64_t winograd) {
  DCX_CHECK(winograd == 0, op, ": winograd must be 0 on CUDA, got ", winograd);
}

// [every phase's taps][round_up(Cin, 32)][round_up(Cout, 16)] in the weight's dtype.
at::Tensor pack_upsample1d_cuda(const at::Tensor& weight, int64_t stride, c10::string_view mode,
                                at::IntArrayRef padding, int64_t winograd) {
  const UpsamplePhases phases = parse_phases("pack_upsample1d", stride, mode, padding);
  check_direct("pack_upsample1d", winograd);
  const auto [in_channels, out_channels] = weight_channels("pack_upsample1d", weight, phases);
  check_cuda_dtype("pack_upsample1d", "weight", weight);
  const c10::cuda::CUDAGuard guard(weight.device());
  std::vector<at::Tensor> taps;
  for (int64_t phase = 0; phase < stride; ++phase) taps.push_back(fold_phase(weight, phases, phase));
  return at::constant_pad_nd(at::cat(taps), {0, round_up(out_channels, kColumnUnit) - out_channels, 0,
                                             round_up(in_channels, kChannelUnit) - in_channels})
      .to(weight.scalar_type())
      .flatten();
}

// A stretch from a multiple of the stride on is another padding's whole output, with the same weights in every phase.
// y_snaked: gets y through out_alpha's Snake; null: nothing does.
at::Tensor run_upsample_cuda(const char* op, at::Tensor* y_snaked, const OptionalTensor& out, int64_t first,
                             const at::Tensor& x, const OptionalTensor& alpha, const at::Tensor& weight,
                             const OptionalTensor& bias, int64_t stride, c10::string_view mode, at::IntArrayRef padding,
                             const OptionalTensor& lengths, const OptionalTensor& packed, int64_t winograd,
                             const OptionalTensor& out_alpha) {
  check_direct(op, winograd);
  SnakeUpsample1dParams p = check_snake_upsample1d(x, weight, stride, mode, padding);
  check_cuda_dtype(op, "x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor length_values = device_lengths(op, lengths, p.batch, p.in_steps, x);
  const at::Tensor alpha_values = small_vector(op, "alpha", alpha, p.in_channels, x);
  const at::Tensor bias_values = small_vector(op, "bias", bias, p.out_channels, x);
  const at::Tensor out_alpha_values = small_vector(op, "out_alpha", out_alpha, p.out_channels, x);
  const at::Tensor values = cuda_packed_or(
      op, packed, p.phases.total_taps() * round_up(p.in_channels, kChannelUnit) * round_up(p.out_channels, kColumnUnit),
      x, [&] { return pack_upsample1d_cuda(weight.to(x.scalar_type()), stride, mode, padding, 0); });
  if (out.has_value()) {
    check_stretch(first, *out, p);
    DCX_CHECK(first % stride == 0, op, ": first must be a multiple of stride = ", stride, " on CUDA, got ", first);
    p.phases.pad_left += p.phases.mode == UpsampleMode::kTransposed ? first : -first;
    p.out_steps = out->size(2);
  }
  at::Tensor y = output_signal(op, out, p.batch, p.out_channels, p.out_steps, x);
  if (y_snaked != nullptr) *y_snaked = output_signal(op, std::nullopt, p.batch, p.out_channels, p.out_steps, x);
  if (y.numel() == 0) return y;
  p.y = view_of(y);
  if (y_snaked != nullptr) p.y_snaked = y_snaked->mutable_data_ptr();
  p.out_alpha = data_or_null<float>(out_alpha_values);
  p.weight = values.const_data_ptr();
  p.bias = data_or_null<float>(bias_values);
  p.alpha = data_or_null<float>(alpha_values);
  p.lengths = data_or_null<int64_t>(length_values);
  const CudaContext context = cuda_context();
  ConvGemmPlan plan = plan_snake_upsample1d_cuda(context, p);
  start_plan(context, plan, x,
             is_given(values, packed) && is_given(bias_values, bias) && is_given(alpha_values, alpha) &&
                 is_given(out_alpha_values, out_alpha));
  return y;
}

at::Tensor snake_upsample1d_into_cuda(const OptionalTensor& out, int64_t first, const at::Tensor& x,
                                      const OptionalTensor& alpha, const at::Tensor& weight, const OptionalTensor& bias,
                                      int64_t stride, c10::string_view mode, at::IntArrayRef padding,
                                      const OptionalTensor& lengths, const OptionalTensor& packed, int64_t winograd) {
  return run_upsample_cuda("snake_upsample1d", nullptr, out, first, x, alpha, weight, bias, stride, mode, padding,
                           lengths, packed, winograd, std::nullopt);
}

std::tuple<at::Tensor, at::Tensor> snake_upsample1d_pair_cuda(const at::Tensor& x, const OptionalTensor& alpha,
                                                              const at::Tensor& weight, const OptionalTensor& bias,
                                                              int64_t stride, c10::string_view mode,
                                                              at::IntArrayRef padding, const OptionalTensor& lengths,
                                                              const OptionalTensor& packed, int64_t winograd,
                                                              const at::Tensor& out_alpha) {
  at::Tensor y_snaked;
  at::Tensor y = run_upsample_cuda("snake_upsample1d_pair", &y_snaked, std::nullopt, 0, x, alpha, weight, bias, stride,
                                   mode, padding, lengths, packed, winograd, out_alpha);
  return {y, y_snaked};
}

#endif  // DCX_WITH_CUDA

// The op and its overload `out` over one of the functions above.
template <auto kInto>
at::Tensor upsample_all(const at::Tensor& x, const OptionalTensor& alpha, const at::Tensor& weight,
                        const OptionalTensor& bias, int64_t stride, c10::string_view mode, at::IntArrayRef padding,
                        const OptionalTensor& lengths, const OptionalTensor& packed, int64_t winograd) {
  return kInto(std::nullopt, 0, x, alpha, weight, bias, stride, mode, padding, lengths, packed, winograd);
}
template <auto kInto>
void upsample_stretch(const at::Tensor& x, const OptionalTensor& alpha, const at::Tensor& weight,
                      const OptionalTensor& bias, int64_t stride, c10::string_view mode, at::IntArrayRef padding,
                      const OptionalTensor& lengths, const OptionalTensor& packed, int64_t winograd, int64_t first,
                      at::Tensor& out) {
  kInto(out, first, x, alpha, weight, bias, stride, mode, padding, lengths, packed, winograd);
}

}  // namespace
}  // namespace dcx

TORCH_LIBRARY_IMPL(dualcodec_ext, CPU, m) {
  m.impl("pack_upsample1d", dcx::pack_upsample1d_cpu);
  m.impl("snake_upsample1d", dcx::upsample_all<&dcx::snake_upsample1d_into_cpu>);
  m.impl("snake_upsample1d.out", dcx::upsample_stretch<&dcx::snake_upsample1d_into_cpu>);
}

#ifdef DCX_WITH_CUDA
TORCH_LIBRARY_IMPL(dualcodec_ext, CUDA, m) {
  m.impl("pack_upsample1d", dcx::pack_upsample1d_cuda);
  m.impl("snake_upsample1d", dcx::upsample_all<&dcx::snake_upsample1d_into_cuda>);
  m.impl("snake_upsample1d.out", dcx::upsample_stretch<&dcx::snake_upsample1d_into_cuda>);
  m.impl("snake_upsample1d_pair", dcx::snake_upsample1d_pair_cuda);
}
#endif
