// The Winograd (Toom-Cook) forms of residual_unit's k=7 convolution: points, and what packer and kernel derive from
// them. Both compute 4 outputs from products at n = 4 + kTaps - 1 points; derivation and choice: README.md. A form's
// number, which is the op's argument, is that of its [C, C] products, where the direct form takes 28.
#pragma once
#include "../common/gemm_pack.h"
#include "params.h"

namespace dcx {

constexpr int kWinogradOutputs = 4;

// The points are 0 (where kZero), +p and -p of each pair, and infinity, in this order.
struct Winograd10 {
  static constexpr int kPairs = 4, kPieces = 1, kTaps = 7;
  static constexpr bool kZero = true;
  static constexpr double kPoints[kPairs] = {7.0 / 16, 13.0 / 16, 5.0 / 4, 19.0 / 8};
};

// Taps 0..3 and 4..6 apart: the second piece reads what the first one reads a group later, so they share a transform.
struct Winograd13 {
  static constexpr int kPairs = 3, kPieces = 2, kTaps = 4;
  static constexpr bool kZero = false;
  static constexpr double kPoints[kPairs] = {1.0 / 4, 7.0 / 8, 15.0 / 8};
};

template <class F>
struct WinogradShape {
  static constexpr int kInputs = kWinogradOutputs + F::kTaps - 1;  // as many as points
  static_assert(kInputs == 2 * F::kPairs + (F::kZero ? 1 : 0) + 1);
  // How many pieces have a product at a point: infinity sees a leading coefficient, and the shorter piece has none.
  static constexpr int pieces(int i) { return i == kInputs - 1 ? 1 : F::kPieces; }
  static constexpr int kProducts = (kInputs - 1) * F::kPieces + 1;

  static constexpr double point(int i) {
    const int k = i - (F::kZero ? 1 : 0);
    return k < 0 ? 0.0 : k % 2 == 0 ? F::kPoints[k / 2] : -F::kPoints[k / 2];
  }
  // What tap `tap` of a piece counts for at a point.
  static constexpr double weight(int i, int tap) {
    if (i == kInputs - 1) return tap == F::kTaps - 1 ? 1.0 : 0.0;
    double value = 1.0;
    for (int k = 0; k < tap; ++k) value *= point(i);
    for (int other = 0; other < kInputs - 1; ++other)
      if (other != i) value /= point(i) - point(other);
    return value;
  }
};

// Calls f with a form; false: there is none of that number.
template <class Call>
inline bool with_winograd_form(int64_t winograd, const Call& f) {
  if (winograd == WinogradShape<Winograd10>::kProducts)
    f(Winograd10{});
  else if (winograd == WinogradShape<Winograd13>::kProducts)
    f(Winograd13{});
  else
    return false;
  return true;
}

// Transforms weight [C, C, 7] (contiguous) in double and writes, panel by panel of gemm_pack.h, [products][C][panel
// width]. out: [products * C * round_up(C, 16)].
template <class F, class T>
inline void pack_winograd(T* out, const T* weight, int64_t channels) {
  for (int64_t panel = 0; panel < panel_count(channels); ++panel)
    for (int i = 0; i < WinogradShape<F>::kInputs; ++i)
      for (int piece = 0; piece < WinogradShape<F>::pieces(i); ++piece) {
        const int first = piece * kWinogradOutputs, taps = minimum(F::kTaps, 7 - first);
        double factors[F::kTaps];
        for (int k = 0; k < taps; ++k) factors[k] = WinogradShape<F>::weight(i, k);
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t n = panel_begin(channels, panel); n < panel_begin(channels, panel + 1); ++n) {
            double sum = 0.0;
            for (int k = 0; k < taps && n < channels; ++k)
              sum += factors[k] * static_cast<double>(weight[(n * channels + c) * 7 + first + k]);
            *out++ = static_cast<T>(sum);
          }
      }
}

}  // namespace dcx
