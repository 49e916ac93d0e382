// What the float32 search may have got wrong, and the same code once more in float64; README.md derives both.
// A code is clear when |e^ - c_second| - |e^ - c_best| is above twice the error of the direction e^, the spread. One
// that is not is redone: the residual is rebuilt in float64 from z and the rows chosen so far, e follows from it, a
// float32 pass over the rows still in the running finds those within the pass's own error of the smallest, and float64
// distances decide.
#pragma once
#include "book.h"
#include "params.h"

#include "../common/gemm.h"
#include "../common/gemm_pack.h"

#include <math.h>

namespace dcx {
namespace DCX_NS {

// Shorter chains than a convolution's: the bound grows with them, and with it the number of codes to redo.
constexpr int64_t kProjectionBlock = 32;
constexpr int64_t kMaxDim = 64;
constexpr double kRounding = 0x1p-24;

// Errors of the float32 search of one stage.
struct SearchBound {
  double score;          // of one entry's score, given the float32 e
  double z, bias, rows;  // of e, per |W_i| |z|, per |folded bias|, per sum of |W_i V_j| |c_j|
  const float* norms;    // |W_i|, |folded bias|, |W_i V_j| for j < i
  double norm_loss;      // relative, of the computed |e|

  SearchBound(const RvqLayout& layout, int64_t stage, const float* packed, double factor) {
    const int64_t dim = layout.dim;
    const int64_t blocks = ceil_div(layout.channels, kProjectionBlock);
    const double chain = static_cast<double>(ceil_div(layout.channels, blocks) + blocks + 1);
    const double longest = chain + static_cast<double>(dim + stage + 4);
    const double unit = longest * kRounding < 0.25 ? factor * kRounding / (1 - longest * kRounding) : HUGE_VAL;
    score = static_cast<double>(4 * dim + 15) * unit;
    z = (chain + static_cast<double>(stage + 2)) * unit;
    bias = static_cast<double>(stage + 3) * unit;
    rows = static_cast<double>(dim + stage + 3) * unit;
    norms = packed + layout.norms_of(stage);
    norm_loss = static_cast<double>(dim + 5) * kRounding;
  }

  // By how much the distances of two rows may change between them. z_norm, norm: of the frame and its e as computed;
  // row_norms: |c_j| of the rows chosen so far. Infinite where that can't be told.
  double spread(double z_norm, const float* row_norms, int64_t stage, float norm) const {
    if (!(norm > 1.001e-12f)) return HUGE_VAL;
    double reach = 0;
    for (int64_t j = 0; j < stage; ++j) reach += static_cast<double>(norms[2 + j]) * static_cast<double>(row_norms[j]);
    const double error =
        z * static_cast<double>(norms[0]) * z_norm + bias * static_cast<double>(norms[1]) + rows * reach;
    const double twice = 2 * (1 - norm_loss) * static_cast<double>(norm) - error;  // <= |e| + |computed e|
    // The direction is off by 2 error / (|e| + |computed e|) at most, a distance by no more than that.
    const double found = twice > 0 ? 4 * error / twice : HUGE_VAL;
    return found == found ? found : HUGE_VAL;
  }
  bool clear(double spread, float best, float second) const {
    const double nearest = 1 + static_cast<double>(best) + score, next = 1 + static_cast<double>(second) - score;
    return next > 0 && sqrt(next) - (nearest > 0 ? sqrt(nearest) : 0) > spread;
  }
};

// |x| of a frame, never too small: the squares' rounding, and what underflow takes.
static inline double norm_above(const float* x, int64_t count) {
  Vec<float> square{};
  for (int64_t c = 0; c < count; c += kLanes<float>) square = vfma(vload<float>(x + c), vload<float>(x + c), square);
  const double n = static_cast<double>(count);
  return sqrt(static_cast<double>(vsum<float>(square)) * (1 + 4 * n * kRounding) + n * 1e-44);
}

// Half a register of floats as a register of doubles.
typedef float FloatHalf __attribute__((vector_size(DCX_VECTOR_BYTES / 2)));
static inline Vec<double> vload_wide(const float* p) {
  FloatHalf half;
  memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, Vec<double>);
}

// r [channels] <- r - V_j c - b_j; row: c, [dim].
static inline void take_off(double* r, const RvqLayout& layout, const float* packed, int64_t stage, const float* row) {
  const float* bias = packed + layout.plain_out_bias() + stage * layout.channel_columns();
  const float* panel = packed + layout.out_panels();
  double wide[kMaxDim];
  for (int64_t d = 0; d < layout.dim; ++d) wide[d] = static_cast<double>(row[d]);
  for (int64_t p = 0; p < panel_count(layout.channels); ++p) {
    const int64_t begin = panel_begin(layout.channels, p), width = panel_begin(layout.channels, p + 1) - begin;
    const float* weights = panel + stage * layout.dim * width;
    for (int64_t n = 0; n < width; n += kLanes<double>) {
      Vec<double> sum{};
      for (int64_t d = 0; d < layout.dim; ++d) sum = vfma(vload_wide(weights + d * width + n), vset1(wide[d]), sum);
      vstore<double>(r + begin + n, vload<double>(r + begin + n) - (sum + vload_wide(bias + begin + n)));
    }
    panel += layout.stages * layout.dim * width;
  }
}

// e [dim] = W_i r + a_i.
static inline void project(double* e, const double* r, const RvqLayout& layout, const float* packed, int64_t stage) {
  const int64_t columns = layout.stages * layout.dim;
  for (int64_t d = 0; d < layout.dim;) {
    const int64_t column = stage * layout.dim + d, p = panel_of(columns, column);
    const int64_t begin = panel_begin(columns, p), width = panel_begin(columns, p + 1) - begin;
    const float* w = packed + layout.in_panels() + begin * layout.channels + (column - begin);
    const bool whole = d + kLanes<double> <= layout.dim && column + kLanes<double> <= begin + width;
    if (whole) {
      Vec<double> sum[4] = {};
      int64_t c = 0;
      for (; c + 4 <= layout.channels; c += 4)
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) sum[u] = vfma(vload_wide(w + (c + u) * width), vset1(r[c + u]), sum[u]);
      for (; c < layout.channels; ++c) sum[0] = vfma(vload_wide(w + c * width), vset1(r[c]), sum[0]);
      vstore<double>(e + d, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    } else {
      double sum = 0;
      for (int64_t c = 0; c < layout.channels; ++c) sum += static_cast<double>(w[c * width]) * r[c];
      e[d] = sum;
    }
    d += whole ? kLanes<double> : 1;
  }
  for (int64_t d = 0; d < layout.dim; ++d)
    e[d] += static_cast<double>(packed[layout.plain_in_bias() + stage * layout.dim + d]);
}

// The float32 scores of a register's entries, as score_block computes them.
static inline Vec<float> score_register(const float* column, const float* query, int64_t dim) {
  Vec<float> score = vload<float>(column);
  for (int64_t d = 0; d < dim; ++d) score = vfma(vset1(query[d]), vload<float>(column + (d + 1) * kCodeGroup), score);
  return score;
}

// Redoes a frame's code at a stage. z: its [channels] values; chosen: the rows of the stages before; groups: those of
// kCodeGroup rows that may hold the two nearest (where the margin does not matter, the nearest); work:
// [channel_columns + 2 dim] doubles. False where e is not finite; else the winner and its margin.
static inline bool redo_code(const RvqLayout& layout, const float* packed, const float* z, const float* chosen,
                             int64_t stage, double score_error, const int32_t* groups, int64_t group_count,
                             double* work, int64_t* winner, float* margin) {
  const int64_t dim = layout.dim;
  double *r = work, *e = work + layout.channel_columns();
  float* query = reinterpret_cast<float*>(e + dim);
  for (int64_t c = 0; c < layout.channel_columns(); ++c) r[c] = static_cast<double>(z[c]);
  for (int64_t j = 0; j < stage; ++j) take_off(r, layout, packed, j, chosen + j * dim);
  project(e, r, layout, packed, stage);
  double square = 0;
  for (int64_t d = 0; d < dim; ++d) square += e[d] * e[d];
  if (!(square < HUGE_VAL)) return false;  // float32 values and weights cannot overflow it
  const double norm = sqrt(square) > 1e-12 ? sqrt(square) : 1e-12;
  for (int64_t d = 0; d < dim; ++d) {
    e[d] /= norm;
    query[d] = static_cast<float>(-2 * e[d]);
  }

  const Book<float> book(layout, packed, stage);
  Vec<float> smallest = vset1(HUGE_VALF), second = smallest;
  constexpr int64_t kPerGroup = kCodeGroup / kLanes<float>;
  for (int64_t k = 0; k < group_count * kPerGroup; ++k) {
    const int64_t i = groups[k / kPerGroup] * kPerGroup + k % kPerGroup;
    const Vec<float> score = score_register(book.column(i), query, dim);
    const Vec<float> loser = score < smallest ? smallest : score;
    second = loser < second ? loser : second;
    smallest = score < smallest ? score : smallest;
  }
  float firsts[2 * kLanes<float>], low = HUGE_VALF, next = HUGE_VALF;
  vstore<float>(firsts, smallest);
  vstore<float>(firsts + kLanes<float>, second);
  for (const float value : firsts) {
    if (value < low) {
      next = low;
      low = value;
    } else if (value < next) {
      next = value;
    }
  }
  // The second smallest is always among the candidates, so that the margin too is float64's.
  const float window = low + static_cast<float>(2 * score_error + 4 * kRounding);
  const Vec<float> limit = vset1(next > window ? next : window);

  const float* rows = packed + layout.rows() + stage * layout.entries * dim;
  double best = HUGE_VAL, runner_up = HUGE_VAL;
  *winner = 0;
  for (int64_t k = 0; k < group_count * kPerGroup; ++k) {
    const int64_t i = groups[k / kPerGroup] * kPerGroup + k % kPerGroup;
    const IVec<float> within = score_register(book.column(i), query, dim) <= limit;
    if (__builtin_expect(!vany<float>(within), 1)) continue;
    for (int64_t n = i * kLanes<float>; n < (i + 1) * kLanes<float> && n < book.entries; ++n) {
      if (!within[n % kLanes<float>]) continue;
      const float* row = rows + n * dim;
      double length = 0, kept = 0, dot = 0;
      for (int64_t d = 0; d < dim; ++d) length += static_cast<double>(row[d]) * static_cast<double>(row[d]);
      length = sqrt(length) > 1e-12 ? sqrt(length) : 1e-12;
      for (int64_t d = 0; d < dim; ++d) {
        const double value = static_cast<double>(row[d]) / length;
        kept += value * value;
        dot += e[d] * value;
      }
      const double score = kept - 2 * dot;
      if (score < best) {
        runner_up = best;
        best = score;
        *winner = n;
      } else if (score < runner_up) {
        runner_up = score;
      }
    }
  }
  *margin = static_cast<float>(runner_up - best);
  return true;
}

}  // namespace DCX_NS
}  // namespace dcx
