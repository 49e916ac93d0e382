// What vec.h, tile_io.h, snake.h and gemm.h promise, for one instruction set. Like the kernels it includes no
// standard-library template: see kernels/common/isa.h.
#include "check.h"
#include "common/activation.h"
#include "common/gemm.h"
#include "common/gemm_pack_bf16.h"
#include "common/snake.h"
#include "common/tile_io.h"
#if DCX_ISA >= 4
#include "common/amx.h"
#endif

namespace dcx {
namespace DCX_NS {
void check_common();
namespace {

uint32_t random_state = 1;
float uniform() {  // in [-1, 1)
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(random_state)) * 0x1p-31f;
}

template <class T>
void check_vectors() {
  T values[kLanes<T>], out[kLanes<T> + 1];
  double sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += values[i] = static_cast<T>(i + 1);
  const Vec<T> v = vload<T>(values);
  CHECK(vsum<T>(v) == static_cast<T>(sum));
  vstore<T>(out, vfma(v, v, vset1(T(1))));
  for (int i = 0; i < kLanes<T>; ++i) CHECK(out[i] == values[i] * values[i] + T(1));
  CHECK(!vany<T>(v < vset1(T(1))) && vany<T>(v < vset1(T(2))));
  for (int n = 0; n <= kLanes<T>; ++n) {
    const Vec<T> first = vload_first<T>(values, n);
    for (int i = 0; i <= kLanes<T>; ++i) out[i] = T(-7);
    vstore_first<T>(out, first, n);
    for (int i = 0; i < kLanes<T>; ++i) CHECK(first[i] == (i < n ? values[i] : T(0)));
    for (int i = 0; i <= kLanes<T>; ++i) CHECK(out[i] == (i < n ? values[i] : T(-7)));
  }
}

// Every size up to two squares and one more, and nothing else is written; a whole square's rows and a part's.
void check_transpose() {
#if DCX_ISA >= 1
  constexpr int64_t kMost = 2 * kSquare + 1;
  static float from[kMost * (kMost + 3)], to[kMost * (kMost + 5)];
  for (float& value : from) value = uniform();
  for (int64_t rows = 1; rows <= kMost; ++rows)
    for (int64_t columns = 1; columns <= kMost; ++columns) {
      for (float& value : to) value = 7;
      transpose(to, kMost + 5, from, kMost + 3, rows, columns);
      bool same = true;
      for (int64_t c = 0; c < kMost; ++c)
        for (int64_t r = 0; r < kMost + 5; ++r)
          same &= to[c * (kMost + 5) + r] == (r < rows && c < columns ? from[r * (kMost + 3) + c] : 7);
      CHECK(same);
    }
#endif
}

// Every half-precision number survives the way to float and back, and what lies between two goes to the nearer one.
void check_halves() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float f16 = f16_to_float(half), bf16 = bf16_to_float(half);
    CHECK(isnan(f16) ? isnan(f16_to_float(float_to_f16(f16))) : float_to_f16(f16) == half);
    CHECK(isnan(bf16) ? isnan(bf16_to_float(float_to_bf16(bf16))) : float_to_bf16(bf16) == half);
    if ((bits & 0x7fffu) < 0x7bffu) {
      const uint16_t next = static_cast<uint16_t>(bits + 1);
      const float middle = 0.5f * (f16 + f16_to_float(next));
      CHECK(float_to_f16(middle) == ((bits & 1u) ? next : half));
      CHECK(float_to_f16(nextafterf(middle, f16)) == half);
      CHECK(float_to_f16(nextafterf(middle, f16_to_float(next))) == next);
    }
  }
  const uint32_t full_nan = 0x7fffffffu;  // rounding up would carry into the sign
  float nan;
  memcpy(&nan, &full_nan, 4);
  CHECK(isnan(bf16_to_float(float_to_bf16(nan))) && isnan(f16_to_float(float_to_f16(nan))));
  CHECK(float_to_f16(65519.0f) == 0x7bffu && float_to_f16(65520.0f) == 0x7c00u);
  CHECK(float_to_bf16(1.00390625f) == 0x3f80u && float_to_bf16(1.01171875f) == 0x3f82u);  // ties to even
}

void check_snake() {
  constexpr int64_t ld = 32, rows = 500;
  static float tile[rows * ld], input[rows * ld];
  float alpha[ld], prepared[2 * ld];
  for (int64_t c = 0; c < ld; ++c) alpha[c] = c == 0 ? 0.0f : 0.1f * static_cast<float>(c);
  snake_prepare<float>(prepared, ld, alpha, 20);
  const float special[] = {0.0f, -0.0f, 1e-30f, 9999.5f, 1.5e4f, -3e7f, INFINITY, -INFINITY, NAN};
  for (int64_t i = 0; i < rows * ld; ++i) {
    const float scale = i % 3 == 0 ? 1.0f : i % 3 == 1 ? 30.0f : 3000.0f;
    input[i] = i % ld >= 20 ? 0.0f : i < ld * 9 ? special[i / ld] : scale * uniform();
    tile[i] = input[i];
  }
  snake_rows(tile, ld, rows, prepared, prepared + ld, ld);
  static float apart[rows * ld];
  snake_rows(apart, ld, input, ld, rows, prepared, prepared + ld, ld);
  for (int64_t i = 0; i < rows * ld; ++i) CHECK(apart[i] == tile[i] || (isnan(apart[i]) && isnan(tile[i])));
  for (int64_t i = 0; i < rows * ld; ++i) {
    const int64_t c = i % ld;
    const double x = input[i], a = c < 20 ? alpha[c] : 0.0f;
    // The product alpha * x rounds in float, and the sine amplifies that: it is part of the definition's own error.
    const double s = sin(static_cast<double>(static_cast<float>(a) * input[i]));
    const double expected = c < 20 ? x + s * s / (a + 1e-9) : 0.0;
    if (isnan(expected) || isinf(expected)) {
      CHECK(isnan(tile[i]) || tile[i] == input[i]);
    } else {
      const double inverse = c < 20 && a > 0 ? 1 / a : 1;
      CHECK_NEAR(tile[i], expected, 4e-7 * (inverse + fabs(x)));
    }
  }
}

// Every float from one 2^-10 to the next within [-15, 15], the ends, and what lies beyond.
void check_activations() {
  constexpr int64_t count = 30 * 1024;
  static float input[count], smooth[count], bounded[count];
  const float special[] = {0.0f, -0.0f, 1e-30f, -1e-30f, 50.0f, -50.0f, 1e30f, -1e30f, INFINITY, NAN, 9.01f, -9.1f};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t specials = static_cast<int64_t>(sizeof(special) / sizeof(special[0]));
    input[i] = i < specials ? special[i] : (static_cast<float>(i) + uniform()) * 0x1p-10f - 15.0f;
    smooth[i] = bounded[i] = input[i];
  }
  gelu_row(smooth, count);
  tanh_row(bounded, count);
  for (int64_t i = 0; i < count; ++i) {
    const double x = input[i];
    if (isnan(x)) {
      CHECK(isnan(smooth[i]) && isnan(bounded[i]));
      continue;
    }
    const double phi = 0.5 * erfc(-x * 0.70710678118654752440);
    if (isinf(x))
      CHECK(smooth[i] == input[i]);
    else
      CHECK_NEAR(smooth[i], x * phi, 1e-7 * (fabs(x * phi) + 1));
    CHECK_NEAR(bounded[i], tanh(x), 4e-7 * fabs(tanh(x)));
    CHECK(fabs(bounded[i]) <= 1);
  }
}

template <class T>
void check_tile(DType dtype, double exactness) {
  constexpr int64_t channels = 19, steps = 23, ld = 32, rows = 12;
  static T data[2 * channels * steps], copy[2 * channels * steps];
  static float tile[rows * ld];
  const int64_t strides[2][2] = {{steps, 1}, {1, channels}};  // channels first, channels last
  for (const auto& stride : strides) {
    TensorView x{data, dtype, channels * steps, stride[0], stride[1]}, y = x;
    y.data = copy;
    static float plain[2 * channels * steps];
    for (float& value : plain) value = uniform();
    for (int64_t i = 0; i < 2 * channels * steps; ++i) {
      float f = plain[i];
      if (dtype == DType::kBF16) {
        const uint16_t bits = float_to_bf16(f);
        memcpy(&data[i], &bits, 2);
      } else if (dtype == DType::kF16) {
        const uint16_t bits = float_to_f16(f);
        memcpy(&data[i], &bits, 2);
      } else {
        data[i] = static_cast<T>(f);
      }
    }
    const int64_t begins[] = {-20, -5, 0, 7, 15, 40}, valids[] = {0, 10, steps};
    for (const int64_t begin : begins)
      for (const int64_t valid : valids) {
        for (float& value : tile) value = NAN;
        load_tile<float>(tile, ld, rows, channels, x, 1, begin, valid);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < ld; ++c) {
            const int64_t t = begin + r;
            const bool inside = c < channels && t >= 0 && t < valid;
            const double expected = inside ? plain[channels * steps + c * stride[0] + t * stride[1]] : 0.0;
            CHECK_NEAR(tile[r * ld + c], expected, exactness);
          }
      }
    // A whole item back in tiles; steps at or past `valid` are zero.
    memset(copy, 0x55, sizeof(copy));
    for (int64_t begin = 0; begin < steps; begin += rows) {
      const int64_t count = steps - begin < rows ? steps - begin : rows;
      load_tile<float>(tile, ld, count, channels, x, 1, begin, steps);
      store_tile<float>(tile, ld, count, channels, y, 1, begin, 17);
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t at = channels * steps + c * stride[0] + t * stride[1];
        const T zero{};
        CHECK(memcmp(&copy[at], t < 17 ? &data[at] : &zero, sizeof(T)) == 0);
      }
  }
}

// However many of the first rows are asked for, they have the bits of `whole` and what lies behind them is not touched;
// `part` is as large. Register blocks differ with the number of rows, up to those of a few rows.
template <class A, class B>
void check_first_rows(int64_t rows, const GemmOperand<A>& operand, const B* packed, int64_t columns,
                      const Sum<A>* whole, Sum<A>* part) {
  const int64_t ld = round_up(columns, kColumnUnit);
  const auto check = [&](int64_t count, const auto& multiply) {
    for (int64_t i = 0; i < rows * ld; ++i) part[i] = 9;
    multiply();
    bool untouched = true;
    for (int64_t i = count * ld; i < rows * ld; ++i) untouched = untouched && part[i] == Sum<A>(9);
    CHECK(untouched && memcmp(part, whole, static_cast<size_t>(count * ld) * sizeof(Sum<A>)) == 0);
  };
  for (int64_t count = 1; count < rows; ++count) {
    check(count, [&] { conv_gemm<A>(count, operand, packed, columns, part, ld); });
    check(count, [&] {
      for (int64_t panel = 0; panel < panel_count(columns); ++panel)
        conv_gemm_panel<A>(count, operand, packed, columns, panel, part + panel_begin(columns, panel), ld, {});
    });
  }
}

// Against a plain sum in double; and a row's bits are the same whatever the number of rows around it.
template <class T>
void check_gemm(int64_t taps, int64_t channels, int64_t columns, double tolerance) {
  constexpr int64_t rows = 37, max_channels = 300, max_taps = 3, max_columns = 112, dilation = 2;
  static T a[(rows + dilation * max_taps) * max_channels], weight[max_taps * max_channels * max_columns];
  static T packed[max_taps * max_channels * max_columns], c[rows * max_columns], alone[max_columns];
  for (T& value : a) value = uniform();
  for (T& value : weight) value = uniform();
  const int64_t ld = round_up(columns, kColumnUnit);
  pack_panels(packed, weight, taps, channels, columns, channels * columns, columns, 1);
  const GemmOperand<T> operand{a, max_channels, dilation * max_channels, taps, channels};
  conv_gemm<T>(rows, operand, packed, columns, c, ld);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < ld; ++n) {
      double sum = 0;
      for (int64_t k = 0; n < columns && k < taps; ++k)
        for (int64_t i = 0; i < channels; ++i)
          sum += static_cast<double>(a[(m + k * dilation) * max_channels + i]) *
                 static_cast<double>(weight[(k * channels + i) * columns + n]);
      CHECK_NEAR(c[m * ld + n], sum, tolerance);
    }
    const GemmOperand<T> row{a + m * max_channels, max_channels, dilation * max_channels, taps, channels};
    conv_gemm<T>(1, row, packed, columns, alone, ld);
    CHECK(memcmp(alone, c + m * ld, static_cast<size_t>(ld) * sizeof(T)) == 0);
  }
  // Panel by panel for three clips at once, the same bits.
  static T clips[3][rows * max_columns];
  for (int64_t panel = 0; panel < panel_count(columns); ++panel)
    conv_gemm_panel<T>(rows - 4, operand, packed, columns, panel, clips[0] + panel_begin(columns, panel), ld,
                       GemmClips{3, 2 * max_channels, rows * max_columns});
  for (int64_t i = 0; i < 3; ++i)
    CHECK(memcmp(clips[i], c + 2 * i * ld, static_cast<size_t>((rows - 4) * ld) * sizeof(T)) == 0);
  check_first_rows(rows, operand, packed, columns, c, clips[0]);
}

// Products of bfloat16 pairs: the same checks, an odd number of channels included.
void check_gemm_bf16(int64_t taps, int64_t channels, int64_t columns) {
  typedef Bf16Kind::Tile Tile;
  constexpr int64_t rows = 37, ld_a = 816, max_taps = 3, max_columns = 112, dilation = 2;
  static float plain[(rows + dilation * max_taps) * ld_a], weight[max_taps * ld_a * max_columns];
  static Tile a[(rows + dilation * max_taps) * ld_a];
  static Bf16Pair packed[max_taps * ld_a * max_columns / 2];
  static float c[rows * max_columns], alone[max_columns], panelwise[rows * max_columns];
  const int64_t all_rows = rows + dilation * max_taps, pairs = weight_steps<Bf16Kind>(channels);
  for (int64_t i = 0; i < all_rows * ld_a; ++i)
    plain[i] = i % ld_a < channels ? bf16_to_float(float_to_bf16(uniform())) : 0.0f;
  for (int64_t i = 0; i < all_rows * ld_a; i += kLanes<float>) vstore_tile(a + i, vload<float>(plain + i));
  for (float& value : weight) value = bf16_to_float(float_to_bf16(uniform()));
  pack_pair_panels(packed, weight, taps, channels, columns, channels * columns, columns, 1);
  const int64_t ld = round_up(columns, kColumnUnit);
  const GemmOperand<Tile> operand{a, ld_a, dilation * ld_a, taps, channels};
  conv_gemm<Tile>(rows, operand, packed, columns, c, ld);
  CHECK(pairs == (channels + 1) / 2);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < ld; ++n) {
      double sum = 0;
      for (int64_t k = 0; n < columns && k < taps; ++k)
        for (int64_t i = 0; i < channels; ++i)
          sum += static_cast<double>(plain[(m + k * dilation) * ld_a + i]) *
                 static_cast<double>(weight[(k * channels + i) * columns + n]);
      CHECK_NEAR(c[m * ld + n], sum, 3e-5);
    }
    const GemmOperand<Tile> row{a + m * ld_a, ld_a, dilation * ld_a, taps, channels};
    conv_gemm<Tile>(1, row, packed, columns, alone, ld);
    CHECK(memcmp(alone, c + m * ld, static_cast<size_t>(ld) * sizeof(float)) == 0);
  }
  for (int64_t panel = 0; panel < panel_count(columns); ++panel)
    conv_gemm_panel<Tile>(rows, operand, packed, columns, panel, panelwise + panel_begin(columns, panel), ld, {});
  CHECK(memcmp(panelwise, c, static_cast<size_t>(rows * ld) * sizeof(float)) == 0);
  check_first_rows(rows, operand, packed, columns, c, panelwise);
}

// A tile's product, to the bit: the order of additions, fused, and denormals read and written as zeros.
void check_tile_product() {
#if DCX_ISA >= 4
  constexpr int64_t kRows = 5, kPairs = 11;
  const auto flushed = [](float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; };
  for (int turn = 0; turn < 200; ++turn) {
    uint16_t a[kRows][2 * kPairs], b[kPairs][2 * 16];
    float sum[kRows][16], expected[kRows][16];
    // From turn to turn smaller: sums that are whole, then ever more denormals.
    const float scale = turn < 100 ? 1.0f : ldexpf(1.0f, -20 - turn / 4);
    for (auto& row : a)
      for (uint16_t& value : row) value = float_to_bf16(scale * uniform());
    for (auto& row : b)
      for (uint16_t& value : row) value = float_to_bf16(scale * uniform());
    for (auto& row : sum)
      for (float& value : row) value = scale * scale * uniform();
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t n = 0; n < 16; ++n) {
        float parts[2] = {};
        for (int64_t k = 0; k < kPairs; ++k)
          for (int64_t half = 0; half < 2; ++half)
            parts[half] = flushed(fmaf(flushed(bf16_to_float(a[r][2 * k + half])),
                                       flushed(bf16_to_float(b[k][2 * n + half])), parts[half]));
        expected[r][n] = flushed(flushed(sum[r][n]) + flushed(parts[0] + parts[1]));
      }
    TileShapes shapes;
    shapes.set(0, kRows, kTileRowBytes);
    shapes.set(1, kRows, 4 * kPairs);
    shapes.set(2, kPairs, kTileRowBytes);
    load_tile_shapes(shapes);
    tile_load<0>(sum, sizeof(sum[0]));
    tile_load<1>(a, sizeof(a[0]));
    tile_load<2>(b, sizeof(b[0]));
    add_product<0, 1, 2>();
    tile_store<0>(sum, sizeof(sum[0]));
    release_tiles();
    CHECK(memcmp(sum, expected, sizeof(sum)) == 0);
  }
#endif
}

// In memory rounding is to nearest, ties to even, denormals kept; a tile may lose the denormals alone. Snake's short
// form stays within bfloat16's rounding.
void check_bf16_registers() {
  constexpr int lanes = kLanes<float>;
  for (uint32_t base = 0; base < 0x10000u; base += lanes) {
    uint16_t halves[lanes], back[lanes];
    float wide[lanes];
    for (int i = 0; i < lanes; ++i) halves[i] = static_cast<uint16_t>(base + static_cast<uint32_t>(i));
    vstore<float>(wide, vload_bf16(halves));
    vstore_bf16(back, vload<float>(wide));
    for (int i = 0; i < lanes; ++i) {
      const float value = bf16_to_float(halves[i]);
      CHECK(isnan(value) ? isnan(wide[i]) && isnan(bf16_to_float(back[i])) : wide[i] == value && back[i] == halves[i]);
      if (isnan(value) || isinf(value)) continue;
      uint32_t bits;
      memcpy(&bits, &value, 4);
      bits |= 0x8000u + (static_cast<uint32_t>(i) & 1u);  // a tie, or just past one
      memcpy(&wide[i], &bits, 4);
    }
    vstore_bf16(back, vload<float>(wide));
    for (int i = 0; i < lanes; ++i) CHECK(isnan(wide[i]) || back[i] == float_to_bf16(wide[i]));
  }
  static Bf16Kind::Tile tile[lanes * 2];
  float alpha[2 * kColumnUnit], prepared[4 * kColumnUnit], sums[2 * kColumnUnit], bias[2 * kColumnUnit];
  for (int round = 0; round < 2000; ++round) {
    for (int c = 0; c < 2 * kColumnUnit; ++c) {
      alpha[c] = 1.5f + uniform();
      bias[c] = uniform();
      sums[c] = 20.0f * uniform();
    }
    snake_prepare<float>(prepared, 2 * kColumnUnit, alpha, 2 * kColumnUnit);
    for (int c = 0; c < 2 * kColumnUnit; c += lanes) {
      bias_snake(tile, lanes, sums + c, lanes, 1, bias + c, prepared + c, prepared + 2 * kColumnUnit + c, lanes);
      float out[lanes];
      vstore<float>(out, vload_tile(tile));
      for (int i = 0; i < lanes; ++i) {
        const double x = static_cast<double>(sums[c + i] + bias[c + i]), s = sin(alpha[c + i] * x);
        const double expected = x + s * s / (static_cast<double>(alpha[c + i]) + 1e-9);
        CHECK_NEAR(out[i], expected, 0x1.1p-8 * fabs(expected) + 1e-5);
      }
    }
  }
}

}  // namespace

void check_common() {
  check_vectors<float>();
  check_vectors<double>();
  check_transpose();
  check_halves();
  check_snake();
  check_activations();
  check_bf16_registers();
  check_tile_product();
  check_tile<float>(DType::kF32, 0.0);
  check_tile<double>(DType::kF64, 0.0);
  check_tile<uint16_t>(DType::kBF16, 0x1p-9);
  check_tile<uint16_t>(DType::kF16, 0x1p-12);
  const int64_t shapes[][3] = {{1, 1, 1}, {3, 33, 20}, {1, 300, 48}, {3, 300, 112}, {2, 17, 100}};
  for (const auto& shape : shapes) {
    check_gemm<float>(shape[0], shape[1], shape[2], 2e-5);
    check_gemm<double>(shape[0], shape[1], shape[2], 1e-13);
    check_gemm_bf16(shape[0], shape[1], shape[2]);
  }
  check_gemm_bf16(2, 801, 48);
}

}  // namespace DCX_NS
}  // namespace dcx
