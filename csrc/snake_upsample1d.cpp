#include <torch/library.h>

#include <string_view>

#include "../kernels/common/gemm_pack.h"
#include "../kernels/snake_upsample1d/params.h"
#include "checks.h"

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

// Taps that fall on the same frame are added in double before rounding.
template <class T>
at::Tensor pack_as(const at::Tensor& weight, const UpsamplePhases& phases) {
  const auto [in_channels, out_channels] = weight_channels("pack_upsample1d", weight, phases);
  const bool repeat = phases.mode == UpsampleMode::kRepeat;
  const at::Tensor wide = (repeat ? weight.permute({2, 1, 0}) : weight.permute({2, 0, 1})).detach().to(at::kDouble);
  const int64_t out_ld = round_up(out_channels, kColumnUnit);
  at::Tensor packed = at::empty({phases.total_taps() * in_channels * out_ld},
                                weight.options().dtype(c10::CppTypeToScalarType<T>::value));
  T* out = packed.mutable_data_ptr<T>();
  for (int64_t phase = 0; phase < phases.stride; ++phase) {
    const int64_t taps = phases.taps(phase);
    at::Tensor folded = at::zeros({taps, in_channels, out_channels}, wide.options());
    for (int64_t k = 0; k < 2 * phases.stride; ++k) {
      const int64_t frame = phases.frame_of_tap(phase, k);
      if (frame >= 0) folded.select(0, frame).add_(wide.select(0, k));
    }
    pack_panels(out, folded.const_data_ptr<double>(), taps, in_channels, out_channels, in_channels * out_channels,
                out_channels, int64_t{1});
    out += taps * in_channels * out_ld;
  }
  return packed;
}

at::Tensor pack_upsample1d_cpu(const at::Tensor& weight, int64_t stride, c10::string_view mode,
                               at::IntArrayRef padding) {
  const UpsamplePhases phases = parse_phases("pack_upsample1d", stride, mode, padding);
  return weight.scalar_type() == at::kDouble ? pack_as<double>(weight, phases) : pack_as<float>(weight, phases);
}

at::Tensor snake_upsample1d_cpu(const at::Tensor& x,         // [B, Cin, T] f32|f64|bf16|f16
                                const at::Tensor& alpha,     // [Cin]
                                const at::Tensor& weight,    // transposed: [Cin, Cout, 2S]; repeat: [Cout, Cin, 2S]
                                const OptionalTensor& bias,  // [Cout]
                                int64_t stride, c10::string_view mode, at::IntArrayRef padding,
                                const OptionalTensor& lengths,  // [B] i64
                                const OptionalTensor& packed) {
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

  const at::Tensor length_values = check_lengths(op, lengths, p.batch, p.in_steps);
  const at::Tensor alpha_values = small_vector(op, "alpha", alpha, in_channels, x);
  const at::Tensor bias_values = padded_bias(op, "bias", bias, out_channels, x);
  const at::Tensor panels = packed_or(
      op, packed, p.phases.total_taps() * in_channels * round_up(out_channels, kColumnUnit), x,
      [&] { return pack_upsample1d_cpu(weight.to(accumulate_dtype(x.scalar_type())), stride, mode, padding); });
  at::Tensor y = empty_signal(p.batch, out_channels, p.out_steps, x.options(), is_channels_last(x));
  if (y.numel() == 0) return y;
  p.x = view_of(x);
  p.y = view_of(y);
  p.weight = panels.const_data_ptr();
  p.bias = bias_values.const_data_ptr();
  p.alpha = alpha_values.const_data_ptr();
  p.lengths = data_or_null<int64_t>(length_values);
  launch_snake_upsample1d_cpu(p);
  return y;
}

}  // namespace
}  // namespace dcx

TORCH_LIBRARY_IMPL(dualcodec_ext, CPU, m) {
  m.impl("pack_upsample1d", dcx::pack_upsample1d_cpu);
  m.impl("snake_upsample1d", dcx::snake_upsample1d_cpu);
}
