// The Winograd form of snake_upsample1d's transposed mode: each phase's 2 taps give 3 frames from 4 products, where the
// direct form takes 6. Points are 0, 1, -1 and infinity; README.md has the derivation.
#pragma once
#include "../common/gemm_pack.h"

namespace dcx {

constexpr int kUpsampleProducts = 4, kUpsampleOutputs = 3;

// Writes one phase's weights, panel by panel of gemm_pack.h, as [products][Cin][panel width]; folded: [2][Cin][Cout],
// the earlier frame's tap first. out: [products * Cin * round_up(Cout, 16)].
template <class T>
inline void pack_winograd_phase(T* out, const double* folded, int64_t channels, int64_t columns) {
  for (int64_t panel = 0; panel < panel_count(columns); ++panel)
    for (int i = 0; i < kUpsampleProducts; ++i)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t n = panel_begin(columns, panel); n < panel_begin(columns, panel + 1); ++n) {
          const double earlier = n < columns ? folded[c * columns + n] : 0.0;
          const double later = n < columns ? folded[(channels + c) * columns + n] : 0.0;
          const double factors[kUpsampleProducts] = {earlier, (earlier + later) / 2, (earlier - later) / 2, -later};
          *out++ = static_cast<T>(factors[i]);
        }
}

}  // namespace dcx
