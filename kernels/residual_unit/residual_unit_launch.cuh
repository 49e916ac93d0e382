// Which kernels residual_unit has on a GPU, and which of them runs. Those of Hopper's warpgroup products, which take
// long to compile, are residual_unit_groups.cuh's.
#pragma once
#include "residual_unit_plan.cuh"

namespace dcx {

// Every fused kernel that ships: kColumns is the channels' next width; Wide for long signals, Short where those would
// leave multiprocessors idle or do not fit. Both add in the same order.
template <class T, int kColumns>
struct FusedKernels;
template <class T>
struct FusedKernels<T, 32> {
  using Wide = FusedUnit<T, 32, 256, 8, 1, 32, 3>;
  using Short = FusedUnit<T, 32, 64, 4, 1, 32, 4>;
};
template <class T>
struct FusedKernels<T, 48> {
  using Wide = FusedUnit<T, 48, 256, 8, 1, 48, 2>;
  using Short = FusedUnit<T, 48, 64, 4, 1, 48, 4>;
};
template <class T>
struct FusedKernels<T, 64> {
  using Wide = FusedUnit<T, 64, 128, 4, 2, 64, 2>;
  using Short = FusedUnit<T, 64, 64, 2, 2, 64, 3>;
};
template <class T>
struct FusedKernels<T, 96> {
  using Wide = FusedUnit<T, 96, 128, 4, 2, 48, 2>;
  using Short = FusedUnit<T, 96, 64, 4, 2, 48, 2>;
};
template <class T>
struct FusedKernels<T, 128> {
  using Wide = FusedUnit<T, 128, 128, 2, 4, 32, 2>;
  using Short = FusedUnit<T, 128, 64, 2, 4, 32, 2>;
};
template <class T>
struct FusedKernels<T, 192> {
  using Wide = FusedUnit<T, 192, 128, 2, 4, 32, 1>;
  using Short = FusedUnit<T, 192, 64, 2, 4, 32, 2>;
};

// In rows' time on a multiprocessor: a tile takes its rows, but not less than reading the weights from L2 takes, which
// is about 100 rows' time on an H100 whatever the width (README.md).
template <class K>
int64_t fused_cost(const CudaContext& context, const ResidualUnitParams& p) {
  constexpr int64_t kWeightRows = 100;
  const int64_t tiles = p.batch * ceil_div(p.out_steps, int64_t{K::kTileRows});
  return ceil_div(tiles, int64_t{context.multiprocessors}) * maximum(int64_t{K::kTileRows}, kWeightRows);
}

// False where this device has too little shared memory for the smallest tile, or the unit is too wide.
template <class T>
bool plan_fused_of(const CudaContext& context, const ResidualUnitParams& p, ResidualUnitPlan* plan) {
  return with_unit_width(p.channels, [&](auto width) {
    constexpr int kColumns = decltype(width)::kValue;
    using Wide = typename FusedKernels<T, kColumns>::Wide;
    using Short = typename FusedKernels<T, kColumns>::Short;
    if (Short::smem_bytes(p.dilation) > context.shared_bytes) return false;
    if (plan == nullptr || plan_groups<T>(context, p, *plan)) return true;
    if (Wide::smem_bytes(p.dilation) <= context.shared_bytes &&
        fused_cost<Wide>(context, p) <= fused_cost<Short>(context, p))
      plan_fused<Wide>(p, *plan);
    else
      plan_fused<Short>(p, *plan);
    return true;
  });
}

inline bool plan_fused_if(const CudaContext& context, const ResidualUnitParams& p, ResidualUnitPlan* plan) {
  if (p.x.dtype == DType::kBF16 && context.capability >= 80) return plan_fused_of<bf16>(context, p, plan);
  return p.x.dtype == DType::kF16 && plan_fused_of<f16>(context, p, plan);
}

// Whether a fused unit's call has so few rows that its tiles leave nearly all of the device idle: then two kernels of
// conv_few.cuh, which share out its columns too. They add in the fused kernels' order, so that this changes no bit.
inline bool is_few(const CudaContext& context, const ResidualUnitParams& p) {
  constexpr int64_t kTileRows = 64, kIdle = 16, kVector = 8;
  constexpr int64_t kSharedBytes = 160 << 10;  // no unit takes more there, however far its taps reach
  return context.wgmma && element_size(p.x.dtype) == 2 && context.shared_bytes >= kSharedBytes &&
         ceil_div(p.batch * p.out_steps, kTileRows) * kIdle <= context.multiprocessors &&
         moves_in_vectors(signal_of(p.x), p.channels, kVector) && plan_fused_if(context, p, nullptr);
}

inline int64_t residual_unit_hidden_of(const CudaContext& context, const ResidualUnitParams& p) {
  return plan_fused_if(context, p, nullptr) && !is_few(context, p) ? 0 : p.batch * p.out_steps * p.channels;
}

// tap_major: in the fused kernels' order. A signal that comes snaked is copied as it lies; the residual is x's.
inline void plan_two_kernels(const CudaContext& context, const ResidualUnitParams& p, void* hidden, bool tap_major,
                             ResidualUnitPlan& plan) {
  ConvGemmParams first{};
  const bool snaked = p.x_snaked.data != nullptr;
  first.x = signal_of(snaked ? p.x_snaked : p.x);
  first.y = Signal{hidden, p.out_steps * p.channels, p.channels, 1};
  first.weight = p.weight1;
  first.bias = static_cast<const float*>(p.bias1);
  first.alpha = snaked ? nullptr : static_cast<const float*>(p.alpha1);
  first.out_alpha = static_cast<const float*>(p.alpha2);
  first.lengths = p.lengths;
  first.batch = p.batch;
  first.in_steps = p.in_steps;
  first.in_channels = first.channels = first.columns = p.channels;
  first.channels_padded = round_up(p.channels, kChannelUnit);
  first.columns_padded = round_up(p.channels, kColumnUnit);
  first.out_steps = first.rows = p.out_steps;
  first.row_step = first.row_scale = 1;
  first.taps = first.conv_taps = kResidualUnitTaps;
  first.dilation = first.conv_dilation = p.dilation;
  first.pad_left = first.conv_left = p.pad_left;
  first.conv_right = p.pad_right;
  first.conv_stride = 1;
  first.tap_major = tap_major;

  ConvGemmParams second = first;
  second.x = first.y;
  second.y = signal_of(p.y);
  second.residual = signal_of(p.x);
  second.residual_shift = p.centre * p.dilation - p.pad_left;
  second.residual_valid = 1;
  second.weight = p.weight2;
  second.bias = static_cast<const float*>(p.bias2);
  second.alpha = second.out_alpha = nullptr;
  second.after_alpha = static_cast<const float*>(p.out_alpha);
  second.snaked = bytes_between(p.y.data, p.y_snaked);
  second.in_steps = p.out_steps;
  second.op_in_steps = p.in_steps;
  second.taps = second.dilation = 1;
  second.pad_left = 0;
  plan.first = plan_conv_gemm(context, p.x.dtype, first);
  plan.second = plan_conv_gemm(context, p.x.dtype, second);
}

// What every fused kernel is told alike.
inline ResidualUnitPlan prepare_fused(const ResidualUnitParams& p) {
  ResidualUnitPlan plan;
  FusedUnitParams& f = plan.params;
  f.x = signal_of(p.x);
  f.y = signal_of(p.y);
  f.weight = p.weight1;
  f.bias1 = static_cast<const float*>(p.bias1);
  f.bias2 = static_cast<const float*>(p.bias2);
  f.alpha1 = static_cast<const float*>(p.alpha1);
  f.alpha2 = static_cast<const float*>(p.alpha2);
  f.out_alpha = static_cast<const float*>(p.out_alpha);
  f.lengths = p.lengths;
  f.channels = p.channels;
  f.channels_padded = round_up(p.channels, kChannelUnit);
  f.columns_padded = round_up(p.channels, kColumnUnit);
  f.in_steps = p.in_steps;
  f.out_steps = p.out_steps;
  f.dilation = p.dilation;
  f.pad_left = p.pad_left;
  f.pad_right = p.pad_right;
  f.residual_shift = p.centre * p.dilation - p.pad_left;
  constexpr int64_t kHalves = 8;  // in 16 bytes
  f.vectors = moves_in_vectors(f.x, p.channels, kHalves);
  f.vector_store = moves_in_vectors(f.y, p.channels, kHalves);
  return plan;
}

inline ResidualUnitPlan plan_residual_unit_of(const CudaContext& context, const ResidualUnitParams& p, void* hidden) {
  ResidualUnitPlan plan = prepare_fused(p);
  const bool few = is_few(context, p);
  plan.fused = !few && plan_fused_if(context, p, &plan);
  if (!plan.fused) plan_two_kernels(context, p, hidden, few, plan);
  return plan;
}

}  // namespace dcx
