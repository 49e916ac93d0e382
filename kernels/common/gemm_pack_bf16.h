// gemm_pack.h's panels for bfloat16: [reduction][panel width] of pairs, two neighbouring channels of one tap. An odd
// last channel has a zero beside it. Used where weights are packed; no unit of an instruction set includes it.
#pragma once
#include <string.h>

#include "gemm_pack.h"

namespace dcx {

inline uint16_t bf16_of(double value) {
  // Rounded once: through float it could round twice where the double lies near the middle of two bfloat16.
  float near = static_cast<float>(value);
  uint32_t bits;
  memcpy(&bits, &near, 4);
  const bool middle = (bits & 0xffffu) == 0x8000u;
  if (middle && static_cast<double>(near) != value) bits += (value > near) == (near > 0) ? 1u : ~0u;
  return bf16_bits(bits);
}

inline int64_t pair_count(int64_t channels) { return ceil_div(channels, int64_t{2}); }

// As pack_panels, into out[taps * pair_count(channels) * padded columns].
template <class In>
inline void pack_pair_panels(Bf16Pair* out, const In* weight, int64_t taps, int64_t channels, int64_t columns,
                             int64_t stride_tap, int64_t stride_channel, int64_t stride_column) {
  for (int64_t panel = 0; panel < panel_count(columns); ++panel) {
    const int64_t begin = panel_begin(columns, panel), end = panel_begin(columns, panel + 1);
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t c = 0; c < channels; c += 2)
        for (int64_t n = begin; n < end; ++n) {
          const auto half = [&](int64_t channel) -> uint32_t {
            if (n >= columns || channel >= channels) return 0;
            return bf16_of(static_cast<double>(weight[k * stride_tap + channel * stride_channel + n * stride_column]));
          };
          *out++ = Bf16Pair{half(c) | half(c + 1) << 16};
        }
  }
}

}  // namespace dcx
