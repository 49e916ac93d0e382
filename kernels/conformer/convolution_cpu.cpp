// One parallel task per (clip, time tile): gate and convolve 64 channels after another, whose window of steps and taps
// stay in L1, then norm and swish row after row. Nothing crosses rows, so a tile may start anywhere.
#include "params.h"

#include "../common/activation.h"
#include "../common/layer_norm.h"
#include "../common/tile_io.h"

namespace dcx {
namespace DCX_NS {
namespace {

constexpr int64_t kMostRows = 64;
constexpr int64_t kChannels = kConformerChannels;  // 94 steps of them and 31 taps are 32 KB
#if DCX_ISA >= 2
constexpr int kBlockRows = 8;
#else
constexpr int kBlockRows = 4;
#endif
constexpr int kBlockVectors = 2;

enum Slot { kGate = 0, kInput = 1, kOutput = 2 };

// `Rows` rows of a stretch of channels; rows of out and weight are ld apart.
template <int Rows>
inline void convolve(float* out, const float* in, const float* weight, int64_t ld, int64_t taps) {
  constexpr int64_t kWide = kLanes<float>;
  for (int64_t c = 0; c < kChannels; c += kBlockVectors * kWide) {
    Vec<float> acc[Rows][kBlockVectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kBlockVectors; ++v) acc[r][v] = Vec<float>{};
    for (int64_t k = 0; k < taps; ++k) {
      Vec<float> tap[kBlockVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kBlockVectors; ++v) tap[v] = vload<float>(weight + k * ld + c + v * kWide);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kBlockVectors; ++v)
          acc[r][v] = vfma(vload<float>(in + (r + k) * kChannels + c + v * kWide), tap[v], acc[r][v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kBlockVectors; ++v) vstore<float>(out + r * ld + c + v * kWide, acc[r][v]);
  }
}

}  // namespace

void conformer_convolution(const ConformerConvolutionParams& p) {
  constexpr int64_t kWide = kLanes<float>;
  const int64_t ld = round_up(p.channels, kChannels), halo = p.taps - 1;
  const int64_t rows = tile_rows(p.steps, p.batch, kMostRows, 8), tiles = ceil_div(p.steps, rows);
  parallel(p.batch * tiles, p.batch * p.steps * p.channels * (p.taps + 16), [&](int64_t task) {
    const int64_t b = task / tiles, t0 = task % tiles * rows;
    const int64_t count = p.steps - t0 < rows ? p.steps - t0 : rows;
    float* gate = scratch_rows<float>(kGate, 1, kChannels);
    float* in = scratch_rows<float>(kInput, rows + halo, kChannels);
    float* out = scratch_rows<float>(kOutput, rows, ld);
    for (int64_t c0 = 0; c0 < ld; c0 += kChannels) {
      const int64_t channels = p.channels - c0 < kChannels ? p.channels - c0 : kChannels;
      const TensorView value = view_from(p.x, c0), open = view_from(p.x, p.channels + c0);
      load_tile<float>(in, kChannels, count + halo, channels, value, b, t0 - halo, p.steps);
      for (int64_t r = 0; r < count + halo; ++r) {
        const int64_t t = t0 - halo + r;
        float* row = in + r * kChannels;
        if (t < 0 || (p.valid != nullptr && p.valid[b * p.steps + t] == 0)) {
          memset(row, 0, static_cast<size_t>(kChannels) * sizeof(float));
          continue;
        }
        load_tile<float>(gate, kChannels, 1, channels, open, b, t, p.steps);
        for (int64_t c = 0; c < channels; c += kWide)
          vstore<float>(row + c, vload<float>(row + c) * sigmoid(vload<float>(gate + c)));
      }
      int64_t r = 0;
      for (; r + kBlockRows <= count; r += kBlockRows)
        convolve<kBlockRows>(out + r * ld + c0, in + r * kChannels, p.weight + c0, ld, p.taps);
      for (; r < count; ++r) convolve<1>(out + r * ld + c0, in + r * kChannels, p.weight + c0, ld, p.taps);
    }
    for (int64_t r = 0; r < count; ++r) {
      float* row = out + r * ld;
      layer_norm_row<float>(row, p.channels, ld, p.ln_weight, p.ln_bias, p.eps);
      for (int64_t c = 0; c < ld; c += kWide) vstore<float>(row + c, swish(vload<float>(row + c)));
    }
    store_tile<float>(out, ld, count, p.channels, p.y, b, t0, p.steps);
  });
}

}  // namespace DCX_NS
}  // namespace dcx
