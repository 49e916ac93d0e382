// The first pass of the search where D <= 8: every row's score from bytes, of which only the largest of 16 rows is
// kept. The groups of 16 rows whose largest comes within a proven slack of the best are then scored in float32; no
// other row can be the winner, nor keep it from being clear. README.md derives the slack. A lane of a register of sums
// is a group, so a lane that stays in the running is 16 rows that lie side by side in the float32 book.
#pragma once
#include "redo.h"
#include "scan.h"

#if DCX_ISA >= 1
namespace dcx {
namespace DCX_NS {

// Frames of a register block; of AVX-512's 32 registers they take 16 for queries and 8 for the largest sums.
constexpr int kCoarseFrames = DCX_ISA >= 2 ? 8 : 4;
// A direction in bytes is round(scale e^). Without VNNI products are summed in 16 bits: two of them, then four, stay
// below 2^15 up to a scale of 83.
constexpr int kQueryScale = DCX_ISA >= 3 ? 127 : 80;
constexpr int kRegistersPerSum = static_cast<int>(kCoarseGroups) / kLanes<float>;
constexpr int32_t kLowest = -0x7fffffff - 1;

typedef IVec<float> Ints;

static inline Ints spread_int(int32_t x) { return Ints{} + x; }
static inline Ints load_ints(const void* p) {
  Ints v;
  memcpy(&v, p, sizeof(v));
  return v;
}
static inline void store_ints(void* p, Ints v) { memcpy(p, &v, sizeof(v)); }

static inline Ints larger(Ints a, Ints b) {
#if DCX_ISA >= 2
  return (Ints)_mm512_maskz_max_epi32(0xffff, (__m512i)a, (__m512i)b);
#else
  return (Ints)_mm256_max_epi32((__m256i)a, (__m256i)b);
#endif
}
static inline Ints smaller(Ints a, Ints b) {
#if DCX_ISA >= 2
  return (Ints)_mm512_maskz_min_epi32(0xffff, (__m512i)a, (__m512i)b);
#else
  return (Ints)_mm256_min_epi32((__m256i)a, (__m256i)b);
#endif
}

// Per lane the sum of eight products: unsigned bytes of a row, coordinates 0 to 3 and 4 to 7, signed ones of a query.
static inline Ints dot_bytes(Ints row_low, Ints row_high, Ints query_low, Ints query_high) {
#if DCX_ISA >= 3
  const __m512i low = _mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)row_low, (__m512i)query_low);
  return (Ints)_mm512_dpbusd_epi32(low, (__m512i)row_high, (__m512i)query_high);
#elif DCX_ISA == 2
  const __m512i low = _mm512_maddubs_epi16((__m512i)row_low, (__m512i)query_low);
  const __m512i high = _mm512_maddubs_epi16((__m512i)row_high, (__m512i)query_high);
  return (Ints)_mm512_madd_epi16(_mm512_add_epi16(low, high), _mm512_set1_epi16(1));
#else
  const __m256i low = _mm256_maddubs_epi16((__m256i)row_low, (__m256i)query_low);
  const __m256i high = _mm256_maddubs_epi16((__m256i)row_high, (__m256i)query_high);
  return (Ints)_mm256_madd_epi16(_mm256_add_epi16(low, high), _mm256_set1_epi16(1));
#endif
}

static inline int32_t largest_int(Ints v) {
  int32_t lanes[kLanes<float>];
  store_ints(lanes, v);
  __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
  if constexpr (kLanes<float> == 16)
    eight = _mm256_max_epi32(eight, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes + kLanes<float> / 2)));
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
static inline float smallest_float(Vec<float> v) {
  float lanes[kLanes<float>];
  vstore<float>(lanes, v);
  __m256 eight = _mm256_loadu_ps(lanes);
  if constexpr (kLanes<float> == 16) eight = _mm256_min_ps(eight, _mm256_loadu_ps(lanes + kLanes<float> / 2));
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}

// A direction in bytes, eight coordinates in two words, and how far it is from the float one, never too small.
struct CoarseQuery {
  int32_t words[2];
  float error;
};

// query: [dim], -2 e^.
static inline CoarseQuery coarse_query(const float* query, int64_t dim) {
  float wide[kCoarseDim] = {};
  memcpy(wide, query, static_cast<size_t>(dim) * sizeof(float));
  const __m256 exact = _mm256_mul_ps(_mm256_loadu_ps(wide), _mm256_set1_ps(-0.5f * kQueryScale));
  const __m256i rounded = _mm256_cvtps_epi32(exact);
  const __m256 off = _mm256_sub_ps(exact, _mm256_cvtepi32_ps(rounded));
  const __m256 square = _mm256_mul_ps(off, off);
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(square), _mm256_extractf128_ps(square, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  sum = _mm_add_ss(sum, _mm_movehdup_ps(sum));
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  CoarseQuery made;
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(shorts, shorts));
  memcpy(made.words, &bytes, sizeof(bytes));
  made.error = _mm_cvtss_f32(_mm_sqrt_ss(sum)) * (1.00001f / kQueryScale) + 1e-6f;
  return made;
}

struct CoarseBook {
  const uint8_t* rows;
  int64_t passes, groups;
  double error;  // of a row

  CoarseBook(const RvqLayout& layout, const float* packed, int64_t stage)
      : rows(reinterpret_cast<const uint8_t*>(packed + layout.coarse_books() + stage * layout.coarse_size())),
        passes(layout.coarse_passes()),
        groups(layout.groups()),
        error(layout.dim <= kCoarseDim ? static_cast<double>(packed[layout.coarse_errors() + stage]) : HUGE_VAL) {}
};

// Per frame and lane the largest sum over all passes, and the second largest.
template <int FB>
struct Largest {
  Ints first[FB][kRegistersPerSum], second[FB][kRegistersPerSum];
};

// words: [FB][2]; maxima: [passes][FB][16], the lowest integer where there is no group.
template <int FB, bool kSecond>
void coarse_block(const CoarseBook& book, const CoarseQuery* queries, int32_t* maxima, Largest<FB>& largest) {
  constexpr int kStep = static_cast<int>(kCoarseGroups) * 4;  // bytes
  Ints low[FB], high[FB];
#pragma GCC unroll 8
  for (int f = 0; f < FB; ++f) {
    low[f] = spread_int(queries[f].words[0]);
    high[f] = spread_int(queries[f].words[1]);
    for (int part = 0; part < kRegistersPerSum; ++part) {
      largest.first[f][part] = spread_int(kLowest);
      largest.second[f][part] = spread_int(kLowest);
    }
  }
  int32_t present[kCoarseGroups];
  for (int64_t i = 0; i < kCoarseGroups; ++i)
    present[i] = (book.passes - 1) * kCoarseGroups + i < book.groups ? -(kLowest + 1) : kLowest;
  for (int64_t pass = 0; pass < book.passes; ++pass)
    for (int part = 0; part < kRegistersPerSum; ++part) {
      const uint8_t* rows = book.rows + pass * kCoarseRows * kCoarseDim + part * static_cast<int>(sizeof(Ints));
      Ints most[FB];
#pragma GCC unroll 8
      for (int f = 0; f < FB; ++f) most[f] = spread_int(kLowest);
      for (int64_t place = 0; place < kCodeGroup; ++place) {
        const Ints row_low = load_ints(rows + 2 * place * kStep), row_high = load_ints(rows + (2 * place + 1) * kStep);
#pragma GCC unroll 8
        for (int f = 0; f < FB; ++f) most[f] = larger(most[f], dot_bytes(row_low, row_high, low[f], high[f]));
      }
      const Ints limit =
          pass + 1 < book.passes ? spread_int(-(kLowest + 1)) : load_ints(present + part * kLanes<float>);
#pragma GCC unroll 8
      for (int f = 0; f < FB; ++f) {
        const Ints value = smaller(most[f], limit);
        store_ints(maxima + (pass * FB + f) * kCoarseGroups + part * kLanes<float>, value);
        if (kSecond) largest.second[f][part] = larger(largest.second[f][part], smaller(value, largest.first[f][part]));
        largest.first[f][part] = larger(largest.first[f][part], value);
      }
    }
}

// The largest sum of a group, or the second largest.
template <bool kSecond>
static inline int32_t best_sum(const Ints* first, const Ints* second) {
  Ints all = first[0];
  for (int part = 1; part < kRegistersPerSum; ++part) all = larger(all, first[part]);
  const int32_t best = largest_int(all);
  if (!kSecond) return best;
  int32_t firsts[kCoarseGroups], seconds[kCoarseGroups], next = kLowest;
  memcpy(firsts, first, sizeof(firsts));
  memcpy(seconds, second, sizeof(seconds));
  bool passed = false;
  for (int64_t i = 0; i < kCoarseGroups; ++i) {
    const bool winner = !passed && firsts[i] == best;
    passed |= winner;
    const int32_t value = winner ? seconds[i] : firsts[i];
    next = value > next ? value : next;
  }
  return next;
}

// Into list, in rising order: the groups whose largest sum is at least `limit`. maxima: of one frame, `step` apart.
// list holds 16 more than there are groups.
static inline int64_t list_groups(const int32_t* maxima, int64_t step, int64_t passes, int32_t limit, int32_t* list) {
  int64_t count = 0;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int32_t begin = static_cast<int32_t>(pass * kCoarseGroups);
#if DCX_ISA >= 2
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __mmask16 within =
        _mm512_cmpge_epi32_mask((__m512i)load_ints(maxima + pass * step), _mm512_set1_epi32(limit));
    const __m512i groups = _mm512_add_epi32(lanes, _mm512_set1_epi32(begin));
    _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(within, groups));
    count += __builtin_popcount(within);
#else
    for (int part = 0; part < kRegistersPerSum; ++part) {
      const Ints within = load_ints(maxima + pass * step + part * kLanes<float>) >= spread_int(limit);
      unsigned bits = static_cast<unsigned>(_mm256_movemask_ps((__m256)within));
      for (; bits != 0; bits &= bits - 1) list[count++] = begin + part * kLanes<float> + __builtin_ctz(bits);
    }
#endif
  }
  return count;
}

// The two smallest float32 scores among the rows of some groups, in rising order; as the whole scan has them.
template <int kDim>
static inline Winner<float> score_groups(const float* query, const Book<float>& book, const int32_t* groups,
                                         int64_t count) {
  constexpr int kPerGroup = static_cast<int>(kCodeGroup) / kLanes<float>;
  const int64_t dim = kDim > 0 ? kDim : book.dim;
  Vec<float> best = vset1(HUGE_VALF), second = best;
  Ints place{};
  for (int64_t i = 0; i < count; ++i)
    for (int part = 0; part < kPerGroup; ++part) {
      const int32_t at = groups[i] * kPerGroup + part;
      const Vec<float> score = score_register(book.column(at), query, dim);
      const Ints less = score < best;
      second = lesser(greater(score, best), second);
      place = less ? spread_int(at) : place;
      best = lesser(score, best);
    }
  Ints lane;
  for (int i = 0; i < kLanes<float>; ++i) lane[i] = i;
  Winner<float> found;
  found.best = smallest_float(best);
  const Ints entry = best <= vset1(found.best) ? place * kLanes<float> + lane : spread_int(-(kLowest + 1));
  const int32_t winner = -largest_int(-entry);
  found.second = smallest_float(entry == spread_int(winner) ? second : best);
  found.entry = winner;
  return found;
}

// One stage's search of float32 codes. Where the first pass may not be used, the whole codebook is scanned.
class CoarseSearch {
 public:
  // factor: of the slack, 1 but in tests of it.
  CoarseSearch(const RvqLayout& layout, const float* packed, int64_t stage, const SearchBound& bound, double factor,
               bool want_second, int slot)
      : book_(layout, packed, stage),
        coarse_(layout, packed, stage),
        bound_(bound),
        factor_(factor),
        want_second_(want_second),
        rows_(packed + layout.rows() + stage * layout.entries * layout.dim) {
    const int64_t sums = coarse_.passes * kCoarseFrames * kCoarseGroups;
    list_room_ = coarse_.groups + kCoarseGroups;
    const size_t room = static_cast<size_t>(sums + kCoarseFrames * list_room_) * sizeof(int32_t);
    maxima_ = static_cast<int32_t*>(thread_scratch(slot, room));
    list_ = maxima_ + sums;
  }
  bool usable() const { return coarse_.error < HUGE_VAL; }
  const int32_t* list() const { return list_; }

  // spreads: SearchBound::spread of every frame. A frame whose spread is infinite is not searched for. query has
  // kCoarseFrames rows more.
  template <class Frames>
  void search(const float* query, int64_t count, const Frames* frames, Winner<float>* winners) {
    for (int64_t f = 0; f < count;) {
      if (count - f >= 3) {
        const int64_t rows = count - f < kCoarseFrames ? count - f : kCoarseFrames;
        block<kCoarseFrames>(query + f * book_.dim, rows, frames + f, winners + f);
        f += rows;
      } else {
        block<1>(query + f * book_.dim, 1, frames + f, winners + f);
        ++f;
      }
    }
  }

  // Lists the groups that may hold the definition's code, and returns how many.
  int64_t groups(const float* query, double spread) {
    if (!usable() || !(spread < HUGE_VAL)) {
      for (int64_t i = 0; i < coarse_.groups; ++i) list_[i] = static_cast<int32_t>(i);
      return coarse_.groups;
    }
    return want_second_ ? groups_of<true>(query, spread) : groups_of<false>(query, spread);
  }

 private:
  // The smallest sum that stays in the running, where `best` is the largest or, for the margin, the second largest.
  int32_t limit(int32_t best, const CoarseQuery& query, double spread) const {
    const double direction = static_cast<double>(query.error);
    const double dots = 2 * (direction * (1 + 1e-6) + (1 + 1e-5 + direction) * coarse_.error);
    const double apart = 2e-6 + 3 * bound_.score + spread * (2.001 + 0.5 * spread);
    const double sums = factor_ * ((dots + apart) * (kQueryScale * kCoarseScale) + 1);
    const double least = static_cast<double>(best) - sums;
    return least > kLowest + 1 ? static_cast<int32_t>(least) : kLowest + 1;
  }

  template <bool kSecond>
  int64_t groups_of(const float* query, double spread) {
    const CoarseQuery made = coarse_query(query, book_.dim);
    Largest<1> largest;
    coarse_block<1, kSecond>(coarse_, &made, maxima_, largest);
    const int32_t best = best_sum<kSecond>(largest.first[0], largest.second[0]);
    return list_groups(maxima_, kCoarseGroups, coarse_.passes, limit(best, made, spread), list_);
  }

  template <int FB, class Frames>
  void block(const float* query, int64_t count, const Frames* frames, Winner<float>* winners) {
    if (want_second_)
      block<FB, true>(query, count, frames, winners);
    else
      block<FB, false>(query, count, frames, winners);
  }
  template <int FB, bool kSecond, class Frames>
  void block(const float* query, int64_t count, const Frames* frames, Winner<float>* winners) {
    CoarseQuery made[FB];
    for (int f = 0; f < FB; ++f) made[f] = coarse_query(query + f * book_.dim, book_.dim);
    Largest<FB> largest;
    coarse_block<FB, kSecond>(coarse_, made, maxima_, largest);
    // Both loops fetch what is needed a little later: books and rows of all stages do not fit into L2.
    int64_t listed[FB];
    for (int f = 0; f < count; ++f) {
      int32_t* list = list_ + f * list_room_;
      const double spread = frames[f].spread;
      listed[f] = 0;
      if (!(spread < HUGE_VAL)) continue;
      const int32_t least = limit(best_sum<kSecond>(largest.first[f], largest.second[f]), made[f], spread);
      listed[f] = list_groups(maxima_ + f * kCoarseGroups, FB * kCoarseGroups, coarse_.passes, least, list);
      for (int64_t i = 0; i < listed[f]; ++i) {
        const float* group = book_.group(list[i]);
        for (int64_t line = 0; line <= book_.dim; ++line) __builtin_prefetch(group + line * kCodeGroup);
      }
    }
    for (int f = 0; f < count; ++f) {
      const float* q = query + f * book_.dim;
      const int32_t* list = list_ + f * list_room_;
      winners[f] = book_.dim == kCoarseDim ? score_groups<kCoarseDim>(q, book_, list, listed[f])
                                           : score_groups<0>(q, book_, list, listed[f]);
      __builtin_prefetch(rows_ + winners[f].entry * book_.dim);
    }
  }

  Book<float> book_;
  CoarseBook coarse_;
  const SearchBound& bound_;
  double factor_;
  bool want_second_;
  const float* rows_;
  int64_t list_room_;
  int32_t *maxima_, *list_;
};

}  // namespace DCX_NS
}  // namespace dcx

#else
namespace dcx {
namespace DCX_NS {

// Without products of bytes every row is scanned.
class CoarseSearch {
 public:
  CoarseSearch(const RvqLayout& layout, const float*, int64_t, const SearchBound&, double, bool, int slot)
      : groups_(layout.groups()),
        list_(static_cast<int32_t*>(thread_scratch(slot, static_cast<size_t>(groups_) * sizeof(int32_t)))) {}
  bool usable() const { return false; }
  const int32_t* list() const { return list_; }
  template <class Frames>
  void search(const float*, int64_t, const Frames*, Winner<float>*) {}
  int64_t groups(const float*, double) {
    for (int64_t i = 0; i < groups_; ++i) list_[i] = static_cast<int32_t>(i);
    return groups_;
  }

 private:
  int64_t groups_;
  int32_t* list_;
};

}  // namespace DCX_NS
}  // namespace dcx
#endif
