// y = LayerNorm(bias + depthwise conv(x)), one parallel task per (clip, time tile).
// A task loads its rows as [time][channel]; a row of the output is K multiply-adds per channel register, then, while
// the row is in L1, its mean and variance in two passes. Nothing crosses rows, so a tile may start anywhere.
#include "params.h"

#include "../common/conv_shape.h"
#include "../common/layer_norm.h"
#include "../common/runtime.h"
#include "../common/tile_io.h"

namespace dcx {
namespace DCX_NS {
namespace {

// Input and output tile together, in bytes: well inside a 1 MB L2.
constexpr int64_t kTileBytes = 256 * 1024;

enum Slot { kInput = 0, kOutput = 1 };

template <class T>
void run(const CausalDwconv1dParams& p) {
  const int64_t ld = round_up(p.channels, kColumnUnit);
  const int64_t fitting = within_l2(kTileBytes) / (2 * ld * static_cast<int64_t>(sizeof(T)));
  const int64_t rows = tile_rows(p.out_steps, p.batch, fitting < 16 ? 16 : fitting, 8);
  const int64_t tiles = ceil_div(p.out_steps, rows);
  const int64_t halo = p.taps - 1;
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);

  parallel(p.batch * tiles, p.batch * p.out_steps * (p.taps + 8) * p.channels, [&](int64_t task) {
    const int64_t b = task / tiles, t0 = task % tiles * rows;
    const int64_t count = p.out_steps - t0 < rows ? p.out_steps - t0 : rows;
    const int64_t in_valid = p.lengths != nullptr ? p.lengths[b] : p.in_steps;
    const int64_t out_valid =
        p.lengths != nullptr ? conv_output_steps(in_valid, p.taps, 1, 1, p.pad_left, p.pad_right) : p.out_steps;
    T* in = static_cast<T*>(thread_scratch(kInput, static_cast<size_t>((rows + halo) * ld) * sizeof(T)));
    T* out = static_cast<T*>(thread_scratch(kOutput, static_cast<size_t>(rows * ld) * sizeof(T)));
    load_tile<T>(in, ld, count + halo, p.channels, p.x, b, t0 - p.pad_left, in_valid);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < ld; c += kLanes<T>) {
        Vec<T> acc = vload<T>(bias + c);
        for (int64_t k = 0; k < p.taps; ++k)
          acc = vfma(vload<T>(in + (r + k) * ld + c), vload<T>(weight + k * ld + c), acc);
        vstore<T>(out + r * ld + c, acc);
      }
      if (p.ln_weight != nullptr)
        layer_norm_row<T>(out + r * ld, p.channels, ld, static_cast<const T*>(p.ln_weight),
                          static_cast<const T*>(p.ln_bias), static_cast<T>(p.eps));
    }
    store_tile<T>(out, ld, count, p.channels, p.y, b, t0, out_valid);
  });
}

}  // namespace

void causal_dwconv1d(const CausalDwconv1dParams& p) {
  if (p.x.dtype == DType::kF64)
    run<double>(p);
  else
    run<float>(p);
}

}  // namespace DCX_NS
}  // namespace dcx
