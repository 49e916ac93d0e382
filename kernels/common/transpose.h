// Squares of floats turned in registers: a strided scalar copy writes one float of a cache line at a time, and lines 4
// KB apart drive each other out of the cache before they are full.
#pragma once
#include "vec.h"

namespace dcx {
namespace DCX_NS {

#if DCX_ISA >= 1
constexpr int64_t kSquare = kLanes<float>;

#if DCX_ISA >= 2
typedef __mmask16 LaneMask;
static inline LaneMask first_lanes(int64_t n) { return static_cast<LaneMask>((1u << n) - 1); }
typedef __m512 SquareRow;
static inline __m512 load_all(const float* p) { return _mm512_loadu_ps(p); }
static inline void store_all(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
static inline __m512 load_lanes(const float* p, LaneMask mask) { return _mm512_maskz_loadu_ps(mask, p); }
static inline void store_lanes(float* p, LaneMask mask, __m512 v) { _mm512_mask_storeu_ps(p, mask, v); }

static inline void turn(__m512 (&r)[16]) {
  // The intrinsics without a mask warn in GCC 12.
  constexpr __mmask16 kAll = 0xffff;
  constexpr __mmask8 kAllPairs = 0xff;
  __m512 pairs[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_maskz_unpacklo_ps(kAll, r[i], r[i + 1]);
    pairs[i + 1] = _mm512_maskz_unpackhi_ps(kAll, r[i], r[i + 1]);
  }
  // fours[4 k + j]: in its part of 128 bits L, column 4 L + j of rows 4 k .. 4 k + 3.
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(pairs[i + j]), b = _mm512_castps_pd(pairs[i + j + 2]);
      fours[i + 2 * j] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(kAllPairs, a, b));
      fours[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(kAllPairs, a, b));
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even_low = _mm512_maskz_shuffle_f32x4(kAll, fours[j], fours[4 + j], 0x88);
    const __m512 odd_low = _mm512_maskz_shuffle_f32x4(kAll, fours[j], fours[4 + j], 0xdd);
    const __m512 even_high = _mm512_maskz_shuffle_f32x4(kAll, fours[8 + j], fours[12 + j], 0x88);
    const __m512 odd_high = _mm512_maskz_shuffle_f32x4(kAll, fours[8 + j], fours[12 + j], 0xdd);
    r[j] = _mm512_maskz_shuffle_f32x4(kAll, even_low, even_high, 0x88);
    r[4 + j] = _mm512_maskz_shuffle_f32x4(kAll, odd_low, odd_high, 0x88);
    r[8 + j] = _mm512_maskz_shuffle_f32x4(kAll, even_low, even_high, 0xdd);
    r[12 + j] = _mm512_maskz_shuffle_f32x4(kAll, odd_low, odd_high, 0xdd);
  }
}
#else
typedef __m256i LaneMask;
static inline LaneMask first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
typedef __m256 SquareRow;
static inline __m256 load_all(const float* p) { return _mm256_loadu_ps(p); }
static inline void store_all(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
static inline __m256 load_lanes(const float* p, LaneMask mask) { return _mm256_maskload_ps(p, mask); }
static inline void store_lanes(float* p, LaneMask mask, __m256 v) { _mm256_maskstore_ps(p, mask, v); }

static inline void turn(__m256 (&r)[8]) {
  __m256 pairs[8], fours[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(pairs[i + j]), b = _mm256_castps_pd(pairs[i + j + 2]);
      fours[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      fours[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x20);
    r[4 + j] = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x31);
  }
}
#endif

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns.
static void transpose(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
                      int64_t columns) {
  for (int64_t r0 = 0; r0 < rows; r0 += kSquare)
    for (int64_t c0 = 0; c0 < columns; c0 += kSquare) {
      const int64_t height = rows - r0 < kSquare ? rows - r0 : kSquare;
      const int64_t width = columns - c0 < kSquare ? columns - c0 : kSquare;
      const LaneMask across = first_lanes(width), down = first_lanes(height);
      SquareRow square[kSquare];
      const float* in = from + r0 * from_stride + c0;
      float* out = to + c0 * to_stride + r0;
      if (height == kSquare && width == kSquare) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < kSquare; ++r) {
          square[r] = load_all(in + r * from_stride);
          __builtin_prefetch(in + (r + kSquare) * from_stride);  // a row is too short for the hardware to run ahead
        }
        turn(square);
#pragma GCC unroll 16
        for (int64_t c = 0; c < kSquare; ++c) store_all(out + c * to_stride, square[c]);
        continue;
      }
#pragma GCC unroll 16
      for (int64_t r = 0; r < kSquare; ++r) square[r] = load_lanes(in + (r < height ? r : 0) * from_stride, across);
      turn(square);
#pragma GCC unroll 16
      for (int64_t c = 0; c < kSquare; ++c)
        if (c < width) store_lanes(out + c * to_stride, down, square[c]);
    }
}
#endif

}  // namespace DCX_NS
}  // namespace dcx
