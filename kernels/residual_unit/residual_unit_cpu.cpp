// y = x + W2 snake(W1 * snake(x)), one parallel task per (clip, time tile), the whole chain in cache.
// A task loads rows + 6 * dilation input rows as [time][channel], keeps the ones that the residual needs, applies Snake
// in place, runs the dilated k=7 convolution as conv_gemm (a tap is a row offset), Snake, the 1x1, the addition, and
// stores.
#include "../common/snake.h"
#include "short_cpu.h"

namespace dcx {
namespace DCX_NS {

void residual_unit_winograd(const ResidualUnitParams& p);  // winograd_cpu.cpp

namespace {

// The three tiles together, in bytes: what leaves room in a 1 MB L2 for the streamed weights.
constexpr int64_t kTileBytes = 576 * 1024;
// Wide layers stream megabytes of weights per tile; fewer rows than this and the stream would bound them.
constexpr int64_t kMinTileRows = 128;

// A few rows of every clip: tasks are panels of the output's columns, first of W1 with Snake behind it, then of W2. The
// clips' input rows lie step by step, row r of clip b at r * batch + b, so that all of them are one operand.
template <class Kind>
void run_short(const ResidualUnitParams& p, const typename Kind::Sum* shared) {
  typedef typename Kind::Tile Tile;
  typedef typename Kind::Sum T;
  const int64_t ld = round_up(p.channels, kColumnUnit), rows = p.out_steps;
  const int64_t halo = p.dilation * (kResidualUnitTaps - 1), in_rows = rows + halo;
  Tile* in = scratch_rows<Tile>(kAllInput, p.batch * in_rows, ld);
  Tile* middle = scratch_rows<Tile>(kAllMiddle, p.batch * rows, ld);
  for (int64_t b = 0; b < p.batch; ++b) {
    const RowRange inside = rows_inside(-p.pad_left, in_rows, p.in_valid(b));
    for (int64_t r = 0; r < in_rows; ++r) {
      if (r % p.dilation >= rows) continue;  // between the taps of all outputs
      Tile* row = in + (r * p.batch + b) * ld;
      load_tile<Tile>(row, ld, 1, p.channels, p.x, b, r - p.pad_left, p.in_valid(b));
      if (r >= inside.first && r < inside.last) snake_rows(row, ld, 1, shared, shared + ld, ld);
    }
  }
  const int64_t work = p.batch * rows * p.channels * p.channels * kResidualUnitTaps;
  parallel(panel_count(p.channels), work, [&](int64_t panel) {
    const int64_t n0 = panel_begin(p.channels, panel), width = panel_begin(p.channels, panel + 1) - n0;
    T* out = scratch_rows<T>(kOutput, p.batch * rows, width);
    const GemmOperand<Tile> dilated{in, ld, p.dilation * p.batch * ld, kResidualUnitTaps, p.channels};
    conv_gemm_panel<Tile>(p.batch * rows, dilated, static_cast<const typename Kind::Weight*>(p.weight1), p.channels,
                          panel, out, width);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t b = 0; b < p.batch; ++b)
        bias_snake(middle + (b * rows + r) * ld + n0, ld, out + (r * p.batch + b) * width, width, 1,
                   static_cast<const T*>(p.bias1) + n0, shared + 2 * ld + n0, shared + 3 * ld + n0, width);
  });
  finish_short<Kind>(p, middle, rows);
}

template <class Kind>
void run(const ResidualUnitParams& p) {
  typedef typename Kind::Tile Tile;
  typedef typename Kind::Sum T;
  const int64_t ld = round_up(p.channels, kColumnUnit);
  const int64_t halo = p.dilation * (kResidualUnitTaps - 1);
  T* shared = static_cast<T*>(thread_scratch(kShared, static_cast<size_t>(4 * ld) * sizeof(T)));
  snake_prepare<T>(shared, ld, static_cast<const T*>(p.alpha1), p.channels);
  snake_prepare<T>(shared + 2 * ld, ld, static_cast<const T*>(p.alpha2), p.channels);
  if (is_short(p.out_steps, p.batch)) {
    run_short<Kind>(p, shared);
    return;
  }

  const int64_t fitting = (within_l2(kTileBytes) / (ld * static_cast<int64_t>(sizeof(T))) - halo) / 3;
  const int64_t rows = tile_rows(p.out_steps, p.batch, fitting < kMinTileRows ? kMinTileRows : fitting, kRowUnit<Tile>);
  const int64_t tiles = ceil_div(p.out_steps, rows);

  parallel(p.batch * tiles, [&](int64_t task) {
    const int64_t b = task / tiles, t0 = task % tiles * rows;
    const int64_t count = p.out_steps - t0 < rows ? p.out_steps - t0 : rows;
    const int64_t in_valid = p.in_valid(b);
    const size_t numel = static_cast<size_t>(rows * ld);
    // The input tile holds the residual too, in the sums' type.
    Tile* in = static_cast<Tile*>(thread_scratch(
        kInput, (numel + static_cast<size_t>(halo * ld)) * sizeof(Tile) + (sizeof(Tile) < sizeof(T) ? numel : 0) * 2));
    Tile* middle = static_cast<Tile*>(thread_scratch(kMiddle, numel * sizeof(Tile)));
    T* out = static_cast<T*>(thread_scratch(kOutput, numel * sizeof(T)));
    load_snaked(in, ld, count + halo, p.channels, p.x, b, t0 - p.pad_left, in_valid, shared, shared + ld);
    const GemmOperand<Tile> dilated{in, ld, p.dilation * ld, kResidualUnitTaps, p.channels};
    conv_gemm<Tile>(count, dilated, static_cast<const typename Kind::Weight*>(p.weight1), p.channels, out, ld);
    bias_snake(middle, ld, out, ld, count, static_cast<const T*>(p.bias1), shared + 2 * ld, shared + 3 * ld, ld);
    const GemmOperand<Tile> pointwise{middle, ld, 0, 1, p.channels};
    conv_gemm<Tile>(count, pointwise, static_cast<const typename Kind::Weight*>(p.weight2), p.channels, out, ld);
    // The residual is read again, un-snaked: it is still in L2, and a copy of the tile would take its place there.
    if (is_direct<Tile>(p.x, p.channels) && is_direct<Tile>(p.y, p.channels)) {
      for (int64_t r = 0; r < count; ++r) finish_row<Tile>(p, out + r * ld, b, t0 + r);
      return;
    }
    add_residual<T>(out, reinterpret_cast<T*>(in), ld, count, p.channels, static_cast<const T*>(p.bias2), p.x, b,
                    t0 - p.pad_left + p.centre * p.dilation, in_valid);
    store_tile<T>(out, ld, count, p.channels, p.y, b, t0, p.out_valid(b));
  });
}

}  // namespace

void residual_unit(const ResidualUnitParams& p) {
  if (p.winograd != 0)
    residual_unit_winograd(p);
  else if (p.x.dtype == DType::kF64)
    run<DoubleKind>(p);
  else if (p.x.dtype == DType::kBF16)
    run<Bf16Kind>(p);
  else
    run<SingleKind>(p);
}

}  // namespace DCX_NS
}  // namespace dcx
