// Snake on rows of a tile: x + sin(alpha x)^2 / (alpha + 1e-9).
// float: sin^2 has period pi, so y = alpha x is reduced by whole multiples of pi and an odd polynomial of degree 9 is
// squared; no quadrant logic. README.md has the reduction's and the polynomial's errors. Beyond 1e4, and for NaN and
// infinity, libm's double-precision sine decides.
#pragma once
#include "bf16.h"
#include "tile_io.h"

#include <math.h>

namespace dcx {
namespace DCX_NS {

static inline float snake_scalar(float x, float alpha) {
  const double s = sin(static_cast<double>(alpha) * static_cast<double>(x));
  return static_cast<float>(static_cast<double>(x) + s * s / static_cast<double>(alpha + 1e-9f));
}

// One register where |alpha x| <= 1e4, or where x is not a number; alpha and inverse: 1 / (alpha + 1e-9).
static inline Vec<float> snake_near(Vec<float> x, Vec<float> y, Vec<float> inverse) {
  const Vec<float> inv_pi = vset1(0.318309886183790672f), magic = vset1(12582912.0f);
#if DCX_ISA >= 1 || defined(__aarch64__)
  const Vec<float> pi_a = vset1(-3.14159274101257324f), pi_b = vset1(8.74227800037248529e-8f);
#else
  const Vec<float> pi_a = vset1(-3.140625f), pi_b = vset1(-9.67502593994140625e-4f),
                   pi_c = vset1(-1.509957990978376e-7f);
#endif
  const Vec<float> k1 = vset1(-0.166666597127914429f), k2 = vset1(0.00833306927233934402f),
                   k3 = vset1(-0.000198097739485092461f), k4 = vset1(2.60608180724375416e-06f), one = vset1(1.0f);
  const Vec<float> n = vfma(y, inv_pi, magic) - magic;
#if DCX_ISA >= 1 || defined(__aarch64__)
  Vec<float> t = vfma(n, pi_b, vfma(n, pi_a, y));
#else
  Vec<float> t = vfma(n, pi_c, vfma(n, pi_b, vfma(n, pi_a, y)));
#endif
  const Vec<float> s = t * t;
  Vec<float> p = vfma(s, k4, k3);
  p = vfma(p, s, k2);
  p = vfma(p, s, k1);
  p = vfma(p, s, one);
  t = t * p;
  return vfma(t * t, inverse, x);
}

constexpr float kSnakeFar = 1e4f;

// One register; alpha and inverse point at its lanes' values.
static inline Vec<float> snake_vector(Vec<float> x, const float* alpha, const float* inverse) {
  const Vec<float> limit = vset1(kSnakeFar), y = vload<float>(alpha) * x;
  const IVec<float> outside = ~((y <= limit) & (y >= -limit));
  Vec<float> out = snake_near(x, y, vload<float>(inverse));
  if (__builtin_expect(vany<float>(outside), 0)) {
    float values[kLanes<float>], lanes[kLanes<float>];
    vstore<float>(values, x);
    vstore<float>(lanes, out);
    for (int i = 0; i < kLanes<float>; ++i)
      if (!(fabsf(alpha[i] * values[i]) <= kSnakeFar)) lanes[i] = snake_scalar(values[i], alpha[i]);
    out = vload<float>(lanes);
  }
  return out;
}

// snake_near for values that are rounded to bfloat16 on both sides: a polynomial of degree 7, largest error of the sine
// 8.9e-7.
static inline Vec<float> snake_near_short(Vec<float> x, Vec<float> y, Vec<float> inverse) {
  const Vec<float> inv_pi = vset1(0.318309886183790672f), magic = vset1(12582912.0f);
  const Vec<float> n = vfma(y, inv_pi, magic) - magic;
  const Vec<float> t = vfma(n, vset1(-9.67653589793e-4f), vfma(n, vset1(-3.140625f), y));
  const Vec<float> s = t * t;
  Vec<float> p = vfma(s, vset1(-0.000184908758442f), vset1(0.00831232516392f));
  p = vfma(p, s, vset1(-0.166656781618f));
  p = vfma(p, s, vset1(1.0f)) * t;
  return vfma(p * p, inverse, x);
}

// One register, as snake_vector.
static inline Vec<float> snake_vector_short(Vec<float> x, const float* alpha, const float* inverse) {
  const Vec<float> limit = vset1(kSnakeFar), y = vload<float>(alpha) * x;
  if (__builtin_expect(vany<float>(~((y <= limit) & (y >= -limit))), 0)) return snake_vector(x, alpha, inverse);
  return snake_near_short(x, y, vload<float>(inverse));
}

static inline Vec<double> snake_vector(Vec<double> x, const double* alpha, const double* inverse) {
  double lanes[kLanes<double>];
  vstore<double>(lanes, x);
  for (int i = 0; i < kLanes<double>; ++i) {
    const double s = sin(alpha[i] * lanes[i]);
    lanes[i] += s * s * inverse[i];
  }
  return vload<double>(lanes);
}

// Rows that stay in a first-level cache while Snake goes down their columns.
constexpr int64_t kSnakeFloats = 2048;
constexpr int64_t kSnakeRows = 64;

// out = snake(in + bias) on `columns` of each row, a multiple of 16; bias null: none, out may be in. alpha and inverse
// (1 / (alpha + 1e-9)): [columns], zero where there is no channel.
//
// Down the columns, so that a register's constants stay in registers, the range of alpha x is looked at once per
// kSnakeRows, and a call of libm is not in the loop.
template <bool kBias, class Out, class In>
static void snake_columns(Out* out, int64_t out_ld, const In* in, int64_t in_ld, int64_t rows, const float* bias,
                          const float* alpha, const float* inverse, int64_t columns) {
  float kept[kSnakeRows * kLanes<float>];
  const bool in_place = static_cast<const void*>(out) == in;
  int64_t step = columns * kSnakeRows <= kSnakeFloats ? kSnakeRows : kSnakeFloats / columns;
  if (step < 8) step = 8;
  for (int64_t r0 = 0; r0 < rows; r0 += step) {
    const int64_t count = rows - r0 < step ? rows - r0 : step;
    for (int64_t c = 0; c < columns; c += kLanes<float>) {
      const In* from = in + r0 * in_ld + c;
      Out* to = out + r0 * out_ld + c;
      const Vec<float> a = vload<float>(alpha + c), i = vload<float>(inverse + c);
      const Vec<float> offset = kBias ? vload<float>(bias + c) : Vec<float>{};
      Vec<float> largest{};
      for (int64_t r = 0; r < count; ++r) {
        Vec<float> x = vload_tile(from + r * in_ld);
        if (in_place) vstore<float>(kept + r * kLanes<float>, x);
        if constexpr (kBias) x = x + offset;
        const Vec<float> y = a * x;
        largest = vlargest(y, largest);
        vstore_tile(to + r * out_ld, sizeof(Out) == 2 ? snake_near_short(x, y, i) : snake_near(x, y, i));
      }
      if (__builtin_expect(vany<float>(largest > vset1(kSnakeFar)), 0))
        for (int64_t r = 0; r < count; ++r) {
          Vec<float> x = in_place ? vload<float>(kept + r * kLanes<float>) : vload_tile(from + r * in_ld);
          if constexpr (kBias) x = x + offset;
          if constexpr (sizeof(Out) == 2)
            vstore_tile(to + r * out_ld, snake_vector_short(x, alpha + c, inverse + c));
          else
            vstore_tile(to + r * out_ld, snake_vector(x, alpha + c, inverse + c));
        }
    }
  }
}

// Snake on `columns` of each row, a multiple of 16; out may be in. alpha and inverse: [columns], zero where there is no
// channel; inverse is 1 / (alpha + 1e-9).
static inline void snake_rows(float* out, int64_t out_ld, const float* in, int64_t in_ld, int64_t rows,
                              const float* alpha, const float* inverse, int64_t columns) {
  snake_columns<false>(out, out_ld, in, in_ld, rows, nullptr, alpha, inverse, columns);
}
static inline void snake_rows(double* out, int64_t out_ld, const double* in, int64_t in_ld, int64_t rows,
                              const double* alpha, const double* inverse, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += kLanes<double>)
      vstore<double>(out + r * out_ld + c, snake_vector(vload<double>(in + r * in_ld + c), alpha + c, inverse + c));
}
static inline void snake_rows(Bf16* out, int64_t out_ld, const Bf16* in, int64_t in_ld, int64_t rows,
                              const float* alpha, const float* inverse, int64_t columns) {
  snake_columns<false>(out, out_ld, in, in_ld, rows, nullptr, alpha, inverse, columns);
}
template <class Tile, class T>
static void snake_rows(Tile* tile, int64_t ld, int64_t rows, const T* alpha, const T* inverse, int64_t columns) {
  snake_rows(tile, ld, tile, ld, rows, alpha, inverse, columns);
}

// load_tile and Snake; alpha and inverse as above, for round_up(channels, 16) columns.
template <class Tile, class T>
static void load_snaked(Tile* tile, int64_t ld, int64_t rows, int64_t channels, const TensorView& x, int64_t b,
                        int64_t begin, int64_t valid, const T* alpha, const T* inverse) {
  const RowRange inside = rows_inside(begin, rows, valid);
  if (!is_direct<Tile>(x, channels)) {
    load_tile<Tile>(tile, ld, rows, channels, x, b, begin, valid);
    snake_rows(tile + inside.first * ld, ld, inside.last - inside.first, alpha, inverse,
               round_up(channels, kColumnUnit));
    return;
  }
  memset(tile, 0, static_cast<size_t>(inside.first * ld) * sizeof(Tile));
  memset(tile + inside.last * ld, 0, static_cast<size_t>((rows - inside.last) * ld) * sizeof(Tile));
  if (inside.last > inside.first)
    snake_rows(tile + inside.first * ld, ld, row_of<const Tile>(x, b, begin + inside.first), x.stride_t,
               inside.last - inside.first, alpha, inverse, channels);
}

// Fills alpha and inverse, each [ld], from alpha [channels]; both live in `out`, [2 * ld].
template <class T>
static void snake_prepare(T* out, int64_t ld, const T* alpha, int64_t channels) {
  for (int64_t c = 0; c < ld; ++c) {
    out[c] = c < channels ? alpha[c] : T(0);
    out[ld + c] = c < channels ? T(1) / (alpha[c] + T(1e-9)) : T(0);
  }
}

template <class T>
static void add_bias(T* tile, int64_t ld, int64_t rows, const T* bias, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += kLanes<T>)
      vstore<T>(tile + r * ld + c, vload<T>(tile + r * ld + c) + vload<T>(bias + c));
}

// out = snake(sums + bias), rounded once to out's type; out may be sums.
template <class Tile, class T>
static void bias_snake(Tile* out, int64_t out_ld, const T* sums, int64_t ld, int64_t rows, const T* bias,
                       const T* alpha, const T* inverse, int64_t columns) {
  if constexpr (sizeof(T) == 4) {
    snake_columns<true>(out, out_ld, sums, ld, rows, bias, alpha, inverse, columns);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += kLanes<T>)
        vstore<T>(out + r * out_ld + c,
                  snake_vector(vload<T>(sums + r * ld + c) + vload<T>(bias + c), alpha + c, inverse + c));
  }
}

}  // namespace DCX_NS
}  // namespace dcx
