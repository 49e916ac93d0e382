// The Winograd (Toom-Cook) forms of residual_unit's k=7 convolution: points, and what packer and kernel derive from
// them. They compute m outputs from n = m + kTaps - 1 inputs, by a product for every real point and three for every
// pair of conjugate points; derivation and choice: README.md. A form's number, which is the op's argument, is that of
// its [C, C] products for m outputs, where the direct form takes 7 m.
#pragma once
#include "../common/gemm_pack.h"
#include "params.h"

namespace dcx {

// The points are 0 (where kZero), +p and -p of each pair, the roots of z^2 + a z + 1 and of z^2 - a z + 1 for each a of
// kTurns, and infinity, in this order.
struct Winograd10 {
  static constexpr int kOutputs = 4, kPairs = 4, kQuads = 0, kPieces = 1, kTaps = 7;
  static constexpr bool kZero = true;
  static constexpr double kPoints[kPairs] = {7.0 / 16, 13.0 / 16, 5.0 / 4, 19.0 / 8};
  static constexpr double kTurns[1] = {}, kSplit = 1.0;
};

// Taps 0..3 and 4..6 apart: the second piece reads what the first one reads a group later, so they share a transform.
struct Winograd13 {
  static constexpr int kOutputs = 4, kPairs = 3, kQuads = 0, kPieces = 2, kTaps = 4;
  static constexpr bool kZero = false;
  static constexpr double kPoints[kPairs] = {1.0 / 4, 7.0 / 8, 15.0 / 8};
  static constexpr double kTurns[1] = {}, kSplit = 1.0;
};

// Half of the finite points lie on the unit circle, where powers do not grow.
struct Winograd22 {
  static constexpr int kOutputs = 12, kPairs = 4, kQuads = 2, kPieces = 1, kTaps = 7;
  static constexpr bool kZero = true;
  static constexpr double kPoints[kPairs] = {17.0 / 32, 7.0 / 8, 9.0 / 8, 15.0 / 8};
  static constexpr double kTurns[kQuads] = {21.0 / 16, 15.0 / 32};
  static constexpr double kSplit = 11.0 / 16;  // products of r + s z are taken at z = +-kSplit and infinity
};

template <class F>
struct WinogradShape {
  static constexpr int kInputs = F::kOutputs + F::kTaps - 1;
  static constexpr int kReal = 2 * F::kPairs + (F::kZero ? 1 : 0);  // finite real points
  static_assert(kInputs == kReal + 4 * F::kQuads + 1);
  static constexpr int kOperands = kReal + 6 * F::kQuads + 1;
  // How many pieces have a product with an operand: infinity sees a leading coefficient, and the shorter piece has
  // none.
  static constexpr int pieces(int i) { return i == kOperands - 1 ? 1 : F::kPieces; }
  static constexpr int kProducts = (kOperands - 1) * F::kPieces + 1;

  static constexpr double point(int i) {
    const int k = i - (F::kZero ? 1 : 0);
    return k < 0 ? 0.0 : k % 2 == 0 ? F::kPoints[k / 2] : -F::kPoints[k / 2];
  }
  // a of the quadratic that operand i belongs to.
  static constexpr double turn(int i) {
    const int quadratic = (i - kReal) / 3;
    return quadratic % 2 == 0 ? F::kTurns[quadratic / 2] : -F::kTurns[quadratic / 2];
  }
  // What tap `tap` of a piece counts for in operand i's product.
  static constexpr double weight(int i, int tap) {
    if (i == kOperands - 1) return tap == F::kTaps - 1 ? 1.0 : 0.0;
    return i < kReal ? real_weight(point(i), i, tap) : complex_weight(turn(i), i, tap);
  }

 private:
  static constexpr double real_weight(double p, int i, int tap) {
    double value = 1.0;
    for (int k = 0; k < tap; ++k) value *= p;
    for (int other = 0; other < kReal; ++other)
      if (other != i) value /= p - point(other);
    for (int k = 0; k < F::kQuads; ++k) value /= (p * p + 1.0) * (p * p + 1.0) - F::kTurns[k] * F::kTurns[k] * p * p;
    return value;
  }
  // r + s z modulo z^2 + a z + 1.
  struct Residue {
    double r, s;
    constexpr Residue times(Residue o, double a) const { return {r * o.r - s * o.s, r * o.s + s * o.r - a * s * o.s}; }
  };
  static constexpr double complex_weight(double a, int i, int tap) {
    Residue rest{1.0, 0.0};  // what the other factors are
    for (int k = 0; k < kReal; ++k) rest = rest.times({-point(k), 1.0}, a);
    for (int k = kReal; k < kOperands - 1; k += 3)
      if (k != kReal + (i - kReal) / 3 * 3) rest = rest.times({0.0, turn(k) - a}, a);  // z^2 + b z + 1 = (b - a) z
    const double norm = rest.r * rest.r - a * rest.r * rest.s + rest.s * rest.s;
    Residue value{(rest.r - a * rest.s) / norm, -rest.s / norm};
    for (int k = 0; k < tap; ++k) value = value.times({0.0, 1.0}, a);
    const int place = (i - kReal) % 3;
    if (place == 2) return -a * value.s;
    return (value.r + (place == 0 ? F::kSplit : -F::kSplit) * value.s) / (2.0 * F::kSplit);
  }
};

// Calls f with a form; false: there is none of that number.
template <class Call>
inline bool with_winograd_form(int64_t winograd, const Call& f) {
  if (winograd == WinogradShape<Winograd10>::kProducts)
    f(Winograd10{});
  else if (winograd == WinogradShape<Winograd13>::kProducts)
    f(Winograd13{});
  else if (winograd == WinogradShape<Winograd22>::kProducts)
    f(Winograd22{});
  else
    return false;
  return true;
}

// Transforms weight [C, C, 7] (contiguous) in double and writes, panel by panel of gemm_pack.h, [products][C][panel
// width]. out: [products * C * round_up(C, 16)].
template <class F, class T>
inline void pack_winograd(T* out, const T* weight, int64_t channels) {
  for (int64_t panel = 0; panel < panel_count(channels); ++panel)
    for (int i = 0; i < WinogradShape<F>::kOperands; ++i)
      for (int piece = 0; piece < WinogradShape<F>::pieces(i); ++piece) {
        const int first = piece * F::kOutputs, taps = minimum(F::kTaps, 7 - first);
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
