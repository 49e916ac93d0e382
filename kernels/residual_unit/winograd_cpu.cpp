// residual_unit with the dilated k=7 convolution as Toom-Cook products: m outputs, d steps apart, from n inputs, d
// steps apart. A task is one (clip, stretch of whole groups): it loads and snakes rows + 6 d input rows once, and goes
// through them in chunks that stay in L2 to the end: input transform, one GEMM per point, output transform with bias
// and Snake, the 1x1, and the addition on the way to y. Between the transforms rows are in the order of (group, phase).
#include "winograd.h"

#include "../common/snake.h"
#include "short_cpu.h"

namespace dcx {
namespace DCX_NS {
namespace {

// The snaked input of a task, in bytes, and what a chunk needs beside it: with the weights of narrow layers they fit a
// 1 MB L2. Wide layers stream their weights once per chunk, which a few register blocks of rows must be worth: more of
// them where the weights come from beyond L2.
constexpr int64_t kTileBytes = 320 * 1024;
constexpr int64_t kChunkBytes = 128 * 1024;
constexpr int64_t kSnakeBytes = 16 * 1024;
constexpr int64_t kWeightBytes = 1024 * 1024;
template <class T, class F>
inline bool beyond_l2(int64_t channels) {
  return WinogradShape<F>::kProducts * channels * round_up(channels, kColumnUnit) * static_cast<int64_t>(sizeof(T)) >
         within_l2(kWeightBytes);
}
template <class T, class F>
inline int64_t least_chunk_rows(int64_t channels) {
  return (F::kOutputs > 4 && !beyond_l2<T, F>(channels) ? 2 : 4) * kRowUnit<float>;
}

// Polynomials in w = z^2, whose leading coefficients are 1.
template <class F>
struct Tables {
  double all[F::kPairs + 1];                 // prod (w - p_k^2) over all pairs
  double others[F::kPairs][F::kPairs];       // over all but one
  double circle[2 * F::kQuads + 1];          // prod (w^2 + (2 - a_k^2) w + 1), of which each factor has 2 quadratics
  double beside[F::kQuads + 1];              // the middle coefficient of the factors
  double plain[F::kQuads + 1][F::kOutputs];  // z^j = plain + turned z modulo z^2 + a_k z + 1
  double turned[F::kQuads + 1][F::kOutputs];

  constexpr Tables() : all{}, others{}, circle{}, beside{}, plain{}, turned{} {
    all[0] = 1.0;
    for (int k = 0; k < F::kPairs; ++k) times_pair(all, k, k);
    for (int left_out = 0; left_out < F::kPairs; ++left_out) {
      others[left_out][0] = 1.0;
      for (int k = 0, degree = 0; k < F::kPairs; ++k)
        if (k != left_out) times_pair(others[left_out], k, degree++);
    }
    circle[0] = 1.0;
    for (int k = 0; k < F::kQuads; ++k) {
      const double a = F::kTurns[k];
      beside[k] = 2.0 - a * a;
      for (int i = 2 * k + 2; i >= 0; --i)
        circle[i] = (i <= 2 * k ? circle[i] : 0.0) + (i >= 1 && i <= 2 * k + 1 ? beside[k] * circle[i - 1] : 0.0) +
                    (i >= 2 ? circle[i - 2] : 0.0);
      plain[k][0] = 1.0;
      for (int j = 1; j < F::kOutputs; ++j) {
        plain[k][j] = -turned[k][j - 1];
        turned[k][j] = plain[k][j - 1] - a * turned[k][j - 1];
      }
    }
  }

 private:
  constexpr void times_pair(double* at, int k, int degree) {
    const double square = F::kPoints[k] * F::kPoints[k];
    for (int i = degree + 1; i > 0; --i) at[i] = at[i - 1] - (i <= degree ? square * at[i] : 0.0);
    at[0] *= -square;
  }
};

// sum_i factors[i] * x[2 * i], whose last factor is 1.
template <class T, int Count>
inline Vec<T> every_other(const Vec<T>* x, const double* factors) {
  Vec<T> sum = x[2 * (Count - 1)];
#pragma GCC unroll 8
  for (int i = Count - 2; i >= 0; --i) sum = vfma(vset1(static_cast<T>(factors[i])), x[2 * i], sum);
  return sum;
}

// The operands of conjugate points: x without the real points, per pair of quadratics without the other pair, and per
// quadratic, as r + s z, without the other one of the pair.
template <class T, class F>
inline void transform_circle(const Vec<T>* x, T* out, int64_t out_stride) {
  constexpr int kFirst = F::kZero ? 1 : 0;
  static constexpr Tables<F> kTables;
  Vec<T> y[4 * F::kQuads];
#pragma GCC unroll 16
  for (int i = 0; i < 4 * F::kQuads; ++i) y[i] = every_other<T, F::kPairs + 1>(x + i + kFirst, kTables.all);
#pragma GCC unroll 4
  for (int k = 0; k < F::kQuads; ++k) {
    static_assert(F::kQuads <= 2);
    Vec<T> f[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      f[i] = F::kQuads == 1 ? y[i]
                            : vfma(vset1(static_cast<T>(kTables.beside[F::kQuads - 1 - k])), y[i + 2], y[i] + y[i + 4]);
    const Vec<T> r = f[0] + f[2], s = f[1] + f[3];
#pragma GCC unroll 2
    for (int sign = 0; sign < 2; ++sign) {
      const double a = sign == 0 ? F::kTurns[k] : -F::kTurns[k];
      const Vec<T> turn = vset1(static_cast<T>(-a)), split = vset1(static_cast<T>(F::kSplit));
      const Vec<T> low = vfma(turn, f[1], r), high = vfma(turn, f[2], s);
      vstore<T>(out, vfma(split, low, high));
      vstore<T>(out + out_stride, vfma(split, low, -high));
      vstore<T>(out + 2 * out_stride, vfma(vset1(static_cast<T>((1.0 + F::kSplit * F::kSplit) / a)), low, high));
      out += 3 * out_stride;
    }
  }
}

// `width` columns of one row of each operand from n input rows. The polynomials M(z) / (z - p) and M(z) / (z + p)
// share their even and odd parts.
template <class T, class F>
inline void transform_input(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t width) {
  using Shape = WinogradShape<F>;
  constexpr int kInputs = Shape::kInputs, kPairs = F::kPairs, kFirst = F::kZero ? 1 : 0;
  static constexpr Tables<F> kTables;
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    Vec<T> x[kInputs];
#pragma GCC unroll 32
    for (int i = 0; i < kInputs; ++i) x[i] = vload<T>(in + i * in_stride + c);
    if constexpr (F::kQuads > 0) {
      transform_circle<T, F>(x, out + Shape::kReal * out_stride + c, out_stride);
#pragma GCC unroll 32
      for (int i = 0; i <= Shape::kReal; ++i) x[i] = every_other<T, 2 * F::kQuads + 1>(x + i, kTables.circle);
    }
    if constexpr (F::kZero) vstore<T>(out + c, every_other<T, kPairs + 1>(x, kTables.all));
#pragma GCC unroll 8
    for (int k = 0; k < kPairs; ++k) {
      // z^2 Q(z^2) +- p z Q(z^2) with a zero point, else z Q(z^2) +- p Q(z^2): the part without p is one input further.
      const Vec<T> plain = every_other<T, kPairs>(x + kFirst + 1, kTables.others[k]);
      const Vec<T> scaled = every_other<T, kPairs>(x + kFirst, kTables.others[k]);
      const Vec<T> p = vset1(static_cast<T>(F::kPoints[k]));
      vstore<T>(out + (kFirst + 2 * k) * out_stride + c, vfma(p, scaled, plain));
      vstore<T>(out + (kFirst + 2 * k + 1) * out_stride + c, vfma(-p, scaled, plain));
    }
    vstore<T>(out + (Shape::kOperands - 1) * out_stride + c, every_other<T, kPairs + 1>(x + kFirst, kTables.all));
  }
}

// Adds the products of quadratic pair k to the sums: the powers of z modulo z^2 + a z + 1 and z^2 - a z + 1 differ in
// the signs of every other one.
template <class T, class F>
inline void add_circle(const T* in, int64_t in_stride, int k, Vec<T>* sum) {
  static constexpr Tables<F> kTables;
  const Vec<T> split = vset1(static_cast<T>(F::kSplit));
  Vec<T> low[2], high[2];
#pragma GCC unroll 2
  for (int sign = 0; sign < 2; ++sign) {
    const T* from = in + 3 * sign * in_stride;
    const Vec<T> plus = vload<T>(from), minus = vload<T>(from + in_stride);
    low[sign] = plus + minus;
    high[sign] = vfma(split, plus - minus, vload<T>(from + 2 * in_stride));
  }
  const Vec<T> low_even = low[0] + low[1], low_odd = low[0] - low[1];
  const Vec<T> high_even = high[0] - high[1], high_odd = high[0] + high[1];
  sum[0] = sum[0] + low_even;
  sum[1] = sum[1] + high_odd;
#pragma GCC unroll 16
  for (int j = 2; j < F::kOutputs; ++j) {
    sum[j] = vfma(vset1(static_cast<T>(kTables.plain[k][j])), j % 2 == 0 ? low_even : low_odd, sum[j]);
    sum[j] = vfma(vset1(static_cast<T>(kTables.turned[k][j])), j % 2 == 0 ? high_even : high_odd, sum[j]);
  }
}

// One row of all m outputs, `out_stride` apart, from one row of each operand's product: plus the bias.
template <class T, class F>
inline void transform_products(const T* in, int64_t in_stride, const T* bias, Vec<T>* sum) {
  using Shape = WinogradShape<F>;
  constexpr int kOutputs = F::kOutputs, kPairs = F::kPairs, kFirst = F::kZero ? 1 : 0;
#pragma GCC unroll 8
  for (int k = 0; k < kPairs; ++k) {
    const Vec<T> plus = vload<T>(in + (kFirst + 2 * k) * in_stride);
    const Vec<T> minus = vload<T>(in + (kFirst + 2 * k + 1) * in_stride);
    const Vec<T> even = plus + minus, odd = plus - minus;
    T power = T(1);
#pragma GCC unroll 16
    for (int j = 0; j < kOutputs; ++j) {
      const Vec<T> part = j % 2 == 0 ? even : odd;
      if (k == 0)
        sum[j] = j == 0 ? part : vset1(power) * part;
      else
        sum[j] = j == 0 ? sum[j] + part : vfma(vset1(power), part, sum[j]);
      power *= static_cast<T>(F::kPoints[k]);
    }
  }
  if constexpr (F::kQuads > 0) {
#pragma GCC unroll 4
    for (int k = 0; k < F::kQuads; ++k) add_circle<T, F>(in + (Shape::kReal + 6 * k) * in_stride, in_stride, k, sum);
  }
  if constexpr (F::kZero) sum[0] = sum[0] + vload<T>(in);
  sum[kOutputs - 1] = sum[kOutputs - 1] + vload<T>(in + (Shape::kOperands - 1) * in_stride);
  const Vec<T> offset = vload<T>(bias);
#pragma GCC unroll 16
  for (int j = 0; j < kOutputs; ++j) sum[j] = sum[j] + offset;
}

// The same snaked, where |alpha x| may be beyond what snake_near takes: a call of libm beside the common case would
// have its constants loaded for every register.
template <class T, class F>
__attribute__((noinline, cold)) void transform_far(const T* in, int64_t in_stride, const T* bias, const T* alpha,
                                                   const T* inverse, T* out, int64_t out_stride) {
  Vec<T> sum[F::kOutputs];
  transform_products<T, F>(in, in_stride, bias, sum);
  for (int j = 0; j < F::kOutputs; ++j) vstore<T>(out + j * out_stride, snake_vector(sum[j], alpha, inverse));
}

template <class F>
inline void transform_output(const float* in, int64_t in_stride, const float* bias, const float* alpha,
                             const float* inverse, float* out, int64_t out_stride, int64_t width) {
  for (int64_t c = 0; c < width; c += kLanes<float>) {
    Vec<float> sum[F::kOutputs], largest{};
    transform_products<float, F>(in + c, in_stride, bias + c, sum);
    const Vec<float> a = vload<float>(alpha + c), i = vload<float>(inverse + c);
#pragma GCC unroll 16
    for (int j = 0; j < F::kOutputs; ++j) {
      const Vec<float> y = a * sum[j];
      largest = vlargest(y, largest);
      vstore<float>(out + j * out_stride + c, snake_near(sum[j], y, i));
    }
    if (__builtin_expect(vany<float>(largest > vset1(kSnakeFar)), 0))
      transform_far<float, F>(in + c, in_stride, bias + c, alpha + c, inverse + c, out + c, out_stride);
  }
}
template <class F>
inline void transform_output(const double* in, int64_t in_stride, const double* bias, const double* alpha,
                             const double* inverse, double* out, int64_t out_stride, int64_t width) {
  for (int64_t c = 0; c < width; c += kLanes<double>)
    transform_far<double, F>(in + c, in_stride, bias + c, alpha + c, inverse + c, out + c, out_stride);
}

// Rows [first, first + count) of a task, in the order of (group, phase), and where they are in time.
struct Chunk {
  int64_t first, count, dilation, group;
  int64_t step(int64_t row) const { return (first + row) / dilation * group + (first + row) % dilation; }
};

// How many channels are summed before the sum is added to what is there, shorter than elsewhere, since the transforms
// magnify what the products round. README.md has what each length costs in time and gives in accuracy.
template <class F>
int64_t chain_length(int64_t channels) {
  if (F::kPieces == 1) return channels > 192 ? kReductionBlock : 64;
  return channels > 128 ? 64 : channels > 32 ? 32 : 16;
}

// middle[j * count + r]: the snaked hidden value of row r's output j.
template <class T, class F>
void convolve(const Chunk& chunk, const T* in, int64_t ld, int64_t channels, const T* weight, const T* bias,
              const T* alpha, const T* inverse, T* transformed, T* products, T* middle) {
  using Shape = WinogradShape<F>;
  const int64_t block = chain_length<F>(channels);
  const bool fetched = beyond_l2<T, F>(channels);
  const int64_t d = chunk.dilation, rows = chunk.count, transformed_rows = rows + (F::kPieces - 1) * d;
  for (int64_t r = 0; r < transformed_rows; ++r)
    transform_input<T, F>(in + chunk.step(r) * ld, d * ld, transformed + r * ld, transformed_rows * ld, ld);
  for (int64_t panel = 0; panel < panel_count(channels); ++panel) {
    const int64_t n0 = panel_begin(channels, panel), width = panel_begin(channels, panel + 1) - n0;
    for (int i = 0; i < Shape::kOperands; ++i) {
      const T* a = transformed + i * transformed_rows * ld;
      const GemmOperand<T> operand{a, ld, d * ld, Shape::pieces(i), channels, block};
      conv_gemm_among<T>(fetched, rows, operand, weight, width, products + i * rows * width);
      weight += Shape::pieces(i) * channels * width;
    }
    for (int64_t r = 0; r < rows; ++r)
      transform_output<F>(products + r * width, rows * width, bias + n0, alpha + n0, inverse + n0, middle + r * ld + n0,
                          rows * ld, width);
  }
}

// Rows in whole and in part of groups that `count` steps take.
template <class F>
inline int64_t rows_of(int64_t count, int64_t d) {
  const int64_t full = count / (F::kOutputs * d), left = count - full * F::kOutputs * d;
  return full * d + (left < d ? left : d);
}

// A few rows of every clip: tasks are panels of columns, first of the input transform, then of the products with Snake
// behind them, then of W2. Hidden values are in the order of time.
template <class Kind, class F>
void run_short(const ResidualUnitParams& p, const typename Kind::Sum* shared, int64_t halo) {
  typedef typename Kind::Sum T;
  using Shape = WinogradShape<F>;
  const int64_t ld = round_up(p.channels, kColumnUnit), d = p.dilation, group = F::kOutputs * d;
  const int64_t reached = round_up(p.out_steps, group), in_rows = reached + halo;
  const Chunk chunk{0, rows_of<F>(p.out_steps, d), d, group};
  const int64_t rows = chunk.count, transformed_rows = rows + (F::kPieces - 1) * d;
  T* in = scratch_rows<T>(kAllInput, p.batch * in_rows, ld);
  T* transformed = scratch_rows<T>(kTransformed, Shape::kOperands * p.batch * transformed_rows, ld);
  T* middle = scratch_rows<T>(kAllMiddle, p.batch * reached, ld);
  const bool plain = is_direct<T>(p.x, p.channels);  // a panel's columns can then be loaded by themselves
  for (int64_t b = 0; b < p.batch && !plain; ++b)
    load_snaked(in + b * in_rows * ld, ld, in_rows, p.channels, p.x, b, -p.pad_left, p.in_valid(b), shared,
                shared + ld);
  const int64_t panels = panel_count(p.channels), work = p.batch * rows * p.channels;
  parallel(panels, work * Shape::kOperands * Shape::kOperands, [&](int64_t panel) {
    const int64_t n0 = panel_begin(p.channels, panel), width = panel_begin(p.channels, panel + 1) - n0;
    for (int64_t b = 0; b < p.batch && plain; ++b) {
      const RowRange inside = rows_inside(-p.pad_left, in_rows, p.in_valid(b));
      T* tile = in + b * in_rows * ld + n0;
      for (int64_t r = 0; r < in_rows; ++r)
        if (r < inside.first || r >= inside.last) memset(tile + r * ld, 0, static_cast<size_t>(width) * sizeof(T));
      if (inside.last > inside.first)
        snake_rows(tile + inside.first * ld, ld, row_of<const T>(p.x, b, inside.first - p.pad_left) + n0, p.x.stride_t,
                   inside.last - inside.first, shared + n0, shared + ld + n0, width);
    }
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t r = 0; r < transformed_rows; ++r)
        transform_input<T, F>(in + (b * in_rows + chunk.step(r)) * ld + n0, d * ld,
                              transformed + (b * transformed_rows + r) * ld + n0, p.batch * transformed_rows * ld,
                              width);
  });
  parallel(panels, work * p.channels * Shape::kProducts, [&](int64_t panel) {
    const int64_t n0 = panel_begin(p.channels, panel), width = panel_begin(p.channels, panel + 1) - n0;
    T* products = scratch_rows<T>(kProducts, Shape::kOperands * p.batch * rows, width);
    const T* weight = static_cast<const T*>(p.weight1) + Shape::kProducts * p.channels * n0;
    for (int i = 0; i < Shape::kOperands; ++i) {
      const T* a = transformed + i * p.batch * transformed_rows * ld;
      const GemmOperand<T> operand{a, ld, d * ld, Shape::pieces(i), p.channels, chain_length<F>(p.channels)};
      conv_gemm_panel<T>(rows, operand, weight, width, 0, products + i * p.batch * rows * width, width,
                         GemmClips{p.batch, transformed_rows * ld, rows * width});
      weight += Shape::pieces(i) * p.channels * width;
    }
    const T* bias = static_cast<const T*>(p.bias1) + n0;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t r = 0; r < rows; ++r)
        transform_output<F>(products + (b * rows + r) * width, p.batch * rows * width, bias, shared + 2 * ld + n0,
                            shared + 3 * ld + n0, middle + (b * reached + chunk.step(r)) * ld + n0, d * ld, width);
  });
  finish_short<Kind>(p, middle, reached);
}

template <class Kind, class F>
void run(const ResidualUnitParams& p) {
  typedef typename Kind::Sum T;
  using Shape = WinogradShape<F>;
  const int64_t ld = round_up(p.channels, kColumnUnit), d = p.dilation, group = F::kOutputs * d;
  // With two pieces, infinity of a shorter second one is computed beside the others, from d rows more, and not used.
  const int64_t halo = d * (kResidualUnitTaps - 1 + F::kPieces - 1);
  const int64_t element = static_cast<int64_t>(sizeof(T));
  T* shared = scratch_rows<T>(kShared, 4, ld);
  snake_prepare<T>(shared, ld, static_cast<const T*>(p.alpha1), p.channels);
  snake_prepare<T>(shared + 2 * ld, ld, static_cast<const T*>(p.alpha2), p.channels);
  if (is_short(p.out_steps, p.batch, panel_count(p.channels))) {
    run_short<Kind, F>(p, shared, halo);
    return;
  }

  const int64_t panel = ld < kMaxPanelWidth ? ld : kMaxPanelWidth;
  int64_t chunk_rows = within_l2(kChunkBytes) /
                       (((Shape::kOperands + F::kOutputs) * ld + Shape::kOperands * panel) * element) /
                       kRowUnit<float> * kRowUnit<float>;
  const int64_t least_rows = least_chunk_rows<T, F>(p.channels);
  if (chunk_rows < least_rows) chunk_rows = least_rows;
  const int64_t fitting = within_l2(kTileBytes) / (ld * element) - halo, least = chunk_rows * F::kOutputs;
  const int64_t rows_most = fitting < least ? least : fitting;
  // Stretches of nearly as many groups each, as many for every thread where there are few.
  const int64_t groups = ceil_div(p.out_steps, group), threads = runtime().num_threads();
  int64_t tiles = ceil_div(groups * group, rows_most);
  if (tiles * p.batch < 16 * threads) tiles = round_up(tiles, threads);
  tiles = minimum(tiles, groups);
  const int64_t rows = ceil_div(groups, tiles) * group;
  if (chunk_rows > rows / F::kOutputs) chunk_rows = rows / F::kOutputs;
  const bool plain = is_direct<T>(p.x, p.channels) && is_direct<T>(p.y, p.channels);

  parallel(p.batch * tiles, [&](int64_t task) {
    const int64_t b = task / tiles, tile = task % tiles, t0 = groups * tile / tiles * group;
    const int64_t count = minimum(p.out_steps, groups * (tile + 1) / tiles * group) - t0;
    // Groups are whole: what the last one reads past the signal is zero, in whatever batch or tile the clip is.
    const int64_t group_rows = rows_of<F>(count, d), reached = round_up(count, group);
    const int64_t in_valid = p.in_valid(b);
    T* in = scratch_rows<T>(kInput, rows + halo, ld);
    T* transformed = scratch_rows<T>(kTransformed, Shape::kOperands * (chunk_rows + (F::kPieces - 1) * d), ld);
    T* products = scratch_rows<T>(kProducts, Shape::kOperands * chunk_rows, panel);
    T* middle = scratch_rows<T>(kMiddle, F::kOutputs * chunk_rows, ld);
    T* out = plain ? nullptr : scratch_rows<T>(kOutput, rows, ld);
    const int64_t block = kSnakeBytes / (ld * element) + 1;
    for (int64_t r = 0; r < reached + halo; r += block) {
      const int64_t block_rows = reached + halo - r < block ? reached + halo - r : block;
      load_snaked(in + r * ld, ld, block_rows, p.channels, p.x, b, t0 - p.pad_left + r, in_valid, shared, shared + ld);
    }
    const T* bias2 = static_cast<const T*>(p.bias2);
    for (int64_t first = 0; first < group_rows; first += chunk_rows) {
      const Chunk chunk{first, group_rows - first < chunk_rows ? group_rows - first : chunk_rows, d, group};
      convolve<T, F>(chunk, in, ld, p.channels, static_cast<const T*>(p.weight1), static_cast<const T*>(p.bias1),
                     shared + 2 * ld, shared + 3 * ld, transformed, products, middle);
      // The operands are done with, and leave their place to the 1x1's outputs.
      GemmOperand<T> pointwise{middle, ld, 0, 1, p.channels};
      if (plain && p.y.stride_t == ld) {
        const int64_t begin = chunk.step(0),
                      end = minimum(count, chunk.step(chunk.count - 1) + (F::kOutputs - 1) * d + 1);
        pointwise.later = {reinterpret_cast<char*>(row_of<T>(p.y, b, t0 + begin)), (end - begin) * ld * element};
      }
      conv_gemm<T>(F::kOutputs * chunk.count, pointwise, static_cast<const T*>(p.weight2), p.channels, transformed, ld);
      for (int64_t r = 0; r < chunk.count; ++r)
        for (int64_t j = 0; j < F::kOutputs; ++j) {
          const int64_t t = chunk.step(r) + j * d;
          if (t >= count) break;
          const T* from = transformed + (j * chunk.count + r) * ld;
          if (plain) {
            finish_row<T>(p, from, b, t0 + t);
          } else {
            for (int64_t c = 0; c < ld; c += kLanes<T>)
              vstore<T>(out + t * ld + c, vload<T>(from + c) + vload<T>(bias2 + c));
          }
        }
    }
    if (plain) return;
    load_tile<T>(in, ld, count, p.channels, p.x, b, t0 - p.pad_left + p.centre * d, in_valid);
    for (int64_t i = 0; i < count * ld; i += kLanes<T>) vstore<T>(out + i, vload<T>(out + i) + vload<T>(in + i));
    store_tile<T>(out, ld, count, p.channels, p.y, b, t0, p.out_valid(b));
  });
}

}  // namespace

void residual_unit_winograd(const ResidualUnitParams& p) {
  with_winograd_form(p.winograd, [&](auto form) {
    if (p.x.dtype == DType::kF64)
      run<DoubleKind, decltype(form)>(p);
    else
      run<SingleKind, decltype(form)>(p);
  });
}

}  // namespace DCX_NS
}  // namespace dcx
