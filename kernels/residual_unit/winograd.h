// The Toom-Cook forms of residual_unit's k=7 convolution: points, and what packer and kernel derive from them.
// The seven taps are one piece, or two whose second starts `outputs` taps later, so that it reads what the first reads
// one group further on. A group is m outputs and n = m + taps - 1 inputs; derivation and choice of points: README.md.
#pragma once
#include "../common/gemm_pack.h"
#include "params.h"

namespace dcx {

// Points 0 (where kZero), +p and -p of each pair, and infinity, in this order. The longest piece has kTaps taps.
struct WinogradF2 {
  static constexpr int kOutputs = 2, kPairs = 3, kPieces = 1, kTaps = 7;
  static constexpr bool kZero = true;
  static constexpr double kPoints[kPairs] = {1.0 / 2, 1.0, 2.0};
};
struct WinogradN3 {
  static constexpr int kOutputs = 3, kPairs = 2, kPieces = 2, kTaps = 4;
  static constexpr bool kZero = true;
  static constexpr double kPoints[kPairs] = {5.0 / 8, 3.0 / 2};
};
struct WinogradN4 {
  static constexpr int kOutputs = 4, kPairs = 3, kPieces = 2, kTaps = 4;
  static constexpr bool kZero = false;
  static constexpr double kPoints[kPairs] = {1.0 / 4, 7.0 / 8, 15.0 / 8};
};
struct WinogradF3 {
  static constexpr int kOutputs = 3, kPairs = 4, kPieces = 1, kTaps = 7;
  static constexpr bool kZero = false;
  static constexpr double kPoints[kPairs] = {1.0 / 4, 11.0 / 16, 9.0 / 8, 35.0 / 16};
};
struct WinogradF4 {
  static constexpr int kOutputs = 4, kPairs = 4, kPieces = 1, kTaps = 7;
  static constexpr bool kZero = true;
  static constexpr double kPoints[kPairs] = {7.0 / 16, 13.0 / 16, 5.0 / 4, 19.0 / 8};
};

template <class F>
struct WinogradShape {
  static constexpr int kInputs = F::kOutputs + F::kTaps - 1;
  static_assert(kInputs == 2 * F::kPairs + (F::kZero ? 1 : 0) + 1);
  static constexpr int piece_begin(int piece) { return piece * F::kOutputs; }
  static constexpr int piece_taps(int piece) {
    return F::kPieces == 1 ? 7 : piece == 0 ? F::kOutputs : 7 - F::kOutputs;
  }
  // The shorter piece has no leading coefficient, which is all that infinity sees.
  static constexpr int first_piece(int point) {
    return point == kInputs - 1 && F::kPieces == 2 && piece_taps(0) < F::kTaps ? 1 : 0;
  }
  static constexpr int pieces(int point) {
    return point == kInputs - 1 && F::kPieces == 2 && piece_taps(0) != piece_taps(1) ? 1 : F::kPieces;
  }
  static constexpr int products() {
    int count = 0;
    for (int i = 0; i < kInputs; ++i) count += pieces(i);
    return count;
  }
  // A finite point's value.
  static constexpr double point(int i) {
    if (F::kZero && i == 0) return 0.0;
    const int k = i - (F::kZero ? 1 : 0);
    return k % 2 == 0 ? F::kPoints[k / 2] : -F::kPoints[k / 2];
  }
  // The weight that tap `tap` of a piece has in the piece's product at a point.
  static constexpr double weight(int i, int tap) {
    if (i == kInputs - 1) return tap == F::kTaps - 1 ? 1.0 : 0.0;
    double value = 1.0;
    for (int k = 0; k < tap; ++k) value *= point(i);
    for (int o = 0; o < kInputs - 1; ++o)
      if (o != i) value /= point(i) - point(o);
    return value;
  }
};

// Calls f with the form for m outputs; false: there is none.
template <class Call>
inline bool with_winograd_form(int64_t outputs, const Call& f) {
  switch (outputs) {
    case 2:
      f(WinogradF2{});
      return true;
    case 3:
      f(WinogradF3{});
      return true;
    case 4:
      f(WinogradF4{});
      return true;
    case 33:
      f(WinogradN3{});
      return true;
    case 34:
      f(WinogradN4{});
      return true;
    default:
      return false;
  }
}

// [C, C] products of a form; 0: there is no such form.
inline int64_t winograd_products(int64_t outputs) {
  int64_t products = 0;
  with_winograd_form(outputs, [&](auto form) { products = WinogradShape<decltype(form)>::products(); });
  return products;
}

// Transforms weight [C, C, 7] (contiguous) in double and writes, panel by panel of gemm_pack.h, [products][C][panel
// width]. out: [products * C * round_up(C, 16)].
template <class F, class T>
inline void pack_winograd(T* out, const T* weight, int64_t channels) {
  using Shape = WinogradShape<F>;
  for (int64_t panel = 0; panel < panel_count(channels); ++panel) {
    const int64_t begin = panel_begin(channels, panel), end = panel_begin(channels, panel + 1);
    for (int i = 0; i < Shape::kInputs; ++i)
      for (int piece = Shape::first_piece(i); piece < Shape::first_piece(i) + Shape::pieces(i); ++piece) {
        double factors[7];
        const int taps = Shape::piece_taps(piece);
        for (int k = 0; k < taps; ++k) factors[k] = Shape::weight(i, k);
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t n = begin; n < end; ++n) {
            double sum = 0.0;
            if (n < channels)
              for (int k = 0; k < taps; ++k)
                sum += factors[k] *
                       static_cast<double>(weight[(n * channels + c) * 7 + Shape::piece_begin(piece) + k]);
            *out++ = static_cast<T>(sum);
          }
      }
  }
}

}  // namespace dcx
