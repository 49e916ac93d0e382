// All stages of residual vector quantisation in the D-dimensional code space, one parallel task per (clip, tile of
// frames). One GEMM projects a frame for every stage; a chosen row is taken off the later stages' e by D x D cross
// products, so no residual is stored. The search holds 6 frames x 4 registers of scores |c|^2 - 2 e.c (c: 16 entries);
// of a pass over 4 registers a lane keeps the smallest score and the pass it was in, and the second smallest of all
// passes, so no distance outlives its register block. A code that float32 cannot decide is redone in float64: redo.h.
#include "book.h"
#include "params.h"

#include "../common/gemm.h"
#include "../common/tile_io.h"
#include "redo.h"

#include <math.h>

namespace dcx {
namespace DCX_NS {
namespace {

constexpr int64_t kTileFrames = 66;
constexpr int kFrameBlock = 6;
constexpr int kPassRegisters = DCX_ISA >= 2 ? 4 : 1;

enum Slot { kInput = 0, kCode = 1, kQuery = 2, kOutput = 3, kBest = 4, kRedo = 5, kShared = 7 };

inline float root(float x) { return sqrtf(x); }
inline double root(double x) { return sqrt(x); }

// b where a is NaN, as `a < b ? a : b`, in one instruction. (The unmasked intrinsics warn in GCC 12.)
inline Vec<float> lesser(Vec<float> a, Vec<float> b) {
#if DCX_ISA >= 2
  return _mm512_maskz_min_ps(0xffff, a, b);
#elif DCX_ISA == 1
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
inline Vec<double> lesser(Vec<double> a, Vec<double> b) {
#if DCX_ISA >= 2
  return _mm512_maskz_min_pd(0xff, a, b);
#elif DCX_ISA == 1
  return _mm256_min_pd(a, b);
#else
  return a < b ? a : b;
#endif
}
inline Vec<float> greater(Vec<float> a, Vec<float> b) {
#if DCX_ISA >= 2
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif DCX_ISA == 1
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline Vec<double> greater(Vec<double> a, Vec<double> b) {
#if DCX_ISA >= 2
  return _mm512_maskz_max_pd(0xff, a, b);
#elif DCX_ISA == 1
  return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

template <class T>
inline T smallest_lane(Vec<T> v) {
  T lanes[kLanes<T>];
  vstore<T>(lanes, v);
#pragma GCC unroll 8
  for (int width = kLanes<T> / 2; width >= 1; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i + width] < lanes[i] ? lanes[i + width] : lanes[i];
  return lanes[0];
}

// Running minima of a block of frames, one candidate per lane.
template <class T, int FB>
struct Best {
  Vec<T> score[FB];
  Vec<T> second[FB];  // over whole passes: what loses within the winning one is not in it
  IVec<T> pass[FB];   // the first register of the pass with the smallest score
};

// query: [FB][D], -2 * normalised e. A pass over `NG` registers of entries, the first one `pass`.
template <class T, int FB, int NG>
inline void score_pass(const T* query, int64_t dim, const T* const* columns, int64_t pass, Best<T, FB>& best) {
  Vec<T> acc[FB][NG];
#pragma GCC unroll 8
  for (int g = 0; g < NG; ++g) {
    const Vec<T> square = vload<T>(columns[g]);
#pragma GCC unroll 8
    for (int f = 0; f < FB; ++f) acc[f][g] = square;
  }
  for (int64_t d = 0; d < dim; ++d) {
    Vec<T> code[NG];
#pragma GCC unroll 8
    for (int g = 0; g < NG; ++g) code[g] = vload<T>(columns[g] + (d + 1) * kCodeGroup);
#pragma GCC unroll 8
    for (int f = 0; f < FB; ++f) {
      const Vec<T> q = vset1(query[f * dim + d]);
#pragma GCC unroll 8
      for (int g = 0; g < NG; ++g) acc[f][g] = vfma(q, code[g], acc[f][g]);
    }
  }
  const IVec<T> here = IVec<T>{} + static_cast<typename VecTraits<T>::Int>(pass);
#pragma GCC unroll 8
  for (int f = 0; f < FB; ++f) {
    Vec<T> low = acc[f][0];
#pragma GCC unroll 8
    for (int g = 1; g < NG; ++g) low = lesser(acc[f][g], low);
    const IVec<T> less = low < best.score[f];
    best.second[f] = lesser(greater(low, best.score[f]), best.second[f]);
    best.pass[f] = less ? here : best.pass[f];
    best.score[f] = lesser(low, best.score[f]);
  }
}

template <class T, int FB>
void search_block(const T* query, const Book<T>& book, Best<T, FB>& best) {
  const T infinity = static_cast<T>(HUGE_VAL);
  for (int f = 0; f < FB; ++f) {
    best.score[f] = vset1(infinity);
    best.second[f] = vset1(infinity);
    best.pass[f] = IVec<T>{};
  }
  int64_t r = 0;
  const T* columns[kPassRegisters];
  for (; r + kPassRegisters <= book.registers; r += kPassRegisters) {
    for (int g = 0; g < kPassRegisters; ++g) columns[g] = book.column(r + g);
    score_pass<T, FB, kPassRegisters>(query, book.dim, columns, r, best);
  }
  for (; r < book.registers; ++r) {
    columns[0] = book.column(r);
    score_pass<T, FB, 1>(query, book.dim, columns, r, best);
  }
}

inline float fused(float a, float b, float c) {
#if DCX_ISA >= 1 || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline double fused(double a, double b, double c) {
#if DCX_ISA >= 1 || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

template <class T>
struct Winner {
  int64_t entry;
  T best, second;  // the two smallest scores
};

// The smallest score over the lanes, the lowest index among equals. The entries of a winning lane's pass are scored
// once more, by the same operations.
template <class T>
Winner<T> reduce_lanes(const T* query, const Book<T>& book, Vec<T> score, Vec<T> second, IVec<T> pass) {
  Winner<T> found{book.entries, static_cast<T>(HUGE_VAL), static_cast<T>(HUGE_VAL)};
  const T low = smallest_lane<T>(score);
  const IVec<T> wins = score <= low;
  found.second = smallest_lane<T>(wins ? second : score);
  typename VecTraits<T>::Int mask[kLanes<T>], first[kLanes<T>];
  memcpy(mask, &wins, sizeof(wins));
  memcpy(first, &pass, sizeof(pass));
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    if (!mask[lane]) continue;
    const int64_t begin = first[lane], end = begin + (begin + kPassRegisters <= book.registers ? kPassRegisters : 1);
    for (int64_t i = begin; i < end; ++i) {
      const T* column = book.column(i) + lane;
      T value = column[0];
      for (int64_t d = 0; d < book.dim; ++d) value = fused(query[d], column[(d + 1) * kCodeGroup], value);
      const int64_t entry = i * kLanes<T> + lane;
      const bool better = value < found.best || (value == found.best && entry < found.entry);
      const T loser = better ? found.best : value;
      if (better) {
        found.best = value;
        found.entry = entry;
      }
      if (loser < found.second) found.second = loser;
    }
  }
  if (found.entry >= book.entries) found.entry = 0;  // every score is NaN or infinite
  return found;
}

template <class T>
void search_stage(const T* query, int64_t count, const Book<T>& book, Winner<T>* winners) {
  int64_t f = 0;
  while (f < count) {
    const T* q = query + f * book.dim;
    if (count - f >= 3) {  // the tile is padded with zero queries, so a short block may be searched whole
      Best<T, kFrameBlock> best;
      search_block<T, kFrameBlock>(q, book, best);
      for (int i = 0; i < kFrameBlock && f + i < count; ++i)
        winners[f + i] = reduce_lanes<T>(q + i * book.dim, book, best.score[i], best.second[i], best.pass[i]);
      f += kFrameBlock;
    } else {
      Best<T, 1> best;
      search_block<T, 1>(q, book, best);
      winners[f] = reduce_lanes<T>(q, book, best.score[0], best.second[0], best.pass[0]);
      ++f;
    }
  }
}

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
  T norm;       // of the stage's e
  bool broken;  // e was not finite: code 0 from there on, and a NaN sum
};

// Whether a code stands; float codes that may not be the definition's are redone, double ones are the definition's.
struct Redo {
  const RvqSearchParams& p;
  const float* packed;
  SearchBound bound;
  int64_t stage, redone = 0;
  double* work;

  Redo(const RvqSearchParams& params, const float* weights, int64_t at)
      : p(params), packed(weights), bound(params.layout, at, weights, params.bound_factor), stage(at) {
    const int64_t doubles = p.layout.channel_columns() + 2 * p.layout.dim;
    work = static_cast<double*>(thread_scratch(kRedo, static_cast<size_t>(doubles) * sizeof(double)));
  }
  void check(Frame<float>& frame, const float* z, const float* chosen, const float* row_norms, Winner<float>& found) {
    if (frame.broken || bound.clear(frame.z_norm, row_norms, stage, frame.norm, found.best, found.second)) return;
    float margin = 0;
    const double error = bound.score;
    frame.broken = !redo_code(p.layout, packed, z, chosen, stage, error, work, &found.entry, &margin);
    found.best = 0;
    found.second = margin;
    redone += !frame.broken;
  }
};
struct Keep {
  int64_t redone = 0;
  Keep(const RvqSearchParams&, const double*, int64_t) {}
  void check(Frame<double>& frame, const double*, const double*, const float*, Winner<double>&) {
    frame.broken |= frame.norm != frame.norm;
  }
};
inline double bound_norm(const float* z, int64_t count) { return norm_above(z, count); }
inline double bound_norm(const double*, int64_t) { return 0; }
template <class T>
struct Judge {
  typedef Redo Type;
};
template <>
struct Judge<double> {
  typedef Keep Type;
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
  const RvqLayout& layout = p.layout;
  const T* packed = static_cast<const T*>(p.packed);
  const int64_t dim = layout.dim, stages = layout.stages, padded = round_up(dim, kLanes<T>);
  const int64_t channel_ld = layout.channel_columns(), code_ld = layout.code_columns();
  const int64_t rows = tile_rows(p.frames, p.batch, kTileFrames, kFrameBlock);
  const int64_t tiles = ceil_div(p.frames, rows);
  T* turned = static_cast<T*>(thread_scratch(kShared, static_cast<size_t>(stages * stages * dim * padded) * sizeof(T)));
  turn_cross<T>(turned, layout, packed + layout.cross(), p.used);

  parallel(p.batch * tiles, [&](int64_t task) {
    const int64_t b = task / tiles, f0 = task % tiles * rows;
    const int64_t count = p.frames - f0 < rows ? p.frames - f0 : rows;
    const int64_t valid = p.lengths != nullptr ? p.lengths[b] : p.frames;
    T* in = static_cast<T*>(thread_scratch(kInput, static_cast<size_t>(rows * channel_ld) * sizeof(T)));
    // e and the chosen rows as they are, [frames][Q D] each; whole registers are read past the last e.
    T* code = static_cast<T*>(thread_scratch(kCode, static_cast<size_t>(2 * rows * code_ld + padded) * sizeof(T)));
    T* chosen = code + rows * code_ld + padded;
    T* query = static_cast<T*>(thread_scratch(kQuery, static_cast<size_t>((rows + kFrameBlock) * dim) * sizeof(T)));
    const size_t per_frame = sizeof(Winner<T>) + sizeof(Frame<T>) + static_cast<size_t>(stages) * sizeof(float);
    Winner<T>* winners = static_cast<Winner<T>*>(thread_scratch(kBest, static_cast<size_t>(rows) * per_frame));
    Frame<T>* frames = reinterpret_cast<Frame<T>*>(winners + rows);
    float* row_norms = reinterpret_cast<float*>(frames + rows);  // [frames][Q], of the chosen rows

    load_tile<T>(in, channel_ld, count, layout.channels, p.z, b, f0, valid);
    const GemmOperand<T> operand{in, channel_ld, 0, 1, layout.channels, kProjectionBlock};
    conv_gemm<T>(count, operand, packed + layout.in_panels(), stages * dim, code, code_ld);
    memset(chosen, 0, static_cast<size_t>(count * code_ld) * sizeof(T));
    memset(query, 0, static_cast<size_t>((rows + kFrameBlock) * dim) * sizeof(T));
    for (int64_t f = 0; f < count; ++f) frames[f] = {bound_norm(in + f * channel_ld, channel_ld), T(0), false};

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
      search_stage<T>(query, count, Book<T>(layout, packed, stage), winners);
      typename Judge<T>::Type judge(p, packed, stage);
      const T* table = packed + layout.rows() + stage * layout.entries * dim;
      for (int64_t f = 0; f < count; ++f) {
        const bool counts = f0 + f < valid;
        Frame<T>& frame = frames[f];
        if (counts) judge.check(frame, in + f * channel_ld, chosen + f * code_ld, row_norms + f * stages, winners[f]);
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
      redone += judge.redone;
    }
    if (p.counts != nullptr && sizeof(T) == sizeof(float)) {
      const int64_t kept = valid - f0 < count ? (valid - f0 > 0 ? valid - f0 : 0) : count;
      __atomic_fetch_add(&p.counts->codes, kept * p.used, __ATOMIC_RELAXED);
      __atomic_fetch_add(&p.counts->redone, redone, __ATOMIC_RELAXED);
    }

    if (p.quantized.data == nullptr) return;
    T* out = static_cast<T*>(thread_scratch(kOutput, static_cast<size_t>(rows * channel_ld) * sizeof(T)));
    const GemmOperand<T> projection{chosen, code_ld, dim, stages, dim, dim};  // stage by stage, as rvq_lookup
    conv_gemm<T>(count, projection, packed + layout.out_panels(), layout.channels, out, channel_ld);
    const T* out_bias = packed + layout.out_bias() + (p.used - 1) * channel_ld;
    for (int64_t f = 0; f < count; ++f)
      for (int64_t c = 0; c < channel_ld; ++c)
        out[f * channel_ld + c] = frames[f].broken ? static_cast<T>(NAN) : out[f * channel_ld + c] + out_bias[c];
    store_tile<T>(out, channel_ld, count, layout.channels, p.quantized, b, f0, valid);
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
