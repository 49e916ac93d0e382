// y = x + W2 snake(W1 * snake(x)), one parallel task per (clip, time tile), the whole chain in cache.
// A task loads rows + 6 * dilation input rows as [time][channel], keeps the ones that the residual needs, applies Snake
// in place, runs the dilated k=7 convolution as conv_gemm (a tap is a row offset), Snake, the 1x1, the addition, and
// stores.
#include "params.h"

#include "../common/conv_shape.h"
#include "../common/gemm.h"
#include "../common/snake.h"
#include "../common/tile_io.h"

namespace dcx {
namespace DCX_NS {
namespace {

// The three tiles together, in bytes: what leaves room in a 1 MB L2 for the streamed weights.
constexpr int64_t kTileBytes = 576 * 1024;
// Wide layers stream megabytes of weights per tile; fewer rows than this and the stream would bound them.
constexpr int64_t kMinTileRows = 128;

enum Slot { kInput = 0, kMiddle = 1, kOutput = 2, kShared = 7 };

template <class T>
void run(const ResidualUnitParams& p) {
  const int64_t ld = round_up(p.channels, kColumnUnit);
  const int64_t halo = p.dilation * (kResidualUnitTaps - 1);
  T* shared = static_cast<T*>(thread_scratch(kShared, static_cast<size_t>(4 * ld) * sizeof(T)));
  snake_prepare<T>(shared, ld, static_cast<const T*>(p.alpha1), p.channels);
  snake_prepare<T>(shared + 2 * ld, ld, static_cast<const T*>(p.alpha2), p.channels);

  const int64_t fitting = (kTileBytes / (ld * static_cast<int64_t>(sizeof(T))) - halo) / 3;
  const int64_t rows = tile_rows(p.out_steps, p.batch, fitting < kMinTileRows ? kMinTileRows : fitting, kColumnUnit);
  const int64_t tiles = ceil_div(p.out_steps, rows);

  parallel(p.batch * tiles, [&](int64_t task) {
    const int64_t b = task / tiles, t0 = task % tiles * rows;
    const int64_t count = p.out_steps - t0 < rows ? p.out_steps - t0 : rows;
    const int64_t in_valid = p.lengths != nullptr ? p.lengths[b] : p.in_steps;
    const int64_t out_valid =
        p.lengths != nullptr ? conv_output_steps(in_valid, kResidualUnitTaps, 1, p.dilation, p.pad_left, p.pad_right)
                             : p.out_steps;
    const size_t tile_bytes = static_cast<size_t>(rows * ld) * sizeof(T);
    T* in = static_cast<T*>(thread_scratch(kInput, tile_bytes + static_cast<size_t>(halo * ld) * sizeof(T)));
    T* middle = static_cast<T*>(thread_scratch(kMiddle, tile_bytes));
    T* out = static_cast<T*>(thread_scratch(kOutput, tile_bytes));
    load_tile<T>(in, ld, count + halo, p.channels, p.x, b, t0 - p.pad_left, in_valid);
    snake_rows(in, ld, count + halo, shared, shared + ld);
    const GemmOperand<T> dilated{in, ld, p.dilation * ld, kResidualUnitTaps, p.channels};
    conv_gemm<T>(count, dilated, static_cast<const T*>(p.weight1), p.channels, middle, ld);
    add_bias<T>(middle, ld, count, static_cast<const T*>(p.bias1));
    snake_rows(middle, ld, count, shared + 2 * ld, shared + 3 * ld);
    const GemmOperand<T> pointwise{middle, ld, 0, 1, p.channels};
    conv_gemm<T>(count, pointwise, static_cast<const T*>(p.weight2), p.channels, out, ld);
    // The residual is read again, un-snaked: it is still in L2, and a copy of the tile would take its place there.
    load_tile<T>(in, ld, count, p.channels, p.x, b, t0 - p.pad_left + p.centre * p.dilation, in_valid);
    const T* bias2 = static_cast<const T*>(p.bias2);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < ld; c += kLanes<T>) {
        T* value = out + r * ld + c;
        vstore<T>(value, vload<T>(value) + vload<T>(bias2 + c) + vload<T>(in + r * ld + c));
      }
    store_tile<T>(out, ld, count, p.channels, p.y, b, t0, out_valid);
  });
}

}  // namespace

void residual_unit(const ResidualUnitParams& p) {
  if (p.x.dtype == DType::kF64)
    run<double>(p);
  else
    run<float>(p);
}

}  // namespace DCX_NS
}  // namespace dcx
