// The repeat mode with 2 products per phase: from one phase to the next just two taps move a frame on, so that a phase
// is its neighbour plus what those taps give for the differences between frames (README.md). A task is one (clip,
// stretch of frames), or, of few frames, one panel of columns over all clips.
#include "differences.h"

#include "../common/gemm.h"
#include "../common/snake.h"
#include "../common/tile_io.h"

namespace dcx {
namespace DCX_NS {
namespace {

// Frames, differences and a panel's products of a task, in bytes.
constexpr int64_t kTaskBytes = 256 * 1024;
constexpr int64_t kMinFrames = 8 * kRowUnit<float>;

enum Slot { kInput = 0, kDifferences = 1, kProducts = 2, kOutput = 3, kAllInput = 4, kAllDifferences = 5, kShared = 7 };

// What a call's tasks share. Output frame q reads the frames q + first .. q + first + 3.
struct Layer {
  int64_t in_ld, stride, base, first, q_begin, frames;
  bool plain;
};

template <class T>
inline Layer layer_of(const SnakeUpsample1dParams& p) {
  Layer layer{};
  layer.in_ld = round_up(p.in_channels, kColumnUnit);
  layer.stride = p.phases.stride;
  layer.base = difference_base(p.phases);
  layer.first = p.phases.first(layer.base) - 1;
  layer.q_begin = p.first / layer.stride;
  layer.frames = ceil_div(p.first + p.out_steps, layer.stride) - layer.q_begin;
  layer.plain = is_direct<T>(p.y, p.out_channels);
  return layer;
}

// out[r] = in[r + 1] - in[r]; rows that far apart.
template <class T>
inline void subtract(T* out, const T* in, int64_t rows, int64_t row_numel) {
  for (int64_t i = 0; i < rows * row_numel; i += kLanes<T>)
    vstore<T>(out + i, vload<T>(in + row_numel + i) - vload<T>(in + i));
}

// Products of one panel, [stride][rows][width]: the base phase's, then those between phase i - 1 and phase i. Frames
// lie `step` elements apart in `in` and `differences`, rows in_ld.
template <class T>
void multiply(const SnakeUpsample1dParams& p, const Layer& layer, int64_t n0, int64_t width, const T* in,
              const T* differences, int64_t step, int64_t rows, T* products) {
  const T* weight = static_cast<const T*>(p.weight) + 2 * layer.stride * p.in_channels * n0;
  for (int64_t i = 0; i < layer.stride; ++i) {
    // The frames of the base are the second and the third; of the differences those before it are one frame earlier.
    const T* a = i == 0 ? in + step : differences + (i > layer.base ? step : 0);
    const GemmOperand<T> operand{a, layer.in_ld, step, 2, p.in_channels};
    conv_gemm_panel<T>(rows, operand, weight, width, 0, products + i * rows * width, width);
    weight += 2 * p.in_channels * width;
  }
}

// One panel of `rows` frames of item b, the first of them `frame`, to y. Row r of the products is row r * row_step.
template <class T>
void finish(const SnakeUpsample1dParams& p, const Layer& layer, int64_t n0, int64_t width, const T* products,
            int64_t product_stride, int64_t row_step, int64_t b, int64_t frame, int64_t rows) {
  const int64_t stride = layer.stride, begin = (layer.q_begin + frame) * stride - p.first;  // in y; may be negative
  const int64_t valid = (p.lengths != nullptr ? p.phases.output_steps(p.lengths[b]) : p.first + p.out_steps) - p.first;
  const int64_t channels = minimum(p.out_channels - n0, width);
  const T* bias = static_cast<const T*>(p.bias) + n0;
  T* out = layer.plain ? nullptr : scratch_rows<T>(kOutput, stride, width);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t0 = begin + r * stride;  // of phase 0
    const int64_t first = t0 < 0 ? -t0 : 0, last = minimum(stride, p.out_steps - t0);
    T* row = layer.plain ? row_of<T>(p.y, b, t0) + n0 : out;
    const int64_t step = layer.plain ? p.y.stride_t : width;
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      const T* in = products + r * row_step * width + c;
      const Vec<T> offset = vload<T>(bias + c), base = vload<T>(in);
      Vec<T> sum = base;
      for (int64_t phase = layer.base;; ++phase) {
        if (phase >= first && phase < last) vstore<T>(row + phase * step + c, sum + offset);
        if (phase + 1 >= last) break;
        sum = sum + vload<T>(in + (phase + 1) * product_stride);
      }
      sum = base;
      for (int64_t phase = layer.base - 1; phase >= first; --phase) {
        sum = sum - vload<T>(in + (phase + 1) * product_stride);
        if (phase < last) vstore<T>(row + phase * step + c, sum + offset);
      }
    }
    if (layer.plain) {
      for (int64_t phase = first; phase < last; ++phase)
        if (t0 + phase >= valid) memset(row + phase * step, 0, static_cast<size_t>(channels) * sizeof(T));
    } else if (last > first) {
      store_tile<T>(out + first * width, width, last - first, channels, view_from(p.y, n0), b, t0 + first, valid);
    }
  }
}

// A few frames of every clip; row r of clip b is r * batch + b, so that all of them are one operand.
template <class T>
void run_short(const SnakeUpsample1dParams& p, const Layer& layer, const T* shared) {
  const int64_t ld = layer.in_ld, in_rows = layer.frames + 3, rows = p.batch * layer.frames;
  T* in = scratch_rows<T>(kAllInput, p.batch * in_rows, ld);
  T* differences = scratch_rows<T>(kAllDifferences, p.batch * in_rows, ld);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t valid = p.lengths != nullptr ? p.lengths[b] : p.in_steps;
    for (int64_t r = 0; r < in_rows; ++r)
      load_snaked(in + (r * p.batch + b) * ld, ld, 1, p.in_channels, p.x, b, layer.q_begin + layer.first + r, valid,
                  shared, shared + ld);
  }
  subtract(differences, in, in_rows - 1, p.batch * ld);
  const int64_t work = rows * 2 * layer.stride * p.in_channels * p.out_channels;
  parallel(panel_count(p.out_channels), work, [&](int64_t panel) {
    const int64_t n0 = panel_begin(p.out_channels, panel), width = panel_begin(p.out_channels, panel + 1) - n0;
    T* products = scratch_rows<T>(kProducts, layer.stride * rows, width);
    multiply<T>(p, layer, n0, width, in, differences, p.batch * ld, rows, products);
    for (int64_t b = 0; b < p.batch; ++b)
      finish<T>(p, layer, n0, width, products + b * width, rows * width, p.batch, b, 0, layer.frames);
  });
}

template <class T>
void run(const SnakeUpsample1dParams& p) {
  const Layer layer = layer_of<T>(p);
  const int64_t ld = layer.in_ld;
  T* shared = scratch_rows<T>(kShared, 2, ld);
  snake_prepare<T>(shared, ld, static_cast<const T*>(p.alpha), p.in_channels);
  if (is_short(layer.frames, p.batch)) {
    run_short<T>(p, layer, shared);
    return;
  }
  const int64_t row_bytes = (2 * ld + layer.stride * kMaxPanelWidth) * static_cast<int64_t>(sizeof(T));
  const int64_t fitting = within_l2(kTaskBytes) / row_bytes / kRowUnit<float> * kRowUnit<float>;
  const int64_t frames = tile_rows(layer.frames, p.batch, fitting < kMinFrames ? kMinFrames : fitting, kRowUnit<float>);
  const int64_t tiles = ceil_div(layer.frames, frames), panels = panel_count(p.out_channels);
  parallel(p.batch * tiles, [&](int64_t task) {
    const int64_t b = task / tiles, frame = task % tiles * frames, count = minimum(frames, layer.frames - frame);
    const int64_t valid = p.lengths != nullptr ? p.lengths[b] : p.in_steps;
    T* in = scratch_rows<T>(kInput, frames + 3, ld);
    T* differences = scratch_rows<T>(kDifferences, frames + 2, ld);
    T* products = scratch_rows<T>(kProducts, layer.stride * frames, kMaxPanelWidth);
    load_snaked(in, ld, count + 3, p.in_channels, p.x, b, layer.q_begin + frame + layer.first, valid, shared,
                shared + ld);
    subtract(differences, in, count + 2, ld);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t n0 = panel_begin(p.out_channels, panel), width = panel_begin(p.out_channels, panel + 1) - n0;
      multiply<T>(p, layer, n0, width, in, differences, ld, count, products);
      finish<T>(p, layer, n0, width, products, count * width, 1, b, frame, count);
    }
  });
}

}  // namespace

void snake_upsample1d_differences(const SnakeUpsample1dParams& p) {
  if (p.x.dtype == DType::kF64)
    run<double>(p);
  else
    run<float>(p);
}

}  // namespace DCX_NS
}  // namespace dcx
