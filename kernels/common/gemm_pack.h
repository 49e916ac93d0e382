// How a GEMM's right-hand side lies in memory: column panels, each [reduction][panel width], so that a micro-kernel
// reads one stream. Columns are padded with zeros to a multiple of 16; panels are 48 wide or less, of nearly equal
// width.
#pragma once
#include "dtype.h"

namespace dcx {

constexpr int64_t kMaxPanelWidth = 48;

DCX_HOST_DEVICE inline int64_t panel_count(int64_t columns) {
  return ceil_div(round_up(columns, kColumnUnit), kMaxPanelWidth);
}

// First column of panel i; panel i ends where panel i + 1 starts.
DCX_HOST_DEVICE inline int64_t panel_begin(int64_t columns, int64_t i) {
  const int64_t units = round_up(columns, kColumnUnit) / kColumnUnit;
  return units * i / panel_count(columns) * kColumnUnit;
}

// The panel that holds a column.
DCX_HOST_DEVICE inline int64_t panel_of(int64_t columns, int64_t column) {
  const int64_t units = round_up(columns, kColumnUnit) / kColumnUnit;
  return ceil_div((column / kColumnUnit + 1) * panel_count(columns), units) - 1;
}

// Writes panels of a [taps][channels] x columns matrix given by strides (elements) into out[taps * channels * padded
// columns].
template <class Out, class In>
inline void pack_panels(Out* out, const In* weight, int64_t taps, int64_t channels, int64_t columns, int64_t stride_tap,
                        int64_t stride_channel, int64_t stride_column) {
  for (int64_t panel = 0; panel < panel_count(columns); ++panel) {
    const int64_t begin = panel_begin(columns, panel), end = panel_begin(columns, panel + 1);
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t n = begin; n < end; ++n)
          *out++ =
              n < columns ? static_cast<Out>(weight[k * stride_tap + c * stride_channel + n * stride_column]) : Out(0);
  }
}

}  // namespace dcx
