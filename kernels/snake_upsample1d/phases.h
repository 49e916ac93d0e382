// An upsampling by S as S small convolutions over frames, one per output phase: output q * S + p reads frames q +
// first(p) .. q + first(p) + taps(p) - 1. README.md has the derivation.
#pragma once
#include "../common/dtype.h"

namespace dcx {

enum class UpsampleMode : int32_t { kTransposed = 0, kRepeat = 1 };

DCX_HOST_DEVICE inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

struct UpsamplePhases {
  UpsampleMode mode;
  int64_t stride;
  int64_t pad_left;  // kTransposed: samples cropped on the left; kRepeat: zeros padded there
  int64_t pad_right;

  DCX_HOST_DEVICE int64_t first(int64_t phase) const {
    return mode == UpsampleMode::kTransposed ? floor_div(phase + pad_left, stride) - 1
                                             : floor_div(phase - pad_left, stride);
  }
  DCX_HOST_DEVICE int64_t taps(int64_t phase) const {
    return mode == UpsampleMode::kTransposed ? 2
                                             : floor_div(phase - pad_left + 2 * stride - 1, stride) - first(phase) + 1;
  }
  // The frame, counted from first(phase), that tap k of the 2S-tap kernel falls on at this phase; -1: on none.
  DCX_HOST_DEVICE int64_t frame_of_tap(int64_t phase, int64_t k) const {
    if (mode == UpsampleMode::kRepeat) return floor_div(phase - pad_left + k, stride) - first(phase);
    const int64_t later = phase + pad_left - floor_div(phase + pad_left, stride) * stride;
    return k == later ? 1 : k == later + stride ? 0 : -1;
  }
  DCX_HOST_DEVICE int64_t total_taps() const {
    int64_t total = 0;
    for (int64_t p = 0; p < stride; ++p) total += taps(p);
    return total;
  }
  DCX_HOST_DEVICE int64_t output_steps(int64_t steps) const {
    const int64_t out = mode == UpsampleMode::kTransposed ? (steps + 1) * stride - pad_left - pad_right
                                                          : (steps - 2) * stride + pad_left + pad_right + 1;
    return steps <= 0 || out < 0 ? 0 : out;
  }
};

}  // namespace dcx
