// y = bias + upsample(snake(x)), one parallel task per (clip, tile of frames), every phase of the tile from the same
// rows. A phase is a conv_gemm whose output rows are S apart in the tile [frame][phase][channel]: neither col2im nor
// the repeated signal exists.
#include "params.h"

#include "../common/gemm.h"
#include "../common/snake.h"
#include "../common/tile_io.h"

namespace dcx {
namespace DCX_NS {

void snake_upsample1d_winograd(const SnakeUpsample1dParams& p);     // winograd_cpu.cpp
void snake_upsample1d_differences(const SnakeUpsample1dParams& p);  // differences_cpu.cpp

namespace {

// Input and output tile together, in bytes: half of a 1 MB L2, the rest is for the streamed weights.
constexpr int64_t kTileBytes = 512 * 1024;
constexpr int64_t kMinTileFrames = 64;

enum Slot { kInput = 0, kOutput = 1, kAllInput = 4, kShared = 7 };

// A few frames of every clip: a task is one phase of one panel of the output's columns. The clips' rows lie step by
// step, row r of clip b at r * batch + b, so that all of them are one operand.
template <class Kind>
void run_short(const SnakeUpsample1dParams& p, const typename Kind::Sum* shared, int64_t first, int64_t span) {
  typedef typename Kind::Tile Tile;
  typedef typename Kind::Sum T;
  const int64_t in_ld = round_up(p.in_channels, kColumnUnit), out_ld = round_up(p.out_channels, kColumnUnit);
  const int64_t stride = p.phases.stride, last_step = p.first + p.out_steps;
  const int64_t q_begin = p.first / stride, frames = ceil_div(last_step, stride) - q_begin, in_rows = frames + span - 1;
  Tile* in =
      static_cast<Tile*>(thread_scratch(kAllInput, static_cast<size_t>(p.batch * in_rows * in_ld) * sizeof(Tile)));
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t valid = p.lengths != nullptr ? p.lengths[b] : p.in_steps;
    const RowRange inside = rows_inside(q_begin + first, in_rows, valid);
    for (int64_t r = 0; r < in_rows; ++r) {
      Tile* row = in + (r * p.batch + b) * in_ld;
      load_tile<Tile>(row, in_ld, 1, p.in_channels, p.x, b, q_begin + first + r, valid);
      if (r >= inside.first && r < inside.last) snake_rows(row, in_ld, 1, shared, shared + in_ld, in_ld);
    }
  }
  const int64_t panels = panel_count(p.out_channels);
  const int64_t work = p.batch * frames * p.phases.total_taps() * p.in_channels * p.out_channels;
  parallel(stride * panels, work, [&](int64_t task) {
    const int64_t phase = task / panels, panel = task % panels, taps = p.phases.taps(phase);
    // Steps of this phase that y holds: q0 * stride + phase is the first.
    const int64_t q0 = q_begin * stride + phase < p.first ? q_begin + 1 : q_begin;
    const int64_t steps = last_step > phase ? ceil_div(last_step - phase, stride) - q0 : 0;
    if (steps <= 0) return;
    const int64_t n0 = panel_begin(p.out_channels, panel), width = panel_begin(p.out_channels, panel + 1) - n0;
    const int64_t channels = p.out_channels - n0 < width ? p.out_channels - n0 : width;
    const auto* weight = static_cast<const typename Kind::Weight*>(p.weight);
    for (int64_t earlier = 0; earlier < phase; ++earlier)
      weight += p.phases.taps(earlier) * weight_steps<Kind>(p.in_channels) * out_ld;
    T* out = static_cast<T*>(thread_scratch(kOutput, static_cast<size_t>(p.batch * frames * width) * sizeof(T)));
    const int64_t step = p.batch * in_ld;
    const GemmOperand<Tile> operand{in + (p.phases.first(phase) - first + q0 - q_begin) * step, in_ld, step, taps,
                                    p.in_channels};
    conv_gemm_panel<Tile>(p.batch * steps, operand, weight, p.out_channels, panel, out, width);
    add_bias<T>(out, width, p.batch * steps, static_cast<const T*>(p.bias) + n0, width);
    TensorView y = view_from(p.y, n0, q0 * stride + phase - p.first);
    y.stride_t *= stride;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t valid = p.lengths != nullptr ? p.phases.output_steps(p.lengths[b]) : last_step;
      const int64_t kept = valid > phase ? ceil_div(valid - phase, stride) - q0 : 0;
      for (int64_t r = 0; r < steps; ++r)
        store_tile<T>(out + (r * p.batch + b) * width, width, 1, channels, y, b, r, kept);
    }
  });
}

template <class Kind>
void run(const SnakeUpsample1dParams& p) {
  typedef typename Kind::Tile Tile;
  typedef typename Kind::Sum T;
  const int64_t in_ld = round_up(p.in_channels, kColumnUnit), out_ld = round_up(p.out_channels, kColumnUnit);
  const int64_t stride = p.phases.stride;
  T* shared = static_cast<T*>(thread_scratch(kShared, static_cast<size_t>(2 * in_ld) * sizeof(T)));
  snake_prepare<T>(shared, in_ld, static_cast<const T*>(p.alpha), p.in_channels);
  int64_t first = p.phases.first(0), last = first;
  for (int64_t phase = 0; phase < stride; ++phase) {
    const int64_t begin = p.phases.first(phase), end = begin + p.phases.taps(phase);
    if (begin < first) first = begin;
    if (end > last) last = end;
  }
  const int64_t span = last - first;  // frames under one output frame

  const int64_t q_begin = p.first / stride, q_end = ceil_div(p.first + p.out_steps, stride);
  const int64_t frames_out = q_end - q_begin;
  if (is_short(frames_out, p.batch)) {
    run_short<Kind>(p, shared, first, span);
    return;
  }
  const int64_t fitting = within_l2(kTileBytes) / ((in_ld + stride * out_ld) * static_cast<int64_t>(sizeof(T)));
  const int64_t frames = tile_rows(frames_out, p.batch, fitting < kMinTileFrames ? kMinTileFrames : fitting, 8);
  const int64_t tiles = ceil_div(frames_out, frames);

  parallel(p.batch * tiles, [&](int64_t task) {
    const int64_t b = task / tiles, q0 = q_begin + task % tiles * frames;
    const int64_t count = q_end - q0 < frames ? q_end - q0 : frames;
    // The steps of these frames that y holds.
    const int64_t t0 = q0 * stride < p.first ? p.first : q0 * stride, last_step = p.first + p.out_steps;
    const int64_t steps = (last_step < (q0 + count) * stride ? last_step : (q0 + count) * stride) - t0;
    const int64_t in_valid = p.lengths != nullptr ? p.lengths[b] : p.in_steps;
    const int64_t out_valid = p.lengths != nullptr ? p.phases.output_steps(in_valid) : last_step;
    Tile* in = static_cast<Tile*>(thread_scratch(kInput, static_cast<size_t>((frames + span) * in_ld) * sizeof(Tile)));
    T* out = static_cast<T*>(thread_scratch(kOutput, static_cast<size_t>(frames * stride * out_ld) * sizeof(T)));
    load_snaked(in, in_ld, count + span - 1, p.in_channels, p.x, b, q0 + first, in_valid, shared, shared + in_ld);
    const auto* weight = static_cast<const typename Kind::Weight*>(p.weight);
    for (int64_t phase = 0; phase < stride; ++phase) {
      const int64_t taps = p.phases.taps(phase);
      const GemmOperand<Tile> operand{in + (p.phases.first(phase) - first) * in_ld, in_ld, in_ld, taps, p.in_channels};
      conv_gemm<Tile>(count, operand, weight, p.out_channels, out + phase * out_ld, stride * out_ld);
      weight += taps * weight_steps<Kind>(p.in_channels) * out_ld;
    }
    T* kept = out + (t0 - q0 * stride) * out_ld;
    add_bias<T>(kept, out_ld, steps, static_cast<const T*>(p.bias), out_ld);
    store_tile<T>(kept, out_ld, steps, p.out_channels, p.y, b, t0 - p.first, out_valid - p.first);
  });
}

}  // namespace

void snake_upsample1d(const SnakeUpsample1dParams& p) {
  if (p.winograd != 0 && p.phases.mode == UpsampleMode::kRepeat)
    snake_upsample1d_differences(p);
  else if (p.winograd != 0)
    snake_upsample1d_winograd(p);
  else if (p.x.dtype == DType::kF64)
    run<DoubleKind>(p);
  else if (p.x.dtype == DType::kBF16)
    run<Bf16Kind>(p);
  else
    run<SingleKind>(p);
}

}  // namespace DCX_NS
}  // namespace dcx
