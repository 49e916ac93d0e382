// The search of a whole codebook, for every type, D and instruction set: a block of 6 frames by 4 registers of scores
// |c|^2 - 2 e.c (c: 16 entries). Of a pass over 4 registers a lane keeps the smallest score and the pass it was in, and
// the second smallest of all passes, so no distance outlives its register block.
#pragma once
#include "book.h"

#include "../common/runtime.h"

#include <math.h>

namespace dcx {
namespace DCX_NS {

constexpr int kFrameBlock = 6;
constexpr int kPassRegisters = DCX_ISA >= 2 ? 4 : 1;

// b where a is NaN, as `a < b ? a : b`, in one instruction. (The unmasked intrinsics warn in GCC 12.)
static inline Vec<float> lesser(Vec<float> a, Vec<float> b) {
#if DCX_ISA >= 2
  return _mm512_maskz_min_ps(0xffff, a, b);
#elif DCX_ISA == 1
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
static inline Vec<double> lesser(Vec<double> a, Vec<double> b) {
#if DCX_ISA >= 2
  return _mm512_maskz_min_pd(0xff, a, b);
#elif DCX_ISA == 1
  return _mm256_min_pd(a, b);
#else
  return a < b ? a : b;
#endif
}
static inline Vec<float> greater(Vec<float> a, Vec<float> b) {
#if DCX_ISA >= 2
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif DCX_ISA == 1
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
static inline Vec<double> greater(Vec<double> a, Vec<double> b) {
#if DCX_ISA >= 2
  return _mm512_maskz_max_pd(0xff, a, b);
#elif DCX_ISA == 1
  return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

template <class T>
static inline T smallest_lane(Vec<T> v) {
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
static inline void score_pass(const T* query, int64_t dim, const T* const* columns, int64_t pass, Best<T, FB>& best) {
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

static inline float fused(float a, float b, float c) {
#if DCX_ISA >= 1 || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
static inline double fused(double a, double b, double c) {
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

}  // namespace DCX_NS
}  // namespace dcx
