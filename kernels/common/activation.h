// GELU (erf form) and tanh on registers of floats; doubles go through libm. README.md has the forms and their errors.
#pragma once
#include "vec.h"

#include <math.h>

namespace dcx {
namespace DCX_NS {

// Coefficients from the constant term up.
template <int N>
static inline Vec<float> polynomial(Vec<float> x, const float (&c)[N]) {
  Vec<float> p = vset1(c[N - 1]);
#pragma GCC unroll 8
  for (int i = N - 2; i >= 0; --i) p = vfma(p, x, vset1(c[i]));
  return p;
}

// exp(x) for -87 <= x <= 0, to 2e-7 of it.
static inline Vec<float> exp_below_zero(Vec<float> x) {
  constexpr float kPower[] = {1.0f,          0.693147004f,   0.240222424f,
                              0.0555073358f, 0.00967151299f, 0.00132647203f};  // 2^f, |f| <= 1/2
  const Vec<float> magic = vset1(12582912.0f);
  const Vec<float> y = x * vset1(1.44269504f);
  const Vec<float> n = (y + magic) - magic;
  const IVec<float> exponent = (__builtin_convertvector(n, IVec<float>) + 127) << 23;
  Vec<float> power;
  memcpy(&power, &exponent, sizeof(power));
  return polynomial(y - n, kPower) * power;
}

// x Phi(x) = max(x, 0) - a h(a) with a = |x| and h(a) = erfc(a / sqrt(2)) / 2 = exp(-a^2 / 2) R(a).
static inline Vec<float> gelu(Vec<float> x) {
  constexpr float kOver[] = {0.5f, 0.434979141f, 0.180786192f, 0.0398095213f, 0.00399446208f};
  constexpr float kUnder[] = {1.0f, 1.66784322f, 1.19231474f, 0.463006526f, 0.0997953191f, 0.0100124814f};
  const Vec<float> zero{}, a = x < zero ? -x : x, far = vset1(13.0f);
  const Vec<float> near = a < far ? a : far;  // beyond, a h(a) is below 1e-37
  const Vec<float> ratio = polynomial(near, kOver) / polynomial(near, kUnder);
  const Vec<float> tail = a < far ? near * exp_below_zero(near * near * vset1(-0.5f)) * ratio : zero;
  return (x < zero ? zero : x) - tail;  // a NaN is not below zero, and stays
}

// 1 / (1 + exp(-x)), and x times that.
static inline Vec<float> sigmoid(Vec<float> x) {
  const Vec<float> zero{}, one = vset1(1.0f), far = vset1(87.0f);
  Vec<float> a = x < zero ? -x : x;
  a = a > far ? far : a;  // a NaN stays
  const Vec<float> e = exp_below_zero(-a);
  return (x < zero ? e : one) / (one + e);
}
static inline Vec<float> swish(Vec<float> x) { return x * sigmoid(x); }

static inline Vec<float> tanh_of(Vec<float> x) {
  constexpr float kOver[] = {1.0f, 0.133796662f, 0.00349397119f, 2.0582409e-05f, 1.33175666e-08f};
  constexpr float kUnder[] = {1.0f, 0.467129797f, 0.0258708354f, 0.000328298775f, 7.7614061e-07f};
  const Vec<float> far = vset1(9.02f), one = vset1(1.0f);
  Vec<float> t = x > far ? far : x;
  t = t < -far ? -far : t;
  const Vec<float> s = t * t;
  const Vec<float> y = t * polynomial(s, kOver) / polynomial(s, kUnder);
  return y > one ? one : y < -one ? -one : y;
}

static inline void gelu_row(float* row, int64_t count) {
  for (int64_t c = 0; c < count; c += kLanes<float>) vstore<float>(row + c, gelu(vload<float>(row + c)));
}
static inline void gelu_row(double* row, int64_t count) {
  for (int64_t c = 0; c < count; ++c) row[c] = 0.5 * row[c] * (1.0 + erf(row[c] * 0.70710678118654752440));
}
static inline void tanh_row(float* row, int64_t count) {
  for (int64_t c = 0; c < count; c += kLanes<float>) vstore<float>(row + c, tanh_of(vload<float>(row + c)));
}
static inline void tanh_row(double* row, int64_t count) {
  for (int64_t c = 0; c < count; ++c) row[c] = tanh(row[c]);
}

}  // namespace DCX_NS
}  // namespace dcx
