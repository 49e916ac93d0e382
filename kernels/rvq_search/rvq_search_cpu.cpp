// All stages of residual vector quantisation in the D-dimensional code space, one parallel task per (clip, tile of
// frames). One GEMM projects a frame for every stage; a chosen row is taken off the later stages' e by D x D cross
// products, so no residual is stored. The search goes over rows in bytes first and scores in float32 what that leaves
// (coarse.h), or goes over all rows (scan.h). A code that float32 cannot decide is redone in float64: redo.h.
#include "book.h"
#include "params.h"

#include "../common/gemm.h"
#include "../common/tile_io.h"
#include "coarse.h"
#include "redo.h"
#include "scan.h"

#include <math.h>

namespace dcx {
namespace DCX_NS {
namespace {

// Frames of a task, and the block that they are searched in.
constexpr int64_t kTileFrames = DCX_ISA >= 1 ? 64 : 66;
constexpr int64_t kTileUnit = DCX_ISA >= 1 ? 8 : kFrameBlock;

enum Slot { kInput = 0, kCode = 1, kQuery = 2, kOutput = 3, kBest = 4, kRedo = 5, kCoarse = 6, kShared = 7 };

inline float root(float x) { return sqrtf(x); }
inline double root(double x) { return sqrt(x); }

// query [dim] <- -2 e / |e|; returns |e| as computed, infinity where it overflows, NaN where e is not finite.
template <class T>
T normalise(const T* e, int64_t dim, T* query) {
  T square = 0;
  for (int64_t d = 0; d < dim; ++d) square += e[d] * e[d];
  const T norm = root(square);
  if (norm < static_cast<T>(HUGE_VAL)) {
    const T scale = T(-2) / (norm > T(1e-12) ? norm : T(1e-12));
    for (int64_t d = 0; d < dim; ++d) query[d] = e[d] * scale;
    return norm;
  }
  // A square may overflow where the vector itself is finite: scale by the largest coordinate first.
  T largest = 0, scaled = 0;
  for (int64_t d = 0; d < dim; ++d)
    largest = fabs(e[d]) > largest || e[d] != e[d] ? static_cast<T>(fabs(e[d])) : largest;
  const bool finite = largest < static_cast<T>(HUGE_VAL);
  for (int64_t d = 0; d < dim; ++d) scaled += (e[d] / largest) * (e[d] / largest);
  for (int64_t d = 0; d < dim; ++d) query[d] = finite ? T(-2) * (e[d] / largest) / root(scaled) : T(0);
  return static_cast<T>(finite ? HUGE_VAL : NAN);
}

// A frame on its way through the stages.
template <class T>
struct Frame {
  double z_norm;
  double spread;  // of the stage's e, SearchBound::spread
  T norm;         // of the stage's e
  bool broken;    // e was not finite: code 0 from there on, and a NaN sum
};

// A stage's search. Float codes that may not be the definition's are redone, double ones are the definition's.
struct FloatStage {
  const RvqSearchParams& p;
  const float* packed;
  SearchBound bound;
  CoarseSearch coarse;
  int64_t stage, redone = 0;
  double* work;

  FloatStage(const RvqSearchParams& params, const float* weights, int64_t at)
      : p(params),
        packed(weights),
        bound(params.layout, at, weights, params.bound_factor),
        coarse(params.layout, weights, at, bound, params.slack_factor, params.margin != nullptr, kCoarse),
        stage(at) {
    const int64_t doubles = p.layout.channel_columns() + 2 * p.layout.dim;
    work = static_cast<double*>(thread_scratch(kRedo, static_cast<size_t>(doubles) * sizeof(double)));
  }
  static double bound_norm(const float* z, int64_t count) { return norm_above(z, count); }
  void search(const float* query, int64_t count, Frame<float>* frames, const float* row_norms, Winner<float>* winners) {
    for (int64_t f = 0; f < count; ++f) {
      Frame<float>& frame = frames[f];
      frame.spread =
          frame.broken ? HUGE_VAL : bound.spread(frame.z_norm, row_norms + f * p.layout.stages, stage, frame.norm);
    }
    if (coarse.usable())
      coarse.search(query, count, frames, winners);
    else
      search_stage<float>(query, count, Book<float>(p.layout, packed, stage), winners);
  }
  void check(Frame<float>& frame, const float* z, const float* chosen, const float* query, Winner<float>& found) {
    if (frame.broken || bound.clear(frame.spread, found.best, found.second)) return;
    float margin = 0;
    const int64_t groups = coarse.groups(query, frame.spread);
    frame.broken =
        !redo_code(p.layout, packed, z, chosen, stage, bound.score, coarse.list(), groups, work, &found.entry, &margin);
    found.best = 0;
    found.second = margin;
    redone += !frame.broken;
  }
};
struct DoubleStage {
  Book<double> book;
  int64_t redone = 0;

  DoubleStage(const RvqSearchParams& p, const double* packed, int64_t stage) : book(p.layout, packed, stage) {}
  static double bound_norm(const double*, int64_t) { return 0; }
  void search(const double* query, int64_t count, Frame<double>*, const float*, Winner<double>* winners) {
    search_stage<double>(query, count, book, winners);
  }
  void check(Frame<double>& frame, const double*, const double*, const double*, Winner<double>&) {
    frame.broken |= frame.norm != frame.norm;
  }
};
template <class T>
struct StageOf {
  typedef FloatStage Type;
};
template <>
struct StageOf<double> {
  typedef DoubleStage Type;
};

// [Q][Q][D][lanes ...]: W_i V_j with the sum's index outside, zero-padded to whole registers.
template <class T>
void turn_cross(T* out, const RvqLayout& layout, const T* cross, int64_t used) {
  const int64_t dim = layout.dim, padded = round_up(dim, kLanes<T>);
  for (int64_t i = 1; i < used; ++i)
    for (int64_t j = 0; j < i; ++j) {
      const int64_t pair = i * layout.stages + j;
      for (int64_t k = 0; k < dim; ++k)
        for (int64_t d = 0; d < padded; ++d)
          out[(pair * dim + k) * padded + d] = d < dim ? cross[(pair * dim + d) * dim + k] : T(0);
    }
}

template <class T>
void run(const RvqSearchParams& p) {
  typedef typename StageOf<T>::Type Stage;
  const RvqLayout& layout = p.layout;
  const T* packed = static_cast<const T*>(p.packed);
  const int64_t dim = layout.dim, stages = layout.stages, padded = round_up(dim, kLanes<T>);
  const int64_t channel_ld = layout.channel_columns(), code_ld = layout.code_columns();
  // Rows a power of two apart would share few lines of L1, and a register block walks 13 rows side by side.
  const int64_t tile_ld = channel_ld + kCodeGroup;
  const int64_t rows = tile_rows(p.frames, p.batch, kTileFrames, kTileUnit);
  const int64_t tiles = ceil_div(p.frames, rows);
  T* turned = static_cast<T*>(thread_scratch(kShared, static_cast<size_t>(stages * stages * dim * padded) * sizeof(T)));
  turn_cross<T>(turned, layout, packed + layout.cross(), p.used);

  parallel(p.batch * tiles, [&](int64_t task) {
    const int64_t b = task / tiles, f0 = task % tiles * rows;
    const int64_t count = p.frames - f0 < rows ? p.frames - f0 : rows;
    const int64_t valid = p.lengths != nullptr ? p.lengths[b] : p.frames;
    T* in = static_cast<T*>(thread_scratch(kInput, static_cast<size_t>(rows * tile_ld) * sizeof(T)));
    // e and the chosen rows as they are, [frames][Q D] each; whole registers are read past the last e.
    T* code = static_cast<T*>(thread_scratch(kCode, static_cast<size_t>(2 * rows * code_ld + padded) * sizeof(T)));
    T* chosen = code + rows * code_ld + padded;
    T* query = static_cast<T*>(thread_scratch(kQuery, static_cast<size_t>((rows + kTileUnit) * dim) * sizeof(T)));
    const size_t per_frame = sizeof(Winner<T>) + sizeof(Frame<T>) + static_cast<size_t>(stages) * sizeof(float);
    Winner<T>* winners = static_cast<Winner<T>*>(thread_scratch(kBest, static_cast<size_t>(rows) * per_frame));
    Frame<T>* frames = reinterpret_cast<Frame<T>*>(winners + rows);
    float* row_norms = reinterpret_cast<float*>(frames + rows);  // [frames][Q], of the chosen rows

    load_tile<T>(in, tile_ld, count, layout.channels, p.z, b, f0, valid);
    const GemmOperand<T> operand{in, tile_ld, 0, 1, layout.channels, kProjectionBlock};
    conv_gemm<T>(count, operand, packed + layout.in_panels(), stages * dim, code, code_ld);
    memset(chosen, 0, static_cast<size_t>(count * code_ld) * sizeof(T));
    memset(query, 0, static_cast<size_t>((rows + kTileUnit) * dim) * sizeof(T));
    for (int64_t f = 0; f < count; ++f) frames[f] = {Stage::bound_norm(in + f * tile_ld, channel_ld), 0, T(0), false};

    int64_t redone = 0;
    for (int64_t stage = 0; stage < p.used; ++stage) {
      const T* bias = packed + layout.in_bias() + stage * dim;
      for (int64_t f = 0; f < count; ++f) {
        T e[kMaxDim + kLanes<T>];
        for (int64_t d = 0; d < dim; d += kLanes<T>) {
          Vec<T> value = vload<T>(code + f * code_ld + stage * dim + d) + vload<T>(bias + d);
          for (int64_t j = 0; j < stage; ++j) {
            const T* cross = turned + (stage * stages + j) * dim * padded + d;
            Vec<T> off{};
            for (int64_t k = 0; k < dim; ++k)
              off = vfma(vset1(chosen[f * code_ld + j * dim + k]), vload<T>(cross + k * padded), off);
            value = value - off;
          }
          vstore<T>(e + d, value);
        }
        frames[f].norm = normalise<T>(e, dim, query + f * dim);
      }
      Stage search(p, packed, stage);
      search.search(query, count, frames, row_norms, winners);
      const T* table = packed + layout.rows() + stage * layout.entries * dim;
      for (int64_t f = 0; f < count; ++f) {
        const bool counts = f0 + f < valid;
        Frame<T>& frame = frames[f];
        if (counts) search.check(frame, in + f * tile_ld, chosen + f * code_ld, query + f * dim, winners[f]);
        const int64_t winner = frame.broken ? 0 : winners[f].entry;
        const int64_t position = (b * p.used + stage) * p.frames + f0 + f;
        T square = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const T value = table[winner * dim + d];
          chosen[f * code_ld + stage * dim + d] = value;
          square += value * value;
        }
        row_norms[f * stages + stage] = static_cast<float>(root(square) * T(1 + 1e-5) + T(1e-20));
        p.codes[position] = counts ? winner : 0;
        if (p.margin != nullptr)
          static_cast<T*>(p.margin)[position] = !counts        ? T(0)
                                                : frame.broken ? static_cast<T>(NAN)
                                                               : winners[f].second - winners[f].best;
      }
      redone += search.redone;
    }
    if (p.counts != nullptr && sizeof(T) == sizeof(float)) {
      const int64_t kept = valid - f0 < count ? (valid - f0 > 0 ? valid - f0 : 0) : count;
      __atomic_fetch_add(&p.counts->codes, kept * p.used, __ATOMIC_RELAXED);
      __atomic_fetch_add(&p.counts->redone, redone, __ATOMIC_RELAXED);
    }

    if (p.quantized.data == nullptr) return;
    T* out = static_cast<T*>(thread_scratch(kOutput, static_cast<size_t>(rows * tile_ld) * sizeof(T)));
    const GemmOperand<T> projection{chosen, code_ld, dim, stages, dim, dim};  // stage by stage, as rvq_lookup
    conv_gemm<T>(count, projection, packed + layout.out_panels(), layout.channels, out, tile_ld);
    const T* out_bias = packed + layout.out_bias() + (p.used - 1) * channel_ld;
    for (int64_t f = 0; f < count; ++f)
      for (int64_t c = 0; c < channel_ld; ++c)
        out[f * tile_ld + c] = frames[f].broken ? static_cast<T>(NAN) : out[f * tile_ld + c] + out_bias[c];
    store_tile<T>(out, tile_ld, count, layout.channels, p.quantized, b, f0, valid);
  });
}

}  // namespace

void rvq_search(const RvqSearchParams& p) {
  if (p.z.dtype == DType::kF64)
    run<double>(p);
  else
    run<float>(p);
}

}  // namespace DCX_NS
}  // namespace dcx
