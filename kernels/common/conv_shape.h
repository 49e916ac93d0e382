// Output lengths of the sequence ops, for a whole tensor and for one item of a padded batch alike.
#pragma once
#include "dtype.h"

namespace dcx {

// A convolution of `taps` taps over `steps` samples; nothing in gives nothing out, whatever the padding.
DCX_HOST_DEVICE inline int64_t conv_output_steps(int64_t steps, int64_t taps, int64_t stride, int64_t dilation,
                                                 int64_t left, int64_t right) {
  const int64_t span = steps + left + right - dilation * (taps - 1) - 1;
  return steps <= 0 || span < 0 ? 0 : span / stride + 1;
}

}  // namespace dcx
