// A register of floats or doubles, on the compiler's vector extension: arithmetic operators, comparisons (lane masks of
// -1 and 0) and `mask ? a : b` work on it. Only a fused multiply-add needs intrinsics, since kernels are
// compiled without contraction; the generic unit multiplies and adds, on 64-bit Arm it fuses.
#pragma once
#include "isa.h"

#include <stdint.h>
#include <string.h>
#if DCX_ISA >= 1
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace dcx {
namespace DCX_NS {

template <class T>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float Vec __attribute__((vector_size(DCX_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(DCX_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t IVec __attribute__((vector_size(DCX_VECTOR_BYTES)));
  typedef int32_t Int;
};
template <>
struct VecTraits<double> {
  typedef double Vec __attribute__((vector_size(DCX_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(DCX_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t IVec __attribute__((vector_size(DCX_VECTOR_BYTES)));
  typedef int64_t Int;
};

template <class T>
using Vec = typename VecTraits<T>::Vec;
template <class T>
using IVec = typename VecTraits<T>::IVec;  // what comparisons of Vec<T> give, and lane indices
template <class T>
constexpr int kLanes = DCX_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
static inline Vec<T> vload(const T* p) {
  return *reinterpret_cast<const typename VecTraits<T>::Unaligned*>(p);
}
template <class T>
static inline void vstore(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecTraits<T>::Unaligned*>(p) = v;
}

static inline Vec<float> vset1(float x) {
#if DCX_ISA >= 2
  return _mm512_set1_ps(x);
#elif DCX_ISA == 1
  return _mm256_set1_ps(x);
#else
  return Vec<float>{x, x, x, x};
#endif
}
static inline Vec<double> vset1(double x) {
#if DCX_ISA >= 2
  return _mm512_set1_pd(x);
#elif DCX_ISA == 1
  return _mm256_set1_pd(x);
#else
  return Vec<double>{x, x};
#endif
}

// a * b + c, rounded once where the unit has the instruction.
static inline Vec<float> vfma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if DCX_ISA >= 2
  return _mm512_fmadd_ps(a, b, c);
#elif DCX_ISA == 1
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
static inline Vec<double> vfma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if DCX_ISA >= 2
  return _mm512_fmadd_pd(a, b, c);
#elif DCX_ISA == 1
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// max(|a|, b) per lane; b where a is not a number.
static inline Vec<float> vlargest(Vec<float> a, Vec<float> b) {
  const Vec<float> size = reinterpret_cast<Vec<float>>(reinterpret_cast<IVec<float>>(a) & 0x7fffffff);
#if DCX_ISA >= 2
  return _mm512_maskz_max_ps(0xffff, size, b);  // GCC 12 compares and blends
#else
  return size > b ? size : b;
#endif
}

// The first n lanes (0 <= n <= kLanes), the others zero; memory past them is not touched.
template <class T>
static inline Vec<T> vload_first(const T* p, int64_t n) {
  T lanes[kLanes<T>] = {};
  memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return vload<T>(lanes);
}
template <class T>
static inline void vstore_first(T* p, Vec<T> v, int64_t n) {
  T lanes[kLanes<T>];
  vstore<T>(lanes, v);
  memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// Pairwise, so the order depends on the register width alone.
template <class T>
static inline T vsum(Vec<T> v) {
  T lanes[kLanes<T>];
  vstore<T>(lanes, v);
  for (int width = kLanes<T> / 2; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

#if DCX_ISA >= 2
template <>
inline float vsum<float>(Vec<float> v) {
  float lanes[16];
  vstore<float>(lanes, v);
  const __m256 half = _mm256_add_ps(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
#endif

// Whether any lane of a comparison's result is set.
template <class T>
static inline bool vany(IVec<T> mask) {
#if DCX_ISA >= 2
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif DCX_ISA == 1
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  typename VecTraits<T>::Int any = 0;
  for (int i = 0; i < kLanes<T>; ++i) any |= mask[i];
  return any != 0;
#endif
}

}  // namespace DCX_NS
}  // namespace dcx
