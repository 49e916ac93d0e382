// Transposed snake_upsample1d with 4 products for 3 frames. Phases read the frames from q + f or from q + f + 1 on; a
// group of 3 frames is transformed once for both, into 7 operands, of which a phase multiplies 4. A task is one (clip,
// stretch of groups), or, of few groups, one panel of a phase's columns.
#include "winograd.h"

#include "../common/gemm.h"
#include "../common/snake.h"
#include "../common/tile_io.h"
#include "params.h"

namespace dcx {
namespace DCX_NS {
namespace {

// Input, operands and products of a task, in bytes. Wide layers stream their weights once per task, which a few
// register blocks of rows must be worth.
constexpr int64_t kTaskBytes = 256 * 1024;
constexpr int64_t kMinGroups = 8 * kRowUnit<float>;
// A panel's weights for one phase beyond this are fetched while the ones before them are multiplied.
constexpr int64_t kFetchedBytes = 512 * 1024;
constexpr int64_t kFewGroups = 64;
constexpr int64_t kOperands = 7;
constexpr int64_t kWindow = kUpsampleOutputs + 2;  // frames under a group

enum Slot { kInput = 0, kTransformed = 1, kProducts = 2, kOutput = 3, kAllInput = 4, kAllTransformed = 5, kShared = 7 };

// Rows of the operands from a group's frames: the earlier phases multiply 0 .. 3, the later ones 3 .. 6.
template <class T>
inline void transform_input(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t width) {
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    Vec<T> x[kWindow];
#pragma GCC unroll 8
    for (int i = 0; i < kWindow; ++i) x[i] = vload<T>(in + i * in_stride + c);
    vstore<T>(out + c, x[0] - x[2]);
    vstore<T>(out + 1 * out_stride + c, x[2] + x[1]);
    vstore<T>(out + 2 * out_stride + c, x[2] - x[1]);
    vstore<T>(out + 3 * out_stride + c, x[1] - x[3]);
    vstore<T>(out + 4 * out_stride + c, x[3] + x[2]);
    vstore<T>(out + 5 * out_stride + c, x[3] - x[2]);
    vstore<T>(out + 6 * out_stride + c, x[2] - x[4]);
  }
}

// What a call's tasks share.
struct Layer {
  int64_t in_ld, out_ld, stride, first, split, q_begin, frames, groups;  // phases from `split` on read a frame later
  bool plain;
};

template <class T>
inline Layer layer_of(const SnakeUpsample1dParams& p) {
  Layer layer{};
  layer.in_ld = round_up(p.in_channels, kColumnUnit);
  layer.out_ld = round_up(p.out_channels, kColumnUnit);
  layer.stride = p.phases.stride;
  layer.first = p.phases.first(0);
  while (layer.split < layer.stride && p.phases.first(layer.split) == layer.first) ++layer.split;
  layer.q_begin = p.first / layer.stride;
  layer.frames = ceil_div(p.out_steps, layer.stride);
  layer.groups = ceil_div(layer.frames, int64_t{kUpsampleOutputs});
  layer.plain = is_direct<T>(p.y, p.out_channels);
  return layer;
}

// One panel of one phase: `rows` groups' products with operands [7][operand_rows][in_ld], into [4][rows][width].
// `later` is fetched meanwhile.
template <class T>
void multiply(const SnakeUpsample1dParams& p, const Layer& layer, int64_t phase, int64_t n0, int64_t width,
              const T* transformed, int64_t operand_rows, int64_t rows, T* products, GemmFetch later = {}) {
  const T* weight = static_cast<const T*>(p.weight) + kUpsampleProducts * p.in_channels * (phase * layer.out_ld + n0);
  const T* a = transformed + (phase < layer.split ? 0 : 3) * operand_rows * layer.in_ld;
  const bool fetched = kUpsampleProducts * p.in_channels * width * static_cast<int64_t>(sizeof(T)) > kFetchedBytes;
  for (int i = 0; i < kUpsampleProducts; ++i) {
    GemmOperand<T> operand{a, layer.in_ld, 0, 1, p.in_channels};
    operand.later = later.part(i, kUpsampleProducts);
    conv_gemm_among<T>(fetched, rows, operand, weight, width, products + i * rows * width);
    a += operand_rows * layer.in_ld;
    weight += p.in_channels * width;
  }
}

// One panel of one phase of `rows` groups of item b, the first of them `group`, to y.
template <class T>
void finish(const SnakeUpsample1dParams& p, const Layer& layer, int64_t phase, int64_t n0, int64_t width,
            const T* products, int64_t product_stride, int64_t b, int64_t group, int64_t rows) {
  const int64_t stride = layer.stride, frame = group * kUpsampleOutputs;
  const int64_t valid = (p.lengths != nullptr ? p.phases.output_steps(p.lengths[b]) : p.first + p.out_steps) - p.first;
  const int64_t count = minimum(rows * kUpsampleOutputs, ceil_div(p.out_steps - phase, stride) - frame);
  T* out = layer.plain ? row_of<T>(p.y, b, frame * stride + phase) + n0
                       : scratch_rows<T>(kOutput, rows * kUpsampleOutputs, width);
  const int64_t step = layer.plain ? stride * p.y.stride_t : width;
  const T* bias = static_cast<const T*>(p.bias) + n0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t left = count - r * kUpsampleOutputs;
    T* row = out + r * kUpsampleOutputs * step;
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      const T* in = products + r * width + c;
      const Vec<T> plus = vload<T>(in + product_stride), minus = vload<T>(in + 2 * product_stride);
      const Vec<T> offset = vload<T>(bias + c), sum = plus + minus;
      if (left > 0) vstore<T>(row + c, vload<T>(in) + sum + offset);
      if (left > 1) vstore<T>(row + step + c, plus - minus + offset);
      if (left > 2) vstore<T>(row + 2 * step + c, sum + vload<T>(in + 3 * product_stride) + offset);
    }
  }
  const int64_t kept = valid > phase ? ceil_div(valid - phase, stride) - frame : -frame;  // frames that count
  if (!layer.plain) {
    const int64_t channels = minimum(p.out_channels - n0, width);
    TensorView y = view_from(p.y, n0, frame * stride + phase);
    y.stride_t *= stride;
    if (count > 0) store_tile<T>(out, width, count, channels, y, b, 0, kept);
    return;
  }
  for (int64_t f = kept < 0 ? 0 : kept; f < count; ++f)
    memset(out + f * step, 0, static_cast<size_t>(width) * sizeof(T));
}

// Frames [begin, begin + rows) of item b under the call's groups, snaked.
template <class T>
void load(const SnakeUpsample1dParams& p, const Layer& layer, T* tile, int64_t b, int64_t begin, int64_t rows,
          const T* shared) {
  const int64_t valid = p.lengths != nullptr ? p.lengths[b] : p.in_steps, ld = layer.in_ld;
  load_snaked(tile, ld, rows, p.in_channels, p.x, b, layer.q_begin + layer.first + begin, valid, shared, shared + ld);
}

template <class T>
void run_few(const SnakeUpsample1dParams& p, const Layer& layer, const T* shared) {
  const int64_t ld = layer.in_ld, groups = layer.groups, rows = p.batch * groups;
  const int64_t in_rows = groups * kUpsampleOutputs + 2;
  T* in = scratch_rows<T>(kAllInput, p.batch * in_rows, ld);
  T* transformed = scratch_rows<T>(kAllTransformed, kOperands * rows, ld);
  const int64_t blocks = ceil_div(in_rows, kRowUnit<float>), work = rows * p.in_channels * kUpsampleProducts;
  parallel(p.batch * blocks, work * kOperands, [&](int64_t task) {
    const int64_t b = task / blocks, begin = task % blocks * kRowUnit<float>;
    load<T>(p, layer, in + (b * in_rows + begin) * ld, b, begin, minimum(kRowUnit<float>, in_rows - begin), shared);
  });
  parallel(rows, work, [&](int64_t row) {
    const int64_t b = row / groups, group = row % groups;
    transform_input<T>(in + (b * in_rows + group * kUpsampleOutputs) * ld, ld, transformed + row * ld, rows * ld, ld);
  });
  const int64_t panels = panel_count(p.out_channels);
  parallel(layer.stride * panels, work * layer.stride * p.out_channels, [&](int64_t task) {
    const int64_t phase = task / panels, panel = task % panels;
    const int64_t n0 = panel_begin(p.out_channels, panel), width = panel_begin(p.out_channels, panel + 1) - n0;
    T* products = scratch_rows<T>(kProducts, kUpsampleProducts * rows, width);
    multiply<T>(p, layer, phase, n0, width, transformed, rows, rows, products);
    for (int64_t b = 0; b < p.batch; ++b)
      finish<T>(p, layer, phase, n0, width, products + b * groups * width, rows * width, b, 0, groups);
  });
}

template <class T>
void run(const SnakeUpsample1dParams& p) {
  const Layer layer = layer_of<T>(p);
  const int64_t ld = layer.in_ld;
  T* shared = scratch_rows<T>(kShared, 2, ld);
  snake_prepare<T>(shared, ld, static_cast<const T*>(p.alpha), p.in_channels);
  if (layer.groups * p.batch <= kFewGroups) {
    run_few<T>(p, layer, shared);
    return;
  }
  const int64_t row_bytes =
      ((kOperands + kUpsampleOutputs) * ld + kUpsampleProducts * kMaxPanelWidth) * static_cast<int64_t>(sizeof(T));
  const int64_t fitting = within_l2(kTaskBytes) / row_bytes / kRowUnit<float> * kRowUnit<float>;
  const int64_t rows = tile_rows(layer.groups, p.batch, fitting < kMinGroups ? kMinGroups : fitting, kRowUnit<float>);
  const int64_t tiles = ceil_div(layer.groups, rows), panels = panel_count(p.out_channels);
  parallel(p.batch * tiles, [&](int64_t task) {
    const int64_t b = task / tiles, group = task % tiles * rows, count = minimum(rows, layer.groups - group);
    T* in = scratch_rows<T>(kInput, rows * kUpsampleOutputs + 2, ld);
    T* transformed = scratch_rows<T>(kTransformed, kOperands * rows, ld);
    T* products = scratch_rows<T>(kProducts, kUpsampleProducts * rows, kMaxPanelWidth);
    load<T>(p, layer, in, b, group * kUpsampleOutputs, count * kUpsampleOutputs + 2, shared);
    for (int64_t r = 0; r < count; ++r)
      transform_input<T>(in + r * kUpsampleOutputs * ld, ld, transformed + r * ld, count * ld, ld);
    // The first phase's products fetch the rows of y that all phases write.
    GemmFetch written;
    if (layer.plain && p.y.stride_t == p.out_channels) {
      const int64_t begin = group * kUpsampleOutputs * layer.stride;
      const int64_t end = minimum(p.out_steps, begin + count * kUpsampleOutputs * layer.stride);
      written = {reinterpret_cast<char*>(row_of<T>(p.y, b, begin)),
                 (end - begin) * p.out_channels * static_cast<int64_t>(sizeof(T))};
    }
    for (int64_t phase = 0; phase < layer.stride; ++phase)
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t n0 = panel_begin(p.out_channels, panel), width = panel_begin(p.out_channels, panel + 1) - n0;
        multiply<T>(p, layer, phase, n0, width, transformed, count, count, products,
                    phase == 0 ? written.part(panel, panels) : GemmFetch{});
        finish<T>(p, layer, phase, n0, width, products, count * width, b, group, count);
      }
  });
}

}  // namespace

void snake_upsample1d_winograd(const SnakeUpsample1dParams& p) {
  if (p.x.dtype == DType::kF64)
    run<double>(p);
  else
    run<float>(p);
}

}  // namespace DCX_NS
}  // namespace dcx
