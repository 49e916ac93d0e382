// LayerNorm of one row that lies in L1, in two passes.
#pragma once
#include "vec.h"

#include <math.h>

namespace dcx {
namespace DCX_NS {

static inline float root(float x) { return sqrtf(x); }
static inline double root(double x) { return sqrt(x); }

// Columns from `channels` up to ld, a multiple of 16, hold zeros, in the row and in the vectors: they add nothing to
// the mean, and are left out of the variance.
template <class T>
static inline void layer_norm_row(T* row, int64_t channels, int64_t ld, const T* weight, const T* bias, T eps) {
  Vec<T> sum{};
  for (int64_t c = 0; c < ld; c += kLanes<T>) sum = sum + vload<T>(row + c);
  const T mean = vsum<T>(sum) / static_cast<T>(channels);
  Vec<T> squares{};
  int64_t c = 0;
  for (; c + kLanes<T> <= channels; c += kLanes<T>) {
    const Vec<T> d = vload<T>(row + c) - vset1(mean);
    squares = vfma(d, d, squares);
  }
  if (c < channels) {
    T rest[kLanes<T>] = {};
    for (int64_t i = c; i < channels; ++i) rest[i - c] = row[i] - mean;
    const Vec<T> d = vload<T>(rest);
    squares = vfma(d, d, squares);
  }
  const T scale = T(1) / root(vsum<T>(squares) / static_cast<T>(channels) + eps);
  for (c = 0; c < ld; c += kLanes<T>)
    vstore<T>(row + c,
              vfma((vload<T>(row + c) - vset1(mean)) * vset1(scale), vload<T>(weight + c), vload<T>(bias + c)));
}

}  // namespace DCX_NS
}  // namespace dcx
