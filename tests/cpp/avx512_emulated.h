// The AVX-512 and AMX instructions that the kernels name, for a machine without them: their units are compiled for AVX2
// with this header in front (-include), and what they compute can be checked there, to the bit (but for what a NaN
// carries), if not how fast. Masked lanes, roundings and VDPBF16PS's and VCVTNEPS2BF16's denormals are as the
// instructions have them; integers must not overflow. An intrinsic that is not here does not compile; it is added by
// hand. For GCC.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#error "this machine's compiler flags have AVX-512: nothing is to be emulated"
#endif

namespace dcx_emulated {

typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int16_t Shorts __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef int8_t SignedBytes __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));

template <class To, class From>
static inline To as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// The lanes of x whose bit is set, the others zero.
template <class Vector>
static inline Vector keep(unsigned mask, Vector x) {
  for (unsigned i = 0; i < sizeof(x) / sizeof(x[0]); ++i)
    if ((mask >> i & 1) == 0) x[i] = 0;
  return x;
}

template <class Half, class Whole, Half (*fma)(Half, Half, Half)>
static inline Whole in_halves(Whole a, Whole b, Whole c) {
  Half parts[3][2], sums[2];
  memcpy(parts[0], &a, sizeof(a));
  memcpy(parts[1], &b, sizeof(b));
  memcpy(parts[2], &c, sizeof(c));
  for (int i = 0; i < 2; ++i) sums[i] = fma(parts[0][i], parts[1][i], parts[2][i]);
  Whole sum;
  memcpy(&sum, sums, sizeof(sum));
  return sum;
}
static inline __m256 fma_floats(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
static inline __m256d fma_doubles(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }

static inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) { return in_halves<__m256, __m512, fma_floats>(a, b, c); }
static inline __m512d fmadd_pd(__m512d a, __m512d b, __m512d c) {
  return in_halves<__m256d, __m512d, fma_doubles>(a, b, c);
}

// Denormals as zeros of their sign.
static inline Floats flushed(Floats x) {
  const Words bits = as<Words>(x);
  return as<Floats>((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

static inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const Words x = as<Words>(a), y = as<Words>(b);
  const Floats odd_x = flushed(as<Floats>(x & 0xffff0000u)), odd_y = flushed(as<Floats>(y & 0xffff0000u));
  const Floats even_x = flushed(as<Floats>(x << 16)), even_y = flushed(as<Floats>(y << 16));
  const Floats first = flushed(fmadd_ps(odd_x, odd_y, flushed(sum)));
  return flushed(fmadd_ps(even_x, even_y, first));
}

static inline __m256 dpbf16_ps_256(__m256 sum, __m256bh a, __m256bh b) {
  __m512 wide_sum{};
  __m512bh wide_a{}, wide_b{};
  memcpy(&wide_sum, &sum, sizeof(sum));
  memcpy(&wide_a, &a, sizeof(a));
  memcpy(&wide_b, &b, sizeof(b));
  const __m512 found = dpbf16_ps(wide_sum, wide_a, wide_b);
  __m256 low;
  memcpy(&low, &found, sizeof(low));
  return low;
}

static inline __m256bh cvtneps_pbh(__m512 x) {
  uint16_t halves[16];
  const Words bits = as<Words>(flushed(x));
  for (int i = 0; i < 16; ++i) {
    const bool nan = (bits[i] & 0x7fffffffu) > 0x7f800000u;
    halves[i] = static_cast<uint16_t>(nan ? bits[i] >> 16 | 0x40u : (bits[i] + 0x7fffu + (bits[i] >> 16 & 1u)) >> 16);
  }
  __m256bh y;
  memcpy(&y, halves, sizeof(y));
  return y;
}

// Products of unsigned and signed bytes, four to a lane; unlike maddubs_epi16's sums of two, these never saturate.
static inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  const Bytes x = as<Bytes>(a);
  const SignedBytes y = as<SignedBytes>(b);
  Ints z = as<Ints>(sum);
  for (int i = 0; i < 64; ++i) z[i / 4] += int32_t{x[i]} * int32_t{y[i]};
  return as<__m512i>(z);
}
static inline __m512i maddubs_epi16(__m512i a, __m512i b) {
  __m256i x[2], y[2], z[2];
  memcpy(x, &a, sizeof(a));
  memcpy(y, &b, sizeof(b));
  for (int i = 0; i < 2; ++i) z[i] = _mm256_maddubs_epi16(x[i], y[i]);
  __m512i sums;
  memcpy(&sums, z, sizeof(sums));
  return sums;
}
static inline __m512i madd_epi16(__m512i a, __m512i b) {
  const Shorts x = as<Shorts>(a), y = as<Shorts>(b);
  Ints z;
  for (int i = 0; i < 16; ++i) z[i] = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return as<__m512i>(z);
}

template <class Lanes>
static inline __m512i add(__m512i a, __m512i b) {
  return as<__m512i>(as<Lanes>(a) + as<Lanes>(b));
}
static inline __m512i max_epi32(__mmask16 mask, __m512i a, __m512i b) {
  const Ints x = as<Ints>(a), y = as<Ints>(b);
  return as<__m512i>(keep(mask, x > y ? x : y));
}
static inline __m512i min_epi32(__mmask16 mask, __m512i a, __m512i b) {
  const Ints x = as<Ints>(a), y = as<Ints>(b);
  return as<__m512i>(keep(mask, x < y ? x : y));
}

static inline __mmask16 cmpge_epi32_mask(__m512i a, __m512i b) {
  const Ints x = as<Ints>(a), y = as<Ints>(b);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(x[i] >= y[i]) << i;
  return static_cast<__mmask16>(mask);
}
static inline __mmask8 test_epi64_mask(__m512i a, __m512i b) {
  const Longs both = as<Longs>(a) & as<Longs>(b);
  unsigned mask = 0;
  for (int i = 0; i < 8; ++i) mask |= static_cast<unsigned>(both[i] != 0) << i;
  return static_cast<__mmask8>(mask);
}
static inline __m512i maskz_compress_epi32(__mmask16 mask, __m512i a) {
  const Ints x = as<Ints>(a);
  Ints y{};
  for (int i = 0, n = 0; i < 16; ++i)
    if (mask >> i & 1) y[n++] = x[i];
  return as<__m512i>(y);
}

static inline __m512 maskz_loadu_ps(__mmask16 mask, const void* p) {
  Floats x{};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) {
      float lane;
      memcpy(&lane, static_cast<const float*>(p) + i, sizeof(lane));
      x[i] = lane;
    }
  return x;
}
static inline void mask_storeu_ps(void* p, __mmask16 mask, __m512 x) {
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) {
      const float lane = x[i];
      memcpy(static_cast<float*>(p) + i, &lane, sizeof(lane));
    }
}
static inline __m512 loadu_ps(const void* p) {
  __m512 x;
  memcpy(&x, p, sizeof(x));
  return x;
}

template <class Vector>
static inline void storeu(void* p, Vector x) {
  static_assert(sizeof(x) == 64);
  memcpy(p, &x, sizeof(x));
}

static inline __m512 unpack(__m512 a, __m512 b, bool high) {
  const int n = high ? 2 : 0;
  const Ints from{n,     16 + n, n + 1, 17 + n, 4 + n,  20 + n, 5 + n,  21 + n,
                  8 + n, 24 + n, 9 + n, 25 + n, 12 + n, 28 + n, 13 + n, 29 + n};
  return __builtin_shuffle(a, b, from);
}
static inline __m512d unpack(__m512d a, __m512d b, bool high) {
  const int n = high ? 1 : 0;
  return __builtin_shuffle(a, b, Longs{n, 8 + n, 2 + n, 10 + n, 4 + n, 12 + n, 6 + n, 14 + n});
}
static inline __m512 shuffle_f32x4(__m512 a, __m512 b, int control) {
  Ints from;
  for (int i = 0; i < 16; ++i) from[i] = 4 * (control >> 2 * (i / 4) & 3) + i % 4 + (i < 8 ? 0 : 16);
  return __builtin_shuffle(a, b, from);
}

// AMX: what kernels/common/amx.h has, on tiles in memory. A shape that the instructions refuse ends the program.
struct Tiles {
  int64_t rows[8], row_bytes[8];
  bool set;
  uint8_t bytes[8][16][64];
};
static thread_local Tiles tiles;

static inline void load_tile_shapes(const void* shapes) {
  uint8_t from[64];
  memcpy(from, shapes, sizeof(from));
  memset(&tiles, 0, sizeof(tiles));
  for (int i = 0; i < 8; ++i) {
    tiles.row_bytes[i] = from[16 + 2 * i] + 256 * from[17 + 2 * i];
    tiles.rows[i] = from[48 + i];
    if (tiles.rows[i] > 16 || tiles.row_bytes[i] > 64 || (tiles.rows[i] == 0) != (tiles.row_bytes[i] == 0))
      __builtin_trap();
  }
  if (from[0] != 1 || from[1] != 0) __builtin_trap();
  tiles.set = true;
}
static inline void release_tiles() { memset(&tiles, 0, sizeof(tiles)); }
template <int tile>
static inline void check_tile() {
  if (!tiles.set || tiles.rows[tile] == 0) __builtin_trap();
}
template <int tile>
static inline void tile_zero() {
  check_tile<tile>();
  memset(tiles.bytes[tile], 0, sizeof(tiles.bytes[tile]));
}
template <int tile>
static inline void tile_load(const void* p, int64_t stride) {
  tile_zero<tile>();
  for (int64_t r = 0; r < tiles.rows[tile]; ++r)
    memcpy(tiles.bytes[tile][r], static_cast<const char*>(p) + r * stride, static_cast<size_t>(tiles.row_bytes[tile]));
}
template <int tile>
static inline void tile_store(void* p, int64_t stride) {
  check_tile<tile>();
  for (int64_t r = 0; r < tiles.rows[tile]; ++r)
    memcpy(static_cast<char*>(p) + r * stride, tiles.bytes[tile][r], static_cast<size_t>(tiles.row_bytes[tile]));
}
// Sixteen columns at once, as all of the kernels' tiles of sums and of b have them.
template <int sum, int a, int b>
static inline void add_product() {
  check_tile<sum>();
  check_tile<a>();
  check_tile<b>();
  const int64_t pairs = tiles.row_bytes[a] / 4;
  if (tiles.rows[a] != tiles.rows[sum] || tiles.rows[b] != pairs || tiles.row_bytes[sum] != 64 ||
      tiles.row_bytes[b] != 64)
    __builtin_trap();
  for (int64_t r = 0; r < tiles.rows[sum]; ++r) {
    Floats found, parts[2] = {};
    for (int64_t k = 0; k < pairs; ++k) {
      uint32_t pair;
      Words columns;
      memcpy(&pair, tiles.bytes[a][r] + 4 * k, sizeof(pair));
      memcpy(&columns, tiles.bytes[b][k], sizeof(columns));
      const Words row = Words{} + pair;
      for (int half = 0; half < 2; ++half) {
        const Floats x = flushed(as<Floats>(half == 0 ? row << 16 : row & 0xffff0000u));
        const Floats y = flushed(as<Floats>(half == 0 ? columns << 16 : columns & 0xffff0000u));
        parts[half] = flushed(fmadd_ps(x, y, parts[half]));
      }
    }
    memcpy(&found, tiles.bytes[sum][r], sizeof(found));
    found = flushed(flushed(found) + flushed(parts[0] + parts[1]));
    memcpy(tiles.bytes[sum][r], &found, sizeof(found));
  }
}

}  // namespace dcx_emulated

#define _mm512_set1_ps(x) (__m512((x) - dcx_emulated::Floats{}))  // a sum would lose the sign of -0
#define _mm512_set1_pd(x) (__m512d((x) - dcx_emulated::Doubles{}))
#define _mm512_set1_epi32(x) (dcx_emulated::as<__m512i>(dcx_emulated::Ints{} + (x)))
#define _mm512_set1_epi16(x) (dcx_emulated::as<__m512i>(dcx_emulated::Shorts{} + int16_t{x}))
#define _mm512_setzero_si512() (__m512i{})
#define _mm512_set_epi32(p, o, n, m, l, k, j, i, h, g, f, e, d, c, b, a) \
  (dcx_emulated::as<__m512i>(dcx_emulated::Ints{a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p}))
#define _mm512_castps_pd(x) (dcx_emulated::as<__m512d>(x))
#define _mm512_castpd_ps(x) (dcx_emulated::as<__m512>(x))
#define _mm512_fmadd_ps dcx_emulated::fmadd_ps
#define _mm512_fmadd_pd dcx_emulated::fmadd_pd
#define _mm512_maskz_max_ps(mask, a, b) dcx_emulated::keep(mask, (a) > (b) ? (a) : (b))
#define _mm512_maskz_min_ps(mask, a, b) dcx_emulated::keep(mask, (a) < (b) ? (a) : (b))
#define _mm512_maskz_max_pd(mask, a, b) dcx_emulated::keep(mask, (a) > (b) ? (a) : (b))
#define _mm512_maskz_min_pd(mask, a, b) dcx_emulated::keep(mask, (a) < (b) ? (a) : (b))
#define _mm512_maskz_max_epi32 dcx_emulated::max_epi32
#define _mm512_maskz_min_epi32 dcx_emulated::min_epi32
#define _mm512_add_epi32 dcx_emulated::add<dcx_emulated::Ints>
#define _mm512_add_epi16 dcx_emulated::add<dcx_emulated::Shorts>
#define _mm512_dpbusd_epi32 dcx_emulated::dpbusd_epi32
#define _mm512_maddubs_epi16 dcx_emulated::maddubs_epi16
#define _mm512_madd_epi16 dcx_emulated::madd_epi16
#define _mm512_dpbf16_ps dcx_emulated::dpbf16_ps
#define _mm256_dpbf16_ps dcx_emulated::dpbf16_ps_256
#define _mm512_cvtneps_pbh dcx_emulated::cvtneps_pbh
#define _mm512_cmpge_epi32_mask dcx_emulated::cmpge_epi32_mask
#define _mm512_test_epi64_mask dcx_emulated::test_epi64_mask
#define _mm512_maskz_compress_epi32 dcx_emulated::maskz_compress_epi32
#define _mm512_storeu_si512 dcx_emulated::storeu
#define _mm512_loadu_ps dcx_emulated::loadu_ps
#define _mm512_storeu_ps dcx_emulated::storeu
#define _mm512_maskz_loadu_ps dcx_emulated::maskz_loadu_ps
#define _mm512_mask_storeu_ps dcx_emulated::mask_storeu_ps
#define _mm512_maskz_unpacklo_ps(mask, a, b) dcx_emulated::keep(mask, dcx_emulated::unpack(a, b, false))
#define _mm512_maskz_unpackhi_ps(mask, a, b) dcx_emulated::keep(mask, dcx_emulated::unpack(a, b, true))
#define _mm512_maskz_unpacklo_pd(mask, a, b) dcx_emulated::keep(mask, dcx_emulated::unpack(a, b, false))
#define _mm512_maskz_unpackhi_pd(mask, a, b) dcx_emulated::keep(mask, dcx_emulated::unpack(a, b, true))
#define _mm512_maskz_shuffle_f32x4(mask, a, b, control) \
  dcx_emulated::keep(mask, dcx_emulated::shuffle_f32x4(a, b, control))
