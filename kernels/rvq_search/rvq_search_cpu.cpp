// All stages of residual vector quantisation in the D-dimensional code space, one parallel task per (clip, tile of
// frames). One GEMM projects a frame for every stage; a chosen row is taken off the later stages' e by D x D cross
// products, so no residual is stored. The search holds 8 frames x 3 registers of scores |c|^2 - 2 e.c (c: 16 entries)
// and a running minimum per lane: no distance outlives its register block. Entries are met in rising order and replaced
// only by smaller scores.
#include "params.h"

#include "../common/gemm.h"
#include "../common/tile_io.h"

#include <math.h>

namespace dcx {
namespace DCX_NS {
namespace {

constexpr int64_t kTileFrames = 64;
constexpr int kFrameBlock = 8;

enum Slot { kInput = 0, kCode = 1, kQuery = 2, kOutput = 3, kBest = 4 };

inline float root(float x) { return sqrtf(x); }
inline double root(double x) { return sqrt(x); }

// Running minima of a block of frames, one candidate per lane.
template <class T, int FB>
struct Best {
  Vec<T> score[FB];
  Vec<T> second[FB];
  IVec<T> index[FB];  // of the register's first entry; the lane adds itself at the end
};

// query: [FB][D], -2 * normalised e. Scores of `NG` registers of entries, the first at entry `base`.
template <class T, int FB, int NG, bool kMargin>
inline void score_block(const T* query, int64_t dim, const T* const* columns, const int64_t* base, Best<T, FB>& best) {
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
#pragma GCC unroll 8
  for (int f = 0; f < FB; ++f) {
    Vec<T> score = best.score[f], second = best.second[f];
    IVec<T> index = best.index[f];
#pragma GCC unroll 8
    for (int g = 0; g < NG; ++g) {
      const IVec<T> less = acc[f][g] < score;
      const IVec<T> here = IVec<T>{} + static_cast<typename VecTraits<T>::Int>(base[g]);
      if (kMargin) {
        const Vec<T> loser = less ? score : acc[f][g];
        second = loser < second ? loser : second;
      }
      index = less ? here : index;
      score = less ? acc[f][g] : score;
    }
    best.score[f] = score;
    best.index[f] = index;
    if (kMargin) best.second[f] = second;
  }
}

template <class T, int FB, bool kMargin>
void search_block(const T* query, const RvqLayout& layout, const T* book, Best<T, FB>& best) {
  const T infinity = static_cast<T>(HUGE_VAL);
  for (int f = 0; f < FB; ++f) {
    best.score[f] = vset1(infinity);
    best.second[f] = vset1(infinity);
    best.index[f] = IVec<T>{};
  }
  constexpr int kPerGroup = kCodeGroup / kLanes<T>;  // registers per group of 16 entries
  constexpr int kRegisters = DCX_ISA == 2 ? 3 : 1;
  const int64_t group_size = (layout.dim + 1) * kCodeGroup;
  const int64_t registers = layout.groups() * kPerGroup;
  int64_t r = 0;
  const T* columns[kRegisters];
  int64_t base[kRegisters];
  for (; r + kRegisters <= registers; r += kRegisters) {
    for (int g = 0; g < kRegisters; ++g) {
      columns[g] = book + (r + g) / kPerGroup * group_size + (r + g) % kPerGroup * kLanes<T>;
      base[g] = (r + g) * kLanes<T>;
    }
    score_block<T, FB, kRegisters, kMargin>(query, layout.dim, columns, base, best);
  }
  for (; r < registers; ++r) {
    columns[0] = book + r / kPerGroup * group_size + r % kPerGroup * kLanes<T>;
    base[0] = r * kLanes<T>;
    score_block<T, FB, 1, kMargin>(query, layout.dim, columns, base, best);
  }
}

// The smallest score over the lanes, the lowest index among equals; margin: second smallest minus smallest.
template <class T>
int64_t reduce_lanes(Vec<T> score, Vec<T> second, IVec<T> index, T* margin) {
  T scores[kLanes<T>], seconds[kLanes<T>];
  typename VecTraits<T>::Int indices[kLanes<T>];
  vstore<T>(scores, score);
  vstore<T>(seconds, second);
  memcpy(indices, &index, sizeof(index));
  int64_t winner = indices[0];
  T smallest = scores[0], next = seconds[0];
  for (int lane = 1; lane < kLanes<T>; ++lane) {
    const int64_t candidate = indices[lane] + lane;
    const bool wins = scores[lane] < smallest || (scores[lane] == smallest && candidate < winner);
    const T loser = wins ? smallest : scores[lane];
    if (wins) {
      smallest = scores[lane];
      winner = candidate;
    }
    if (loser < next) next = loser;
    if (seconds[lane] < next) next = seconds[lane];
  }
  *margin = next - smallest;
  return winner;
}

template <class T, bool kMargin>
void search_stage(const T* query, int64_t count, const RvqLayout& layout, const T* book, int64_t* winners, T* margins) {
  int64_t f = 0;
  while (f < count) {
    const int64_t left = count - f;
    if (left >= 3) {  // the tile is padded with zero queries, so a short block may be searched whole
      Best<T, kFrameBlock> best;
      search_block<T, kFrameBlock, kMargin>(query + f * layout.dim, layout, book, best);
      for (int i = 0; i < kFrameBlock && f + i < count; ++i)
        winners[f + i] = reduce_lanes<T>(best.score[i], best.second[i], best.index[i], margins + f + i);
      f += kFrameBlock;
    } else {
      Best<T, 1> best;
      search_block<T, 1, kMargin>(query + f * layout.dim, layout, book, best);
      winners[f] = reduce_lanes<T>(best.score[0], best.second[0], best.index[0], margins + f);
      ++f;
    }
  }
}

template <class T>
void run(const RvqSearchParams& p) {
  const RvqLayout& layout = p.layout;
  const T* packed = static_cast<const T*>(p.packed);
  const int64_t dim = layout.dim, stages = layout.stages;
  const int64_t channel_ld = layout.channel_columns(), code_ld = layout.code_columns();
  const int64_t rows = tile_rows(p.frames, p.batch, kTileFrames, kFrameBlock);
  const int64_t tiles = ceil_div(p.frames, rows);

  parallel(p.batch * tiles, [&](int64_t task) {
    const int64_t b = task / tiles, f0 = task % tiles * rows;
    const int64_t count = p.frames - f0 < rows ? p.frames - f0 : rows;
    const int64_t valid = p.lengths != nullptr ? p.lengths[b] : p.frames;
    T* in = static_cast<T*>(thread_scratch(kInput, static_cast<size_t>(rows * channel_ld) * sizeof(T)));
    T* code = static_cast<T*>(thread_scratch(kCode, static_cast<size_t>(2 * rows * code_ld) * sizeof(T)));
    T* chosen = code + rows * code_ld;  // [frames][Q D]: the rows as they are, for the output projection
    T* query = static_cast<T*>(thread_scratch(kQuery, static_cast<size_t>((rows + kFrameBlock) * dim) * sizeof(T)));
    T* margins = static_cast<T*>(thread_scratch(kBest, static_cast<size_t>(rows) * (sizeof(T) + 2 * sizeof(int64_t))));
    int64_t* winners = reinterpret_cast<int64_t*>(margins + rows);
    int64_t* broken = winners + rows;  // frames whose e was not finite: code 0 from there on, and a NaN sum

    load_tile<T>(in, channel_ld, count, layout.channels, p.z, b, f0, valid);
    const GemmOperand<T> operand{in, channel_ld, 0, 1, layout.channels};
    conv_gemm<T>(count, operand, packed + layout.in_panels(), stages * dim, code, code_ld);
    memset(chosen, 0, static_cast<size_t>(count * code_ld) * sizeof(T));
    memset(query, 0, static_cast<size_t>((rows + kFrameBlock) * dim) * sizeof(T));
    for (int64_t f = 0; f < count; ++f) broken[f] = 0;

    for (int64_t stage = 0; stage < p.used; ++stage) {
      const T* bias = packed + layout.in_bias() + stage * dim;
      for (int64_t f = 0; f < count; ++f) {
        T* e = code + f * code_ld + stage * dim;
        T square = 0;
        for (int64_t d = 0; d < dim; ++d) {
          T value = e[d] + bias[d];
          for (int64_t j = 0; j < stage; ++j) {
            const T* cross = packed + layout.cross() + ((stage * stages + j) * dim + d) * dim;
            T off = 0;
            for (int64_t k = 0; k < dim; ++k) off += cross[k] * chosen[f * code_ld + j * dim + k];
            value -= off;
          }
          e[d] = value;
          square += value * value;
        }
        const T norm = root(square);
        const T scale = T(-2) / (norm > T(1e-12) ? norm : T(1e-12));
        if (!(norm < static_cast<T>(HUGE_VAL))) {
          // A square may overflow where the vector itself is finite: scale by the largest coordinate first.
          T largest = 0;
          for (int64_t d = 0; d < dim; ++d)
            largest = fabs(e[d]) > largest || e[d] != e[d] ? static_cast<T>(fabs(e[d])) : largest;
          if (!(largest < static_cast<T>(HUGE_VAL))) {
            broken[f] = 1;
            for (int64_t d = 0; d < dim; ++d) query[f * dim + d] = 0;
          } else {
            T scaled = 0;
            for (int64_t d = 0; d < dim; ++d) scaled += (e[d] / largest) * (e[d] / largest);
            for (int64_t d = 0; d < dim; ++d) query[f * dim + d] = T(-2) * (e[d] / largest) / root(scaled);
          }
        } else {
          for (int64_t d = 0; d < dim; ++d) query[f * dim + d] = e[d] * scale;
        }
      }
      const T* book = packed + layout.books() + stage * layout.book_size();
      if (p.margin != nullptr)
        search_stage<T, true>(query, count, layout, book, winners, margins);
      else
        search_stage<T, false>(query, count, layout, book, winners, margins);
      const T* table = packed + layout.rows() + stage * layout.entries * dim;
      for (int64_t f = 0; f < count; ++f) {
        const bool counts = f0 + f < valid;
        const int64_t winner = broken[f] ? 0 : winners[f];
        const int64_t position = (b * p.used + stage) * p.frames + f0 + f;
        for (int64_t d = 0; d < dim; ++d) chosen[f * code_ld + stage * dim + d] = table[winner * dim + d];
        p.codes[position] = counts ? winner : 0;
        if (p.margin != nullptr)
          static_cast<T*>(p.margin)[position] = !counts ? T(0) : broken[f] ? static_cast<T>(NAN) : margins[f];
      }
    }

    if (p.quantized.data == nullptr) return;
    T* out = static_cast<T*>(thread_scratch(kOutput, static_cast<size_t>(rows * channel_ld) * sizeof(T)));
    const GemmOperand<T> projection{chosen, code_ld, dim, stages, dim, dim};  // stage by stage, as rvq_lookup
    conv_gemm<T>(count, projection, packed + layout.out_panels(), layout.channels, out, channel_ld);
    const T* bias = packed + layout.out_bias() + (p.used - 1) * channel_ld;
    for (int64_t f = 0; f < count; ++f)
      for (int64_t c = 0; c < channel_ld; ++c)
        out[f * channel_ld + c] = broken[f] ? static_cast<T>(NAN) : out[f * channel_ld + c] + bias[c];
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
