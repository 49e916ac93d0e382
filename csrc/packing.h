// conv_gemm's weights on the CPU: how many elements they take, and the packer for each dtype.
#pragma once
#include "../kernels/common/gemm_pack_bf16.h"
#include "checks.h"

namespace dcx {

// Elements of `taps` taps of channels x columns: bfloat16 lies in pairs of channels.
inline int64_t panels_numel(at::ScalarType dtype, int64_t taps, int64_t channels, int64_t columns) {
  return taps * round_up(channels, dtype == at::kBFloat16 ? 2 : 1) * round_up(columns, kColumnUnit);
}

// An uninitialised [numel] for packed weights: from 2 MB on it begins with a huge page, and asks for such pages as far
// as whole ones fit. A layer of few rows is bound by reading its weights, and with pages of 4 KB by looking up where
// they lie.
at::Tensor empty_weights(int64_t numel, const at::TensorOptions& options);

// Packs into `out` from element `offset` on; strides in elements of `weight`, which is contiguous and of any float
// type.
inline void pack_panels_into(const at::Tensor& out, int64_t offset, const at::Tensor& weight, int64_t taps,
                             int64_t channels, int64_t columns, int64_t stride_tap, int64_t stride_channel,
                             int64_t stride_column) {
  const auto from = [&](const auto* in) {
    if (out.scalar_type() == at::kDouble)
      pack_panels(out.mutable_data_ptr<double>() + offset, in, taps, channels, columns, stride_tap, stride_channel,
                  stride_column);
    else if (out.scalar_type() == at::kFloat)
      pack_panels(out.mutable_data_ptr<float>() + offset, in, taps, channels, columns, stride_tap, stride_channel,
                  stride_column);
    else
      pack_pair_panels(reinterpret_cast<Bf16Pair*>(out.mutable_data_ptr<at::BFloat16>() + offset), in, taps, channels,
                       columns, stride_tap, stride_channel, stride_column);
  };
  if (weight.scalar_type() == at::kDouble)
    from(weight.const_data_ptr<double>());
  else
    from(weight.const_data_ptr<float>());
}

}  // namespace dcx
