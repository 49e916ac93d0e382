// How a convolution becomes conv_gemm.cuh's GEMM: the packer and the launcher agree here.
#pragma once
#include "dtype.h"

namespace dcx {

constexpr int64_t kChannelUnit = 32;  // GEMM channels are padded to whole steps of the kernel

// A GEMM row is `fold` neighbouring time steps side by side; original tap k is tap k / fold, step k % fold of that row.
struct ConvGeometry {
  int64_t fold, taps;
  int64_t row_step;   // input samples from one row to the next
  int64_t row_scale;  // rows from one output to the next
  int64_t channels;   // fold * in_channels

  DCX_HOST_DEVICE int64_t channels_padded() const { return round_up(channels, kChannelUnit); }
};

// A strided convolution reads rows of `stride` steps, so that its rows lie side by side too; one of few inputs reads
// all its taps as one row.
inline ConvGeometry conv_geometry(int64_t in_channels, int64_t taps, int64_t stride, int64_t dilation) {
  if (taps == 1) return {1, 1, stride, 1, in_channels};
  if (dilation == 1 && in_channels * taps <= 2 * kChannelUnit) return {taps, 1, stride, 1, in_channels * taps};
  if (dilation == 1 && stride > 1 && taps % stride == 0)
    return {stride, taps / stride, stride, 1, in_channels * stride};
  return {1, taps, 1, stride, in_channels};
}

}  // namespace dcx
