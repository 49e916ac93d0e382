// What residual_unit's direct and Winograd forms share on the CPU: places of scratch memory, the residual's addition,
// and the end of a call of a few rows.
#pragma once
#include "../common/gemm.h"
#include "../common/tile_io.h"
#include "params.h"

namespace dcx {
namespace DCX_NS {

// The sums of Winograd's products and the residual are not needed at the same time.
enum Slot {
  kInput = 0,
  kMiddle = 1,
  kOutput = 2,
  kResidual = 3,
  kProducts = 3,
  kAllInput = 4,
  kAllMiddle = 5,
  kTransformed = 6,
  kShared = 7
};

// out [rows][columns of ld] += bias2 + x, of the channels and steps that begin at x's.
template <class T>
static void add_residual(T* out, T* extra, int64_t ld, int64_t rows, int64_t channels, const T* bias,
                         const TensorView& x, int64_t b, int64_t begin, int64_t valid) {
  load_tile<T>(extra, ld, rows, channels, x, b, begin, valid);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < ld; c += kLanes<T>) {
      T* value = out + r * ld + c;
      vstore<T>(value, vload<T>(value) + vload<T>(bias + c) + vload<T>(extra + r * ld + c));
    }
}

// y's row t of item b from a row of sums, plus bias2 and x, where x and y have rows of type Row (is_direct).
template <class Row, class T>
static inline void finish_row(const ResidualUnitParams& p, const T* sums, int64_t b, int64_t t) {
  Row* y = row_of<Row>(p.y, b, t);
  if (t >= p.out_valid(b)) {
    memset(y, 0, static_cast<size_t>(p.channels) * sizeof(Row));
    return;
  }
  const T* bias = static_cast<const T*>(p.bias2);
  const int64_t step = t + p.centre * p.dilation - p.pad_left;
  const Row* x = step >= 0 && step < p.in_valid(b) ? row_of<Row>(p.x, b, step) : nullptr;
  for (int64_t c = 0; c < p.channels; c += kLanes<T>)
    vstore_out(y + c, vload<T>(sums + c) + vload<T>(bias + c) + (x != nullptr ? vload_tile(x + c) : Vec<T>{}));
}

// y from the hidden values of a few rows of every clip, whose clips lie clip_rows apart: tasks are panels of W2's
// columns.
template <class Kind>
static void finish_short(const ResidualUnitParams& p, const typename Kind::Tile* middle, int64_t clip_rows) {
  typedef typename Kind::Sum T;
  const int64_t ld = round_up(p.channels, kColumnUnit), rows = p.out_steps, work = p.batch * rows * p.channels;
  const int64_t shift = p.centre * p.dilation - p.pad_left;
  parallel(panel_count(p.channels), work * p.channels, [&](int64_t panel) {
    const int64_t n0 = panel_begin(p.channels, panel), width = panel_begin(p.channels, panel + 1) - n0;
    const int64_t channels = p.channels - n0 < width ? p.channels - n0 : width;
    T* out = scratch_rows<T>(kOutput, p.batch * rows, width);
    T* extra = scratch_rows<T>(kResidual, rows, width);
    const GemmOperand<typename Kind::Tile> pointwise{middle, ld, 0, 1, p.channels};
    const auto* weight = static_cast<const typename Kind::Weight*>(p.weight2);
    if (clip_rows == rows)  // one run of rows, in full register blocks
      conv_gemm_panel(p.batch * rows, pointwise, weight, p.channels, panel, out, width, {});
    else
      conv_gemm_panel(rows, pointwise, weight, p.channels, panel, out, width,
                      GemmClips{p.batch, clip_rows * ld, rows * width});
    for (int64_t b = 0; b < p.batch; ++b) {
      T* tile = out + b * rows * width;
      add_residual<T>(tile, extra, width, rows, channels, static_cast<const T*>(p.bias2) + n0, view_from(p.x, n0), b,
                      shift, p.in_valid(b));
      store_tile<T>(tile, width, rows, channels, view_from(p.y, n0), b, 0, p.out_valid(b));
    }
  });
}

}  // namespace DCX_NS
}  // namespace dcx
