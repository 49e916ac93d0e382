// y = act(bias + conv(snake(x))) + residual, one parallel task per (clip, time tile).
// A task loads its input rows as [time][channel], applies Snake in place, runs conv_gemm (a tap is a row offset, the
// stride a longer row) into a tile, and finishes that tile in cache. One input channel is a GEMM over K contiguous
// samples; one output channel sums over channel vectors, since a 16-column panel would be 15/16 zeros.
#include "params.h"

#include "../common/activation.h"
#include "../common/conv_shape.h"
#include "../common/gemm.h"
#include "../common/snake.h"
#include "../common/tile_io.h"

namespace dcx {
namespace DCX_NS {
namespace {

// Input and output tile together, in bytes: half of a 1 MB L2, the rest is for the streamed weights.
constexpr int64_t kTileBytes = 448 * 1024;
// A layer of one channel computes hardly more sums than it stores: its output tile passes through the first-level
// cache.
constexpr int64_t kFewSumsTileBytes = 20 * 1024;
// Wide layers stream megabytes of weights per tile; fewer rows than this and the stream would bound them.
constexpr int64_t kMinTileRows = 96;

enum Slot { kInput = 0, kOutput = 1, kResidual = 2, kUnfolded = 3, kAllInput = 4, kShared = 7 };

// Whole registers: of a single column, what is in the last one's rest does not count.
template <class T>
void activate(T* tile, int64_t count, Activation activation) {
  if (activation == Activation::kTanh) tanh_row(tile, count);
  if (activation == Activation::kGelu) gelu_row(tile, count);
}

// out[r] = sum over channel vectors and taps, in this order, then over a vector's lanes; weight: [K][ld], zero past the
// channels, as is the tile. A register of weights serves `Rows` outputs.
template <int Rows, class T>
void single_output_rows(T* out, const T* in, int64_t ld, int64_t row_stride, int64_t tap_stride, int64_t taps,
                        const T* weight) {
  Vec<T> acc[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) acc[r] = Vec<T>{};
  for (int64_t c = 0; c < ld; c += kLanes<T>)
    for (int64_t k = 0; k < taps; ++k) {
      const Vec<T> w = vload<T>(weight + k * ld + c);
      const T* x = in + k * tap_stride + c;
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) acc[r] = vfma(vload<T>(x + r * row_stride), w, acc[r]);
    }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) out[r] = vsum<T>(acc[r]);
}
template <class T>
void single_output(T* out, int64_t rows, const T* in, int64_t ld, int64_t row_stride, int64_t tap_stride, int64_t taps,
                   const T* weight) {
  constexpr int kRows = 8;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    single_output_rows<kRows, T>(out + r, in + r * row_stride, ld, row_stride, tap_stride, taps, weight);
  for (; r < rows; ++r)
    single_output_rows<1, T>(out + r, in + r * row_stride, ld, row_stride, tap_stride, taps, weight);
}
#if DCX_ISA >= 3
// Sixteen channels, the tile's unit, are half a register of pairs.
void single_output(float* out, int64_t rows, const Bf16* in, int64_t ld, int64_t row_stride, int64_t tap_stride,
                   int64_t taps, const Bf16* weight) {
  const auto load = [](const Bf16* p) {
    return reinterpret_cast<__m256bh>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  };
  for (int64_t r = 0; r < rows; ++r) {
    __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t turn = 0;
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t c = 0; c < ld; c += kColumnUnit, turn ^= 1)
        acc[turn] =
            _mm256_dpbf16_ps(acc[turn], load(in + r * row_stride + k * tap_stride + c), load(weight + k * ld + c));
    float lanes[8];
    _mm256_storeu_ps(lanes, acc[0] + acc[1]);
    for (int width = 4; width >= 1; width /= 2)
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    out[r] = lanes[0];
  }
}
#endif

// Channel c of tap k of the first column.
template <class T>
T first_column(const T* weight, int64_t channels, int64_t k, int64_t c, const T*) {
  return weight[(k * channels + c) * kColumnUnit];
}
inline uint16_t first_column_bits(const Bf16Pair* weight, int64_t channels, int64_t k, int64_t c) {
  const uint32_t pair = weight[(k * ceil_div(channels, int64_t{2}) + c / 2) * kColumnUnit].bits;
  return static_cast<uint16_t>(c % 2 == 0 ? pair : pair >> 16);
}
inline float first_column(const Bf16Pair* weight, int64_t channels, int64_t k, int64_t c, const float*) {
  return bf16_to_float(first_column_bits(weight, channels, k, c));
}
inline Bf16 first_column(const Bf16Pair* weight, int64_t channels, int64_t k, int64_t c, const Bf16*) {
  return Bf16{first_column_bits(weight, channels, k, c)};
}

// Row r of `rows` gets its taps side by side: a convolution of one channel as a product over them, `ld` a multiple
// of 16.
template <class T>
void unfold(T* out, int64_t ld, int64_t rows, const T* in, int64_t row_stride, int64_t tap_stride, int64_t taps) {
  memset(out, 0, static_cast<size_t>(rows * ld) * sizeof(T));
  for (int64_t k = 0; k < taps; ++k)
    for (int64_t r = 0; r < rows; ++r) out[r * ld + k] = in[r * row_stride + k * tap_stride];
}

inline int64_t out_valid_steps(const SnakeConv1dParams& p, int64_t b) {
  return p.lengths != nullptr ? conv_output_steps(p.lengths[b], p.taps, p.stride, p.dilation, p.pad_left, p.pad_right)
                              : p.out_steps;
}

// The bias and the way to memory in one, where nothing else is to do and y has rows of type Row.
template <class Row, class T>
void bias_and_store(const SnakeConv1dParams& p, const T* out, int64_t ld, int64_t rows, int64_t b, int64_t t0) {
  const T* bias = static_cast<const T*>(p.bias);
  const RowRange told = rows_inside(t0, rows, out_valid_steps(p, b));
  for (int64_t r = 0; r < rows; ++r) {
    Row* y = row_of<Row>(p.y, b, t0 + r);
    if (r >= told.last) {
      memset(y, 0, static_cast<size_t>(p.out_channels) * sizeof(Row));
      continue;
    }
    for (int64_t c = 0; c < p.out_channels; c += kLanes<T>)
      vstore_out(y + c, vload<T>(out + r * ld + c) + vload<T>(bias + c));
  }
}

// Activation, residual and the way to memory, for `channels` of a tile [rows][ld] whose bias is added.
template <class T>
void finish(const SnakeConv1dParams& p, T* out, int64_t ld, int64_t rows, int64_t channel, int64_t channels, int64_t b,
            int64_t t0) {
  const int64_t valid = out_valid_steps(p, b);
  activate<T>(out, rows * ld, p.activation);
  if (p.residual.data != nullptr) {
    T* extra = scratch_rows<T>(kResidual, round_up(rows * ld, kColumnUnit), 1);
    load_tile<T>(extra, ld, rows, channels, view_from(p.residual, channel), b, t0, valid);
    for (int64_t i = 0; i < rows * ld; i += kLanes<T>) vstore<T>(out + i, vload<T>(out + i) + vload<T>(extra + i));
  }
  store_tile<T>(out, ld, rows, channels, view_from(p.y, channel), b, t0, valid);
}

// A few rows of every clip: tasks are panels of the output's columns.
template <class Kind>
void run_short(const SnakeConv1dParams& p, const typename Kind::Sum* shared) {
  typedef typename Kind::Tile Tile;
  typedef typename Kind::Sum T;
  const int64_t in_ld = round_up(p.in_channels, kColumnUnit), rows = p.out_steps;
  const int64_t in_rows = (rows - 1) * p.stride + p.dilation * (p.taps - 1) + 1;
  Tile* in =
      static_cast<Tile*>(thread_scratch(kAllInput, static_cast<size_t>(p.batch * in_rows * in_ld) * sizeof(Tile)));
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t valid = p.lengths != nullptr ? p.lengths[b] : p.in_steps;
    Tile* tile = in + b * in_rows * in_ld;
    load_tile<Tile>(tile, in_ld, in_rows, p.in_channels, p.x, b, -p.pad_left, valid);
    const RowRange inside = rows_inside(-p.pad_left, in_rows, valid);
    if (p.alpha != nullptr)
      snake_rows(tile + inside.first * in_ld, in_ld, inside.last - inside.first, shared, shared + in_ld, in_ld);
  }
  const int64_t work = p.batch * rows * p.taps * p.in_channels * p.out_channels;
  parallel(panel_count(p.out_channels), work, [&](int64_t panel) {
    const int64_t n0 = panel_begin(p.out_channels, panel), width = panel_begin(p.out_channels, panel + 1) - n0;
    const int64_t channels = p.out_channels - n0 < width ? p.out_channels - n0 : width;
    T* out = static_cast<T*>(thread_scratch(kOutput, static_cast<size_t>(p.batch * rows * width) * sizeof(T)));
    // One row of every clip, or clips without context: their rows are equally far apart, and so one operand.
    const bool one = rows == 1 || in_rows == rows * p.stride;
    const GemmOperand<Tile> operand{in, (rows == 1 ? in_rows : p.stride) * in_ld, p.dilation * in_ld, p.taps,
                                    p.in_channels};
    conv_gemm_panel<Tile>(one ? p.batch * rows : rows, operand, static_cast<const typename Kind::Weight*>(p.weight),
                          p.out_channels, panel, out, width,
                          one ? GemmClips{} : GemmClips{p.batch, in_rows * in_ld, rows * width});
    add_bias<T>(out, width, p.batch * rows, static_cast<const T*>(p.bias) + n0, width);
    for (int64_t b = 0; b < p.batch; ++b) finish<T>(p, out + b * rows * width, width, rows, n0, channels, b, 0);
  });
}

template <class Kind>
void run(const SnakeConv1dParams& p) {
  typedef typename Kind::Tile Tile;
  typedef typename Kind::Sum T;
  typedef typename Kind::Weight Weight;
  // Pairs of one channel's taps lie wherever the stride and dilation put them, and a tile's samples may end between the
  // two, so they are brought side by side.
  const bool unfolded = p.in_channels == 1 && weight_steps<Kind>(2) == 1;
  const bool single_input = !unfolded && p.in_channels == 1 && p.dilation == 1 && p.alpha == nullptr;
  const bool single_column = p.out_channels == 1 && p.in_channels > 1;
  const int64_t in_ld = p.in_channels == 1 && p.alpha == nullptr ? 1 : round_up(p.in_channels, kColumnUnit);
  const int64_t out_ld = single_column ? 1 : round_up(p.out_channels, kColumnUnit);
  const int64_t halo = p.dilation * (p.taps - 1) + 1;

  T* shared = static_cast<T*>(thread_scratch(kShared, static_cast<size_t>((2 + p.taps) * in_ld) * sizeof(T)));
  if (p.alpha != nullptr) snake_prepare<T>(shared, in_ld, static_cast<const T*>(p.alpha), p.in_channels);
  if (p.in_channels > 1 && !single_column && is_short(p.out_steps, p.batch)) {
    run_short<Kind>(p, shared);
    return;
  }
  Tile* column = reinterpret_cast<Tile*>(shared + 2 * in_ld);
  if (single_column)
    for (int64_t k = 0; k < p.taps; ++k)
      for (int64_t c = 0; c < in_ld; ++c)
        column[k * in_ld + c] = c < p.in_channels ? first_column(static_cast<const Weight*>(p.weight), p.in_channels, k,
                                                                 c, static_cast<const Tile*>(nullptr))
                                                  : Tile{};

  const int64_t taps_ld = unfolded ? round_up(p.taps, kColumnUnit) : 0;
  const int64_t row_bytes =
      (p.stride * in_ld + taps_ld + (p.residual.data != nullptr ? 2 : 1) * out_ld) * static_cast<int64_t>(sizeof(T));
  const int64_t fitting = (single_input ? kFewSumsTileBytes : within_l2(kTileBytes)) / row_bytes;
  const int64_t rows = tile_rows(p.out_steps, p.batch, fitting < kMinTileRows ? kMinTileRows : fitting, kRowUnit<Tile>);
  const int64_t tiles = ceil_div(p.out_steps, rows);
  const int64_t in_rows = (rows - 1) * p.stride + halo;
  // Rows that the product may read where they are.
  const bool readable = single_input ? p.x.dtype == kDTypeOf<Tile> && p.x.stride_t == 1
                                     : p.alpha == nullptr && !single_column && is_direct<Tile>(p.x, p.in_channels);

  parallel(p.batch * tiles, [&](int64_t task) {
    const int64_t b = task / tiles, t0 = task % tiles * rows;
    const int64_t count = p.out_steps - t0 < rows ? p.out_steps - t0 : rows;
    const int64_t in_valid = p.lengths != nullptr ? p.lengths[b] : p.in_steps;
    Tile* in = static_cast<Tile*>(thread_scratch(kInput, static_cast<size_t>(in_rows * in_ld) * sizeof(Tile)));
    T* out = scratch_rows<T>(kOutput, round_up(rows * out_ld, kColumnUnit), 1);
    const int64_t used = (count - 1) * p.stride + halo;
    const int64_t begin = t0 * p.stride - p.pad_left;
    const bool in_place = readable && begin >= 0 && begin + used <= in_valid;
    if (p.alpha != nullptr)
      load_snaked(in, in_ld, used, p.in_channels, p.x, b, begin, in_valid, shared, shared + in_ld);
    else if (!in_place)
      load_tile<Tile>(in, in_ld, used, p.in_channels, p.x, b, begin, in_valid);
    if (single_column) {
      single_output(out, count, in, in_ld, p.stride * in_ld, p.dilation * in_ld, p.taps, column);
    } else {
      GemmOperand<Tile> operand{in, p.stride * in_ld, p.dilation * in_ld, p.taps, p.in_channels};
      if (in_place)
        operand = GemmOperand<Tile>{row_of<Tile>(p.x, b, begin), p.stride * p.x.stride_t, p.dilation * p.x.stride_t,
                                    p.taps, p.in_channels};
      if (single_input) operand = GemmOperand<Tile>{operand.a, p.stride, 0, 1, p.taps};
      if (unfolded) {
        Tile* rows_of_taps =
            static_cast<Tile*>(thread_scratch(kUnfolded, static_cast<size_t>(rows * taps_ld) * sizeof(Tile)));
        unfold<Tile>(rows_of_taps, taps_ld, count, in, p.stride * in_ld, p.dilation * in_ld, p.taps);
        operand = GemmOperand<Tile>{rows_of_taps, taps_ld, 0, 1, p.taps};
      }
      conv_gemm<Tile>(count, operand, static_cast<const Weight*>(p.weight), p.out_channels, out, out_ld);
    }
    if (p.activation == Activation::kNone && p.residual.data == nullptr && is_direct<Tile>(p.y, p.out_channels)) {
      bias_and_store<Tile>(p, out, out_ld, count, b, t0);
      return;
    }
    if (single_column)
      for (int64_t r = 0; r < count; ++r) out[r] += static_cast<const T*>(p.bias)[0];
    else
      add_bias<T>(out, out_ld, count, static_cast<const T*>(p.bias), out_ld);
    finish<T>(p, out, out_ld, count, 0, p.out_channels, b, t0);
  });
}

}  // namespace

void snake_conv1d(const SnakeConv1dParams& p) {
  if (p.x.dtype == DType::kF64)
    run<DoubleKind>(p);
  else if (p.x.dtype == DType::kBF16)
    run<Bf16Kind>(p);
  else
    run<SingleKind>(p);
}

}  // namespace DCX_NS
}  // namespace dcx
